"""The ways to move one guest between two hosts that the benches compare: QEMU by itself and Sealane, with their options.

All are timed the same way, from outside: from the `migrate` command at the source's QEMU (Sealane: from what its agent
reports) to the RESUME event of the destination's QEMU; downtime is from the source's STOP to the destination's RESUME.
"""

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from sealane.bench.meter import Meter, wall_s
from sealane.testing.machine import GuestMachine
from sealane.testing.pair import AgentHost, Guest, HostPair
from sealane.testing.problems import RigError
from sealane.testing.qmp import Qmp

Way: TypeAlias = Literal["plain", "tls", "sealane"]
WAYS: Final[tuple[Way, ...]] = ("plain", "tls", "sealane")
Compression: TypeAlias = Literal["none", "zstd"]
_WAIT_S: Final = 120.0
_UNBOUNDED: Final = 1 << 43
PLAIN_PORT: Final = 48300
_LOOK_EVERY_S: Final = 0.02


@dataclass(frozen=True)
class Method:
    """One way to move a guest: QEMU by itself, or Sealane where `options` (of a migration's request) are given.

    With `through`, QEMU's source is told that URI: a tunnel to where the destination's QEMU waits, which is PLAIN_PORT there.
    """

    name: str
    channels: int = 0
    tls: bool = False
    compression: Compression = "none"
    options: Mapping[str, object] | None = None
    converge_s: float = 120.0
    through: str = ""


@dataclass
class Run:
    """One move. Times in milliseconds, CPU in core-seconds by process, peak memory in bytes by process.

    `bytes_sent` is what QEMU or Sealane says, without TCP's and TLS's own. `completed` is false where the guest wrote too
    fast: then it still runs at the source.
    """

    way: str
    channels: int
    total_ms: float
    downtime_ms: float
    bytes_sent: int
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: dict[str, int] = field(default_factory=dict)
    whole_ms: float | None = None
    iterations: int = 0
    completed: bool = True


class EventWatch:
    """Waits in a thread for one QMP event on a monitor that may not be there yet."""

    def __init__(self, path: Path, event: str) -> None:
        self._path, self._event = path, event
        self.stamp_s: float | None = None
        self._monitor: Qmp | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not self._path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            with Qmp(self._path, timeout_s=_WAIT_S) as self._monitor:
                event = self._monitor.wait_event(self._event)
        except RigError:
            return  # `result` says so
        stamp = event["timestamp"]
        self.stamp_s = stamp["seconds"] + stamp["microseconds"] / 1e6

    def give_up(self) -> None:
        """Stop waiting, and leave the monitor to others."""
        if self._monitor is not None:
            self._monitor.interrupt()
        self._thread.join(_WAIT_S)

    def result(self) -> float:
        """When it happened, on the wall clock."""
        self._thread.join(_WAIT_S)
        if self.stamp_s is None:
            raise RigError(f"no {self._event} on {self._path.name}")
        return self.stamp_s


def move(pair: HostPair, guest: Guest, source: AgentHost, destination: AgentHost, method: Method) -> Run:
    """Move the guest and measure; raises RigError where it does not arrive, unless it was given up for its writing."""
    there, here = guest.machines[source.name], guest.machines[destination.name]
    here.observer_path.unlink(missing_ok=True)
    began = time.monotonic()
    if method.options is None:
        here.start_incoming()
    stopped = EventWatch(there.observer_path, "STOP")
    resumed = EventWatch(here.observer_path, "RESUME")
    with Meter() as meter:
        meter.watch("qemu source", _pid_on(there.qmp_path))
        if method.options is not None:
            run = _move_sealed(pair, guest, source, destination, method, meter)
        else:
            run = _move_plainly(guest, source, destination, method, meter)
        if run.completed:
            ended = resumed.result()
            run.whole_ms = (time.monotonic() - began) * 1e3
            if run.total_ms < 0:  # a start on the wall clock, to be measured against the event
                run.total_ms = ended * 1e3 + run.total_ms
            run.downtime_ms = (ended - stopped.result()) * 1e3
        else:
            stopped.give_up()
            resumed.give_up()
    run.cpu_s.update({name: round(usage.cpu_s, 3) for name, usage in meter.usages.items()})
    run.peak_rss_bytes.update({name: usage.peak_rss_bytes for name, usage in meter.usages.items()})
    return run


def _pid_on(path: Path) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _command_has(entry, str(path)):
            return int(entry.name)
    raise RigError(f"no QEMU has {path.name}")


def _command_has(process: Path, word: str) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return "qemu" in words[0] and any(word in each for each in words)


def _move_sealed(
    pair: HostPair, guest: Guest, source: AgentHost, destination: AgentHost, method: Method, meter: Meter
) -> Run:
    for end in (source, destination):
        if end.agent is not None:
            meter.watch(f"agent {'source' if end is source else 'destination'}", end.agent.process.pid)
    born = threading.Thread(target=_watch_newborn, args=(meter, guest.machines[destination.name].qmp_path), daemon=True)
    born.start()
    options = {"multifd_channels": method.channels, **(method.options or {})}
    patience = threading.Timer(method.converge_s, _cancel_all, (source,))
    patience.daemon = True
    patience.start()
    ended = pair.migrate(guest, source, destination, **options)
    patience.cancel()
    born.join()
    if ended.state == "aborted" and ended.problem is not None and ended.problem.code == "migration.cancelled":
        return Run(
            method.name,
            method.channels,
            method.converge_s * 1e3,
            0.0,
            ended.progress.bytes_wire,
            iterations=ended.progress.iteration,
            completed=False,
        )
    if ended.state != "completed" or ended.result is None or ended.result.copy_ms is None:
        raise RigError(f"Sealane did not move the guest: {ended.problem}")
    other = pair.await_end(destination, ended.id).result
    run = Run(method.name, method.channels, ended.result.copy_ms, 0.0, ended.result.bytes_wire)
    run.iterations = ended.progress.iteration
    for name, result in (("enclave source", ended.result), ("enclave destination", other)):
        if result is None or result.enclave_cpu_s is None or result.enclave_peak_rss_bytes is None:
            raise RigError(f"{name} did not say what it cost")
        run.cpu_s[name] = round(result.enclave_cpu_s, 3)
        run.peak_rss_bytes[name] = result.enclave_peak_rss_bytes
    return run


def _cancel_all(end: AgentHost) -> None:
    with end.client() as client:
        for migration in client.migrations(active=True):
            client.cancel(migration.id)


def _watch_newborn(meter: Meter, qmp: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        try:
            meter.watch("qemu destination", _pid_on(qmp), from_birth=True)
        except RigError:
            time.sleep(0.02)
        else:
            return


def _move_plainly(guest: Guest, source: AgentHost, destination: AgentHost, method: Method, meter: Meter) -> Run:
    there, here = guest.machines[source.name], guest.machines[destination.name]
    meter.watch("qemu destination", here.pid, from_birth=True)
    uri = f"tcp:{destination.host.address}:{PLAIN_PORT}"
    with Qmp(here.qmp_path, timeout_s=_WAIT_S) as receiving, Qmp(there.qmp_path, timeout_s=_WAIT_S) as sending:
        credentials = _with_psk(destination.host.scratch) if method.tls else None
        _configure(receiving, method, credentials, "server")
        _configure(sending, method, credentials, "client")
        receiving.execute("migrate-incoming", uri=uri)
        started = wall_s()
        sending.execute("migrate", uri=method.through or uri)
        status = _await_end(sending, method.converge_s)
        ram = status["ram"]
        run = Run(method.name, method.channels, -started * 1e3, 0.0, int(ram["transferred"]))
        run.iterations = int(ram["dirty-sync-count"])
        if status["status"] != "completed":
            run.completed, run.total_ms = False, (wall_s() - started) * 1e3
            _cancel(sending)
            here.stop()
            return run
        sending.execute("quit")
    _wait_gone(there)
    guest.moved_to(destination.name)
    return run


def _cancel(sending: Qmp) -> None:
    """End the migration; QEMU may call it failed, where the channels broke while it cancelled."""
    sending.execute("migrate_cancel")
    deadline = time.monotonic() + _WAIT_S
    while sending.execute("query-migrate")["status"] not in ("failed", "cancelled"):
        if time.monotonic() > deadline:
            raise RigError("QEMU does not end a migration that was cancelled")
        time.sleep(_LOOK_EVERY_S)


def _await_end(sending: Qmp, converge_s: float) -> dict[str, Any]:
    """How the migration stands when it has ended, or when there was enough time for it."""
    deadline = time.monotonic() + converge_s
    while True:
        status: dict[str, Any] = sending.execute("query-migrate")
        if status["status"] in ("failed", "cancelled"):
            raise RigError(f"QEMU did not move the guest: {status.get('error-desc', 'no reason')}")
        if status["status"] == "completed" or time.monotonic() > deadline:
            return status
        time.sleep(_LOOK_EVERY_S)


def _configure(monitor: Qmp, method: Method, credentials: Path | None, endpoint: str) -> None:
    states = {"events": True, "return-path": True, "multifd": method.channels > 0, "pause-before-switchover": False}
    monitor.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": state} for name, state in states.items()],
    )
    parameters: dict[str, Any] = {"max-bandwidth": _UNBOUNDED, "tls-creds": "", "tls-hostname": ""}
    if method.channels:
        parameters |= {"multifd-channels": method.channels, "multifd-compression": method.compression}
    if credentials is not None:
        name = f"psk{secrets.token_hex(4)}"
        monitor.execute("object-add", qom_type="tls-creds-psk", id=name, dir=str(credentials), endpoint=endpoint)
        parameters["tls-creds"] = name
    monitor.execute("migrate-set-parameters", **parameters)


def _with_psk(directory: Path) -> Path:
    """A directory with a key that both ends read (QEMU docs, system/tls)."""
    path = directory / "keys.psk"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(f"qemu:{secrets.token_hex(32)}\n")
    return directory


def _wait_gone(machine: GuestMachine) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        try:
            _pid_on(machine.qmp_path)
        except RigError:
            if not machine.is_running:
                return
        time.sleep(0.01)
    raise RigError(f"QEMU on {machine.qmp_path.name} did not end")
