"""The director of a fault campaign: agents stand still at their points and it decides what happens to them there.

It is the other end of `faultpoints.py`: one thread for each agent that connects. Names of points gain the role of the
host that reached them and, from the second time in one attempt on, a number: `destination:journal:handing-over:before`,
`source:step:copying:failed#2`. Before it stands the trip's prefix (`trips.py`).
"""

import json
import os
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, get_args

from sealane.errors import SealaneError
from sealane.testing.pair import AgentHost, process_name
from sealane.testing.problems import RigError
from sealane.testing.trips import PRECOPY, Trip
from sealane.testing.wiretap import Wiretap
from sealane.vtpm.launcher import KEEPER_NAME

Fault = Literal[
    "kill-agent",  # SIGKILL; it is started again at once
    "term-agent",  # SIGTERM; it is started again when it has ended
    "kill-enclave",  # this agent's enclaves
    "kill-qemu",  # the QEMU on this host
    "kill-host",  # agent, enclaves and QEMU of this host at once, as when its power fails
    "cut-link",  # every connection between the hosts breaks, and none is let through until both ends have ended (*)
    "disk-full",  # every entry of this agent's journal fails from here on, until both ends have ended (*)
    "disk-full-once",  # this one entry fails
    "clock-forward",  # this agent's wall clock jumps by an hour
    "clock-back",
    "cancel",  # a person cancels the migration at the source
]
# (*) or, in a postcopy, which cannot end so, until an end has said for some seconds that the halves are parted
FAULTS: Final[tuple[Fault, ...]] = get_args(Fault)
TpmFault = Literal["kill-keeper", "kill-swtpm"]  # of VMs' own TPMs on this host; the campaign's guest has none
CLOCK_JUMPS_S: Final[dict[str, float]] = {"clock-forward": 3600.0, "clock-back": -3600.0}
_KILLED_WITHIN_S: Final = 10.0
TPM_PROCESSES: Final[dict[str, str]] = {"kill-keeper": KEEPER_NAME, "kill-swtpm": "swtpm"}
# What ends the process that holds a copy of the VM; a VM that ran in it is lost, as it would be without Sealane.
KILLS_QEMU: Final[frozenset[Fault]] = frozenset({"kill-qemu", "kill-host"})


@dataclass(frozen=True)
class Injection:
    """One fault at one point."""

    point: str
    fault: Fault | TpmFault

    def __str__(self) -> str:
        return f"{self.fault} at {self.point}"


@dataclass
class Attempt:
    """What the director knows of one attempt: who is who, what shall happen, what did."""

    source: AgentHost
    destination: AgentHost
    waiting: list[Injection]
    trip: Trip = PRECOPY
    trace: list[str] = field(default_factory=list)
    fired: list[Injection] = field(default_factory=list)
    fired_at: float = 0.0
    traced_when_fired: int = 0
    killed: set[str] = field(default_factory=set)
    full: set[str] = field(default_factory=set)
    clocks_s: dict[str, float] = field(default_factory=dict)
    is_cut: bool = False
    traced_when_cut: int | None = None  # by the trip itself
    _counts: Counter[str] = field(default_factory=Counter)

    def name(self, end: AgentHost, point: str) -> str:
        """The point's full name, counted."""
        prefix = self.trip.prefix if self.traced_when_cut is None else self.trip.prefix_after_cut
        name = f"{prefix}{'source' if end is self.source else 'destination'}:{point}"
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}#{self._counts[name]}"


class FaultDirector:
    """Listens on `path`; `attempt` says which faults to inject while it lasts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ends: list[AgentHost] = []
        self.taps: list[Wiretap] = []
        self._attempt: Attempt | None = None
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._accept, name="fault director", daemon=True)

    def __enter__(self) -> "FaultDirector":
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    @contextmanager
    def attempt(
        self, source: AgentHost, destination: AgentHost, injections: list[Injection], trip: Trip = PRECOPY
    ) -> Iterator[Attempt]:
        """Inject these faults, each once and in their order, until the context ends; then everything is mended."""
        attempt = Attempt(source, destination, list(injections), trip)
        with self._lock:
            self._attempt = attempt
        try:
            yield attempt
        finally:
            with self._lock:
                self._attempt = None
            for tap in self.taps:
                tap.mend()

    def relieve(self, attempt: Attempt) -> None:
        """Make the line whole and the disks free again."""
        with self._lock:
            attempt.is_cut = False
            attempt.full.clear()
            for tap in self.taps:
                tap.mend()

    def _cut(self, attempt: Attempt) -> None:
        attempt.is_cut = True
        for tap in self.taps:
            tap.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[connection], name="points of an agent", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rw") as file:
            for line in file:
                with self._lock:
                    answer = self._answer(json.loads(line))
                file.write(json.dumps(answer) + "\n")
                file.flush()

    def _answer(self, told: dict[str, Any]) -> dict[str, Any]:
        attempt = self._attempt
        end = next((end for end in self.ends if str(end.host.paths.run) == told["run"]), None)
        if attempt is None or end is None:
            return {}
        name = attempt.name(end, told["point"])
        attempt.trace.append(name)
        if name == attempt.trip.cut_at and attempt.traced_when_cut is None:
            self._cut(attempt)
            attempt.traced_when_cut = len(attempt.trace)
        once = False
        while attempt.waiting and attempt.waiting[0].point == name:
            injection = attempt.waiting.pop(0)
            once = once or injection.fault == "disk-full-once"
            self._inject(attempt, end, injection.fault, told["enclaves"])
            attempt.fired.append(injection)
            attempt.fired_at, attempt.traced_when_fired = time.monotonic(), len(attempt.trace)
        is_full = once or end.name in attempt.full
        return {"disk": "full" if is_full else "free", "clock_s": attempt.clocks_s.get(end.name, 0.0)}

    def _inject(self, attempt: Attempt, end: AgentHost, fault: Fault | TpmFault, enclaves: list[int]) -> None:
        if fault in {"kill-agent", "kill-host", "term-agent"}:
            assert end.agent is not None  # noqa: S101 - it is speaking to us
            end.agent.process.terminate() if fault == "term-agent" else end.agent.process.kill()
            attempt.killed.add(end.name)
        for pid in _victims(end, fault, enclaves):
            _kill(pid)
        if fault == "cut-link":
            self._cut(attempt)
        if fault == "disk-full":
            attempt.full.add(end.name)
        if fault in CLOCK_JUMPS_S:
            attempt.clocks_s[end.name] = CLOCK_JUMPS_S[fault]
        if fault == "cancel":  # the agent may be the one that stands still now, so nobody waits here
            threading.Thread(target=_cancel, args=[attempt.source], name="cancel", daemon=True).start()


def _victims(end: AgentHost, fault: Fault | TpmFault, enclaves: list[int]) -> list[int]:
    """The processes, other than the agent, that this fault ends."""
    found = list(enclaves) if fault in {"kill-enclave", "kill-host"} else []
    if fault in KILLS_QEMU:
        found += qemus_of(end)
    if fault in TPM_PROCESSES:
        found += [pid for pid in end.host.processes() if process_name(pid) == TPM_PROCESSES[fault]]
    return found


def qemus_of(end: AgentHost) -> list[int]:
    """The QEMU processes of this host."""
    found = []
    for pid in end.host.processes():
        with suppress(OSError):
            if "qemu-system" in os.readlink(f"/proc/{pid}/exe"):
                found.append(pid)
    return found


def _cancel(source: AgentHost) -> None:
    with suppress(SealaneError), source.client() as client:
        for migration in client.migrations(active=True):
            client.cancel(migration.id)


def _kill(pid: int) -> None:
    """The process has ended when this returns: one that writes to a disk ends only once it has written."""
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            if not select.select([process], [], [], _KILLED_WITHIN_S)[0]:
                raise RigError(f"process {pid} was killed, and did not end within {_KILLED_WITHIN_S:g} s")
        finally:
            os.close(process)
