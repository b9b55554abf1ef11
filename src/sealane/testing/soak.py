"""One VM moves back and forth between two agents, some moves cancelled or cut at random: `./run soak`.

After every move exactly one copy runs, the guest goes on, and both agents are at rest. At the end every tick of the guest was
lived once, and its memory is what it wrote. Every so many moves the agents are measured: descriptors, threads, resident
memory, processes, files. What is kept on purpose, the journal and a receipt for each move, is counted apart.
"""

import argparse
import json
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from sealane.errors import SealaneError
from sealane.host.models import Migration, MigrationRequest
from sealane.session.handover import ENDED, State
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair, process_name
from sealane.testing.problems import RigError
from sealane.testing.qemu import find_qemu
from sealane.testing.wiretap import Wiretap

Disturbance = Literal["none", "cancel", "cut"]
DISTURBANCES: Final[tuple[Disturbance, ...]] = get_args(Disturbance)
HARDWARE: Final = Hardware(memory_mib=128)
WORKLOAD: Final = Workload(fill_mib=8, rewrite_kib_per_s=256, tick_ms=100, check_all=10)
_SETTINGS: Final = "[limits]\nask_first_pause_s = 0.5\nwishes_per_peer_per_minute = 1000\n"
# Of ten moves, how many are left alone, cancelled, cut.
_WEIGHTS: Final = (6, 2, 2)
# A disturbance comes somewhere in a move of that length; later ones meet a move that has ended, and change nothing.
_DISTURBED_WITHIN_S: Final = 1.5
_SETTLE_TIMEOUT_S: Final = 120.0
_TIDY_TIMEOUT_S: Final = 15.0
_LOOK_EVERY_S: Final = 0.02
# What a measurement may be above the first ones: a descriptor or thread may be in use at that moment; the allocator and SQLite's
# cache keep what they once had.
DESCRIPTORS_SLACK: Final = 4
THREADS_SLACK: Final = 4
RSS_SLACK_BYTES: Final = 24 << 20


@dataclass(frozen=True)
class Sample:
    """One agent at rest after so many moves. `files` are those below the state directory but receipts and QEMU's logs."""

    host: str
    moves: int
    descriptors: int
    threads: int
    rss_bytes: int
    launcher_rss_bytes: int
    processes: int
    files: int
    receipts: int
    journal_bytes: int


@dataclass
class Story:
    """What happened."""

    seed: int
    moves: int = 0
    endings: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ticks: int = 0
    checks: int = 0
    total_s: float = 0.0

    def as_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)


class Soak:
    """A guest that lives on `home` and goes to `away`."""

    def __init__(self, pair: HostPair, guest: Guest, taps: Sequence[Wiretap], story: Story) -> None:
        self.home, self.away, self.guest, self.taps, self.story = pair.a, pair.b, guest, taps, story
        self._random = random.Random(story.seed)  # noqa: S311 - to be repeated, not to be secret

    def move(self) -> str:
        """One attempt to move; how it ended. Raises RigError where it does not come to rest."""
        disturbance = self._random.choices(DISTURBANCES, _WEIGHTS)[0]
        after_s = self._random.uniform(0, _DISTURBED_WITHIN_S)
        with self.home.client() as client:
            begun = client.start_migration(MigrationRequest(vm=self.guest.name, host=self.away.name))
        timer = threading.Timer(after_s, self._disturb, [disturbance, begun.id])
        timer.start()
        try:
            self._await_rest(begun, disturbance)
        finally:
            timer.cancel()
            timer.join()
        for tap in self.taps:
            tap.mend()
        last = self._await_rest(begun, "none")
        self._follow(last)
        resolved = "" if last.resolution is None else ", after a doubt"
        why = "" if last.problem is None else f" ({last.problem.code})"
        ending = f"{disturbance}: {last.state}{why}{resolved}"
        if disturbance == "none" and last.state != "completed":
            self.story.problems.append(
                f"move {self.story.moves + 1}, undisturbed: {last.state}{why}: {last.detail}"[:500]
            )
        self.story.moves += 1
        self.story.endings[ending] = self.story.endings.get(ending, 0) + 1
        return ending

    def _disturb(self, disturbance: Disturbance, migration: str) -> None:
        if disturbance == "cancel":
            with suppress(SealaneError), self.home.client() as client:
                client.cancel(migration)
        elif disturbance == "cut":
            for tap in self.taps:
                tap.cut()

    def _await_rest(self, begun: Migration, disturbance: Disturbance) -> Migration:
        """The source's word once both ends have ended; a doubt lasts as long as the line is cut."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        with self.home.client() as near, self.away.client() as far:
            while True:
                last = near.migration(begun.id)
                if last.state == "in-doubt" and disturbance == "cut":
                    return last
                over = State(last.state) in ENDED and last.ended_at is not None
                if over and not near.host().migrations_active and not far.host().migrations_active:
                    return last
                if time.monotonic() > deadline:
                    raise RigError(f"no rest after {_SETTLE_TIMEOUT_S:.0f} s: {last.state}, {last.detail}")
                time.sleep(_LOOK_EVERY_S)

    def _follow(self, last: Migration) -> None:
        """The guest goes on where both say, and only there."""
        arrived = last.state == "completed"
        if (last.state, last.runs_at) not in {("completed", "destination"), ("aborted", "source")}:
            raise RigError(f"{last.state}, and the VM runs at {last.runs_at}: {last.detail}")
        here, there = (self.away, self.home) if arrived else (self.home, self.away)
        if arrived:
            self.guest.moved_to(self.away.name)
        self.home, self.away = here, there
        console = self.guest.machines[here.name].console_path
        said, deadline = _size(console), time.monotonic() + _SETTLE_TIMEOUT_S
        while _size(console) <= said:
            if time.monotonic() > deadline:
                raise RigError("the guest stands still")
            time.sleep(_LOOK_EVERY_S)
        deadline = time.monotonic() + _TIDY_TIMEOUT_S
        while (count := [_qemus(end) for end in (here, there)]) != [1, 0] and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        if count != [1, 0]:
            raise RigError(f"{count} QEMUs here and there")

    # What must not grow

    def measure(self) -> None:
        """Look at both agents, at rest."""
        for end in (self.home, self.away):
            self._await_tidy(end)
            self.story.samples.append(_sample(end, self.story.moves))

    def _await_tidy(self, end: AgentHost) -> None:
        deadline = time.monotonic() + _TIDY_TIMEOUT_S
        while list((end.host.paths.run / "m").glob("*")) or _enclaves(end):
            if time.monotonic() > deadline:
                raise RigError(f"{end.name} has enclaves or sockets left: {_enclaves(end)}")
            time.sleep(_LOOK_EVERY_S)

    def judge(self) -> None:
        """The guest's whole life, and what grew; problems are told in the story."""
        self.guest.wait_ticks(2)
        console = self.guest.console
        self.story.ticks, self.story.checks = console.last_tick, console.checks
        if not console.is_contiguous:
            self.story.problems.append("ticks are missing, or were lived twice")
        if console.corruptions:
            self.story.problems.append(f"guest memory: {console.corruptions[0]}")
        self.story.problems += grown(self.story.samples)
        for end in (self.home, self.away):
            if end.agent and "Traceback" in end.agent.output:
                said = end.agent.output
                self.story.problems.append(f"{end.name}'s agent: {said[said.index('Traceback') :][:1500]}")


def grown(samples: Sequence[Sample]) -> list[str]:
    """What the last third of the samples has more of than the first third, beyond the slack."""
    found = []
    for host in sorted({each.host for each in samples}):
        mine = [each for each in samples if each.host == host]
        third = max(1, len(mine) // 3)
        for name, slack in _SLACK.items():
            before, after = (
                statistics.median(getattr(each, name) for each in part) for part in (mine[:third], mine[-third:])
            )
            if after > before + slack:
                found.append(f"{host}: {name} grew from {before:.0f} to {after:.0f}")
    return found


_SLACK: Final[dict[str, int]] = {
    "descriptors": DESCRIPTORS_SLACK,
    "threads": THREADS_SLACK,
    "rss_bytes": RSS_SLACK_BYTES,
    "launcher_rss_bytes": RSS_SLACK_BYTES,
    "processes": 1,
    "files": 2,  # SQLite's -wal and -shm come and go
}


def _sample(end: AgentHost, moves: int) -> Sample:
    assert end.agent is not None  # noqa: S101 - the pair started it
    agent = end.agent.process.pid
    processes = end.processes()
    state = end.host.paths.state
    files = [path for path in state.rglob("*") if path.is_file()]
    kept = [path for path in files if path.relative_to(state).parts[0] in {"receipts", "log"}]
    launchers = [pid for pid in processes if process_name(pid).startswith("sealane-launch")]
    return Sample(
        host=end.name,
        moves=moves,
        descriptors=len([each for each in end.descriptors() if each != "anon_inode:[pidfd]"]),
        threads=_status(agent, "Threads"),
        rss_bytes=_status(agent, "VmRSS") * 1024,
        launcher_rss_bytes=sum(_status(pid, "VmRSS") * 1024 for pid in launchers),
        processes=len(processes) - _qemus(end),
        files=len(files) - len(kept),
        receipts=len([path for path in kept if path.suffix == ".dsse"]),
        journal_bytes=sum(_size(path) for path in files if path.name.startswith(end.host.paths.database.name)),
    )


def _status(pid: int, name: str) -> int:
    """A number of proc_pid_status(5); 0 where the process is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _qemus(end: AgentHost) -> int:
    count = 0
    for pid in end.processes():
        with suppress(OSError):
            count += "qemu-system" in os.readlink(f"/proc/{pid}/exe")
    return count


def _enclaves(end: AgentHost) -> list[int]:
    return [pid for pid in end.processes() if process_name(pid) == "sealane-enclave"]


@contextmanager
def make_soak(story: Story) -> Iterator[Soak]:
    """Two hosts joined by wiretaps, agents up, the guest awake on the first."""
    with ExitStack() as stack:
        pair = stack.enter_context(make_pair(settings=_SETTINGS))
        taps = []
        for near, far in ((pair.a, pair.b), (pair.b, pair.a)):
            tap = stack.enter_context(Wiretap((far.host.address, far.host.port), host=near.host))
            taps.append(tap)
            near.trust(far, address=tap.address[0], port=tap.address[1])
        guest = pair.add_guest(hardware=HARDWARE, workload=WORKLOAD)
        pair.start_guest(guest, pair.a)
        yield Soak(pair, guest, taps, story)


def run(story: Story, moves: int, *, every: int, minutes: float) -> None:
    """Up to `moves` moves, no longer than `minutes`; measures after each `every`."""
    begun = time.monotonic()
    with make_soak(story) as soak:
        try:
            while story.moves < moves and time.monotonic() < begun + minutes * 60:
                ending = soak.move()
                if story.moves % every == 0:
                    soak.measure()
                print(f"{story.moves:4} {time.monotonic() - begun:7.1f} s  {ending}", file=sys.stderr, flush=True)
            soak.judge()
        except (RigError, SealaneError, OSError) as error:
            story.problems.append(f"after {story.moves} moves: {type(error).__name__}: {error}"[:1500])
    story.total_s = time.monotonic() - begun


def page(story: Story) -> str:
    """What came of it, as Markdown."""
    lines = [
        f"{story.moves} moves in {story.total_s:.0f} s, seed {story.seed}. The guest lived {story.ticks} ticks, each once, and "
        f"compared all of its memory {story.checks} times."
        if not story.problems
        else f"{story.moves} moves in {story.total_s:.0f} s, seed {story.seed}; failed: {'; '.join(story.problems)}",
        "",
        "| disturbed: ended | moves |",
        "| --- | --- |",
        *(f"| {ending} | {count} |" for ending, count in Counter(story.endings).most_common()),
        "",
        "| host | after moves | descriptors | threads | agent's memory | launcher's | processes | files | receipts | journal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    chosen = sorted({each.moves for each in story.samples})
    shown = {chosen[len(chosen) * part // 6] for part in range(6)} | {chosen[-1]} if chosen else set()
    for each in sorted(
        (each for each in story.samples if each.moves in shown), key=lambda each: (each.host, each.moves)
    ):
        lines.append(
            f"| {each.host} | {each.moves} | {each.descriptors} | {each.threads} | {each.rss_bytes / 1e6:.1f} MB | "
            f"{each.launcher_rss_bytes / 1e6:.1f} MB | {each.processes} | {each.files} | {each.receipts} | "
            f"{each.journal_bytes / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def main() -> int:
    """Move, measure, tell; 0 where everything held."""
    parser = argparse.ArgumentParser(prog="./run soak", description=__doc__)
    parser.add_argument("--moves", type=int, default=500, help="how many moves [500]")
    parser.add_argument("--seed", type=int, default=1, help="draws the disturbances and their moments [1]")
    parser.add_argument("--every", type=int, default=10, help="moves between two measurements [10]")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no move after so long [600]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    arguments = parser.parse_args()
    story = Story(arguments.seed)
    try:
        run(story, arguments.moves, every=arguments.every, minutes=arguments.minutes)
    finally:
        if arguments.json:
            arguments.json.write_text(story.as_json())
    print(page(story))
    print(f"\n{find_qemu()}")
    return 1 if story.problems else 0


if __name__ == "__main__":
    sys.exit(main())
