"""Two agents with points in them, one warm guest, and what must hold after every fault.

`CampaignRig.attempt` migrates the guest while faults are injected, starts again what was killed, waits until both ends
have settled, and judges: exactly one copy runs, a doubt having ended by the destination's answer; or, where the destination
took the VM and lost its QEMU, the paused copy at the source can be brought back as an operator would; the guest's memory is
what the guest wrote; no tick is missing or was lived twice; nothing is left behind. A postcopy whose halves were parted is
joined again once the line is whole, or rests as `halves.py` says.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sealane.enclave.launcher import ENCLAVE_NAME, LAUNCHER_NAME
from sealane.errors import SealaneError
from sealane.host.models import Migration, MigrationRequest, ResolveRequest
from sealane.hypervisor.unshared import IN_POSTCOPY
from sealane.session.handover import ENDED, State
from sealane.testing.faultdirector import KILLS_QEMU, Attempt, FaultDirector, Injection, qemus_of
from sealane.testing.halves import Rest, how_it_rests, why_not
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair, process_name
from sealane.testing.problems import RigError
from sealane.testing.trips import PRECOPY, Trip
from sealane.testing.wiretap import Wiretap

HARDWARE: Final = Hardware(memory_mib=128)
# Longer than the agents' own limits for a silent peer (LOADED_TIMEOUT_S and what follows it).
_SETTLE_TIMEOUT_S: Final = 150.0
_TIDY_TIMEOUT_S: Final = 15.0
_CHECK_TIMEOUT_S: Final = 30.0
# Each look costs both agents something, and a machine that runs several campaigns side by side a third of its time at 0.05 s.
_LOOK_EVERY_S: Final = 0.2
# How long a postcopy that is parted meets a line that is cut, or a disk that is full.
_RELIEF_AFTER_S: Final = 2.0
_PIDFD: Final = "anon_inode:[pidfd]"
_SETTINGS: Final = "[limits]\nask_first_pause_s = 0.5\n"
# Of an answer that leaves it to a person (`sealane.host.doubts.why_it_stays`).
_LAST_ONE: Final = "the copy here is the last one"
_BROUGHT_BACK: Final = "in-doubt, brought back"
_DECIDED: Final = "split, decided"
_MADE_BY_USE: Final = frozenset({"log", "receipts"})


@dataclass
class Outcome:
    """How one attempt ended; `problems` is empty where everything held."""

    injections: list[str]
    fired: list[str]
    ending: str = (
        ""  # completed, aborted, in-doubt, lost (the fault killed the QEMU in which the VM ran, or a half of it)
    )
    recovery_s: float | None = None
    total_s: float = 0.0
    codes: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    traced_when_fired: int = 0
    problems: list[str] = field(default_factory=list)


class CampaignRig:
    """A guest that lives on `home` and tries to go to `away`. `worn` after an attempt: take a new rig for the next."""

    def __init__(self, pair: HostPair, guest: Guest, director: FaultDirector, workload: Workload) -> None:
        self.pair, self.guest, self.director, self.workload = pair, guest, director, workload
        self.home, self.away = pair.a, pair.b
        self.worn = False
        self._is_lost = False
        self._descriptors: dict[str, int] = {}
        self._files = {end.name: _state_files(end) for end in (pair.a, pair.b)}
        self._known: set[str] = set()
        self._id: str | None = None
        for end in (pair.a, pair.b):
            self._note_descriptors(end)

    def _note_descriptors(self, end: AgentHost) -> None:
        with end.client() as client:
            client.vms()
        self._descriptors[end.name] = len([each for each in end.descriptors() if each != _PIDFD])

    # One attempt

    def attempt(self, injections: list[Injection], trip: Trip = PRECOPY) -> Outcome:
        """Migrate so, with these faults; never raises for what the agents do wrong, but tells it in `problems`."""
        outcome = Outcome([str(each) for each in injections], [])
        begun = time.monotonic()
        try:
            if self._is_lost:
                self._start_anew()
            with self.director.attempt(self.home, self.away, injections, trip) as attempt:
                try:
                    self._migrate(trip)
                    rest = self._settle(attempt)
                finally:
                    outcome.fired = [str(each) for each in attempt.fired]
                if attempt.fired:
                    outcome.recovery_s = time.monotonic() - attempt.fired_at
            if not rest:
                self._await_answer()
            self._take_notes(outcome, attempt)
            if rest:
                self._judge_rest(outcome, attempt, rest)
            else:
                self._judge(outcome, attempt)
        except (RigError, SealaneError, OSError, AssertionError) as error:
            outcome.problems.append(f"{type(error).__name__}: {error}"[:1500])
        outcome.total_s = time.monotonic() - begun
        # a QEMU whose switch was cut runs its VM, and can migrate it no more (`hypervisor/stranded.py`, `unshared.py`)
        cannot_leave = not self._is_lost and self._status_at(self.home) in {"device", "cancelling", *IN_POSTCOPY}
        self.worn = self.worn or bool(outcome.problems) or cannot_leave
        return outcome

    def _start_anew(self) -> None:
        """A fault killed the QEMU in which the VM was: it starts at its last home, and the agents go on."""
        for machine in self.guest.machines.values():
            machine.console_path.unlink(missing_ok=True)
        self.pair.start_guest(self.guest, self.home)
        self._is_lost = False

    def _take_notes(self, outcome: Outcome, attempt: Attempt) -> None:
        outcome.trace, outcome.traced_when_fired = attempt.trace, attempt.traced_when_fired
        found = [self._newest(end) for end in (self.home, self.away)]
        outcome.codes = [m.problem.code if m and m.problem else "" for m in found]

    def _migrate(self, trip: Trip) -> None:
        wish = {"vm": self.guest.name, "host": self.away.name, **trip.options}
        with suppress(SealaneError), self.home.client() as client:  # a fault may meet the request itself
            client.start_migration(MigrationRequest.model_validate(wish))

    def _settle(self, attempt: Attempt) -> Rest:
        """Wait until both ends have come to an end; how they rest where they cannot."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while True:
            for end in (self.home, self.away):
                if end.name in attempt.killed:
                    self._restart(end, attempt)
            if all(self._has_settled(end, attempt) for end in (self.home, self.away)) and not attempt.killed:
                return ""
            if attempt.trip.by_postcopy and not attempt.killed and (rest := self._look_at_halves(attempt)):
                return rest
            if time.monotonic() > deadline:
                raise RigError(f"not settled after {_SETTLE_TIMEOUT_S:.0f} s: {self._tell()}")
            time.sleep(_LOOK_EVERY_S)

    def _restart(self, end: AgentHost, attempt: Attempt) -> None:
        assert end.agent is not None  # noqa: S101 - it was killed
        end.agent.process.wait()
        attempt.killed.discard(end.name)
        try:
            end.start_agent()
        except RigError:
            if end.name not in attempt.killed:  # not by a second fault
                raise
            return
        self._note_descriptors(end)

    def _has_settled(self, end: AgentHost, attempt: Attempt) -> bool:
        try:
            with end.client() as client:
                found = self._newest(end)
                if found is None:
                    return client.host().migrations_active == 0
                if (
                    found.state == "in-doubt"
                ):  # it lasts where nobody can be asked, nothing be journalled, or all be lost
                    return attempt.is_cut or bool(attempt.full) or found.detail.find(_LAST_ONE) >= 0
                return State(found.state) in ENDED and found.ended_at is not None
        except SealaneError:
            return False

    def _look_at_halves(self, attempt: Attempt) -> Rest:
        """Relieve a postcopy that is parted, which a line that stays cut would keep so; how it rests, where it is lost."""
        try:
            source, destination = self._newest(self.home), self._newest(self.away)
        except SealaneError:
            return ""
        is_parted = any(each and each.state == "postcopy-paused" for each in (source, destination))
        if is_parted and time.monotonic() > attempt.fired_at + _RELIEF_AFTER_S:
            self.director.relieve(attempt)
        asks = (lambda: self._status_at(self.home), lambda: self._status_at(self.away))
        return how_it_rests(source, destination, *asks)

    def _status_at(self, end: AgentHost) -> str:
        """What QEMU says of its migration there; "" where there is none."""
        if not qemus_of(end):
            return ""
        with suppress(RigError, OSError), self.guest.machines[end.name].observe() as monitor:
            return str(monitor.execute("query-migrate").get("status", "none"))
        return "unknown"

    def _await_answer(self) -> None:
        """The line is mended and the disk free: a doubt ends by itself now, but where the destination lost its QEMU."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while (found := self._newest(self.home)) and (found.state == "in-doubt" or found.ended_at is None):
            if _LAST_ONE in found.detail:
                return
            if time.monotonic() > deadline:
                raise RigError(f"still in doubt after {_SETTLE_TIMEOUT_S:.0f} s: {found.detail}; {self._tell()}")
            time.sleep(_LOOK_EVERY_S)

    def _newest(self, end: AgentHost) -> Migration | None:
        """This attempt's migration as this end knows it; None where it never had a job for it.

        A question about it that was cut off leaves an entry of its own, under another id.
        """
        with end.client() as client:
            fresh = [each for each in client.migrations(vm=self.guest.name) if each.id not in self._known]
        if end is self.home:
            self._id = fresh[0].id if fresh else None
        same = [each for each in fresh if each.id == self._id]
        return next(iter(same or fresh), None)

    # The judgement

    def _judge(self, outcome: Outcome, attempt: Attempt) -> None:
        self._wait_tidy_processes(outcome)
        running = self._running()
        source, destination = self._newest(self.home), self._newest(self.away)
        may_be_lost = any(each.fault in KILLS_QEMU for each in attempt.fired)
        if len(running) > 1:
            outcome.problems.append("two copies run")
        elif source is not None and source.state == "in-doubt":
            outcome.ending = "in-doubt"
            running = self._resolve(outcome, source, running, may_be_lost)
        elif not running:
            self._judge_lost(outcome, source, destination, may_be_lost)
        elif running[0] is self.home:
            outcome.ending = "in-doubt, home" if source is not None and source.resolution else "aborted"
            self._expect(outcome, source, {"aborted", None}, {"source"})
            self._expect(outcome, destination, {"aborted", None}, {"source"})
        else:
            outcome.ending = "in-doubt, away" if source is not None and source.resolution else "completed"
            self._expect(outcome, source, {"completed"}, {"destination"})
            self._expect(outcome, destination, {"completed"}, {"destination"})
        if len(running) == 1 and outcome.ending != _BROUGHT_BACK:
            self._judge_guest(outcome, running[0])
        self._judge_remains(outcome, running)
        for end in (self.home, self.away):
            with end.client() as client:
                self._known |= {each.id for each in client.migrations(vm=self.guest.name)}

    def _judge_rest(self, outcome: Outcome, attempt: Attempt, rest: Rest) -> None:
        """What is kept of the VM stays where it is: nothing is tidy, and the next attempt needs new hosts."""
        outcome.ending, self.worn = rest, True
        if why := why_not(rest, [each.fault for each in attempt.fired], was_cut=bool(attempt.trip.cut_at)):
            outcome.problems.append(f"{why}; {self._tell()}")
        if len(self._running()) > 1:
            outcome.problems.append("two copies run")
        if rest == "split":
            self._decide(outcome)
        self._judge_agents(outcome)

    def _decide(self, outcome: Outcome) -> None:
        """A person ends what is at the destination, and brings back the copy at the source, as of the switch."""
        outcome.ending = _DECIDED
        words = (ResolveRequest(decision="drop-here", i_have_looked=True), ResolveRequest(decision="own-here"))
        for end, word in zip((self.away, self.home), words, strict=True):
            found = self._newest(end)
            assert found is not None  # noqa: S101 - it is how they rest
            with end.client() as client:
                client.resolve(found.id, word)
        if self._running() != [self.home] or qemus_of(self.away):
            outcome.problems.append(f"the copy at the source was not brought back, or not alone; {self._tell()}")
        self._judge_memory(outcome)

    def _expect(self, outcome: Outcome, found: Migration | None, states: set[str | None], runs_at: set[str]) -> None:
        if (found.state if found else None) not in states or (found and found.runs_at not in runs_at):
            told = f"{found.role} says {found.state}, runs at {found.runs_at}" if found else "no word"
            outcome.problems.append(f"{told}; the VM runs otherwise")

    def _judge_lost(
        self, outcome: Outcome, source: Migration | None, destination: Migration | None, may_be_lost: bool
    ) -> None:
        outcome.ending = "lost"
        self._is_lost = True
        kept = [end.name for end in (self.home, self.away) if qemus_of(end)]
        if not may_be_lost:
            outcome.problems.append(f"no copy runs; QEMU is left on {kept}; {self._tell()}")
        elif kept:
            outcome.problems.append(f"no copy runs, and a paused one on {kept} was not resumed; {self._tell()}")

    def _resolve(
        self, outcome: Outcome, source: Migration, running: list[AgentHost], may_be_lost: bool
    ) -> list[AgentHost]:
        """The destination took the VM and lost its QEMU: a person brings back the copy here, as of the switch-over."""
        self.worn = True
        if running or not may_be_lost:
            outcome.problems.append(f"the destination says that it lost its QEMU: {source.detail}; {self._tell()}")
        with self.home.client() as client:
            resolved = client.resolve(source.id, ResolveRequest(decision="own-here"))
        outcome.ending = _BROUGHT_BACK
        if resolved.runs_at == "nowhere":  # another fault took this one too
            outcome.ending = "lost"
            return []
        return self._running()

    def _running(self) -> list[AgentHost]:
        found = []
        for end in (self.home, self.away):
            if qemus_of(end):
                with suppress(RigError), self.guest.machines[end.name].observe() as monitor:
                    if monitor.execute("query-status")["status"] == "running":
                        found.append(end)
        return found

    def _judge_guest(self, outcome: Outcome, where: AgentHost) -> None:
        if where is self.away:
            self.guest.moved_to(self.away.name)
        elif self.guest.machines[self.away.name].console.ticks:
            outcome.problems.append("the guest ran at the destination, and runs at the source")
        self._judge_memory(outcome)

    def _judge_memory(self, outcome: Outcome) -> None:
        """What the guest tells of itself where it runs now."""
        console = self.guest.console
        checks, deadline = console.checks, time.monotonic() + _CHECK_TIMEOUT_S
        while console.checks < checks + 1:
            if time.monotonic() > deadline:
                outcome.problems.append(f"the guest stands still after tick {console.last_tick}")
                break
            time.sleep(_LOOK_EVERY_S)
        if not console.is_contiguous:
            outcome.problems.append("ticks are missing, or were lived twice")
        if console.corruptions:
            outcome.problems.append(f"guest memory: {console.corruptions[0]}")

    # What is left

    def _wait_tidy_processes(self, outcome: Outcome) -> None:
        deadline = time.monotonic() + _TIDY_TIMEOUT_S
        while (left := self._helpers_left()) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        outcome.problems += left

    def _helpers_left(self) -> list[str]:
        found = []
        for end in (self.home, self.away):
            words = {pid: _command(pid) for pid in end.processes() if not _is_launcher(pid)}
            # the last one measures what enclaves load, each time that an agent has started
            known = ("qemu-system", " agent --listen", "sealane.quoting", '"sealane.enclave.process"')
            others = [each for each in words.values() if not any(word in each for word in known)]
            if others:
                found.append(f"{end.name} has processes left: {others}")
            if sockets := [each.name for each in (end.host.paths.run / "m").glob("*")]:
                found.append(f"{end.name} has socket directories left: {sockets}")
        return found

    def _judge_remains(self, outcome: Outcome, running: list[AgentHost]) -> None:
        deadline = time.monotonic() + _TIDY_TIMEOUT_S
        while (left := self._left(running)) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        outcome.problems += left
        self._judge_agents(outcome)
        if running == [self.away]:
            self.home, self.away = self.away, self.home

    def _judge_agents(self, outcome: Outcome) -> None:
        for end in (self.home, self.away):
            if end.agent and "Traceback" in end.agent.output:
                said = end.agent.output
                outcome.problems.append(f"{end.name}'s agent: {said[said.index('Traceback') :][:1500]}")

    def _left(self, running: list[AgentHost]) -> list[str]:
        found = []
        for end in (self.home, self.away):
            qemus = qemus_of(end)
            if len(qemus) != (end in running):
                found.append(f"{end.name} has {len(qemus)} QEMU")
            now = end.descriptors()
            watched = now.count(_PIDFD)
            if watched > len(qemus) or len(now) - watched > self._descriptors[end.name]:
                found.append(f"{end.name} had {self._descriptors[end.name]} descriptors and has {now}")
            if odd := _state_files(end) - self._files[end.name] - _MADE_BY_USE:
                found.append(f"{end.name} has files left: {sorted(odd)}")
        return found

    def _tell(self) -> str:
        told = []
        for end in (self.home, self.away):
            with suppress(SealaneError):
                found = self._newest(end)
                told.append(f"{end.name}: {f'{found.state}, {found.runs_at}, {found.detail}' if found else 'no job'}")
                told.append(f"its QEMU: {self._status_at(end) or 'none'}")
        return "; ".join(told)


def _is_launcher(pid: int) -> bool:
    """Also one that still starts, and has not named itself. Enclaves are its forks: their command is the same, their name not."""
    name = process_name(pid)
    return name == LAUNCHER_NAME or (name != ENCLAVE_NAME and " sealane.enclave " in _command(pid))


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:1000] or f"zombie {pid}"
    return "gone"


def _state_files(end: AgentHost) -> set[str]:
    return {path.name for path in end.host.paths.state.iterdir()}


@contextmanager
def make_rig(workload: Workload = PRECOPY.workload) -> Iterator[CampaignRig]:
    """Two hosts joined by wiretaps, agents up, the guest awake on the first."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp")))
        director = stack.enter_context(FaultDirector(directory / "director.sock"))
        pair = stack.enter_context(make_pair(program=_program(director), settings=_SETTINGS))
        director.ends = [pair.a, pair.b]
        for near, far in ((pair.a, pair.b), (pair.b, pair.a)):
            tap = stack.enter_context(Wiretap((far.host.address, far.host.port), host=near.host))
            director.taps.append(tap)
            near.trust(far, address=tap.address[0], port=tap.address[1])
        guest = pair.add_guest(hardware=HARDWARE, workload=workload)
        pair.start_guest(guest, pair.a)
        yield CampaignRig(pair, guest, director, workload)


def _program(director: FaultDirector) -> tuple[str, ...]:
    return (sys.executable, "-m", "sealane.testing.faultpoints", str(director.path))
