"""The ways to move one guest between two hosts that the bench compares: QEMU plain, QEMU with TLS, Sealane.

All are timed the same way, from outside: from the `migrate` command at the source's QEMU (Sealane: from what its agent
reports) to the RESUME event of the destination's QEMU; downtime is from the source's STOP to the destination's RESUME.
"""

import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from sealane.bench.meter import Meter, wall_s
from sealane.testing.pair import AgentHost, Guest, HostPair
from sealane.testing.problems import RigError
from sealane.testing.qmp import Qmp

Way: TypeAlias = Literal["plain", "tls", "sealane"]
WAYS: Final[tuple[Way, ...]] = ("plain", "tls", "sealane")
_WAIT_S: Final = 120.0
_UNBOUNDED: Final = 1 << 43
_PLAIN_PORT: Final = 48300


@dataclass
class Run:
    """One move. Times in milliseconds, CPU in core-seconds by process, peak memory in bytes by process."""

    way: Way
    channels: int
    total_ms: float
    downtime_ms: float
    bytes_sent: int
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: dict[str, int] = field(default_factory=dict)
    whole_ms: float | None = None


class EventWatch:
    """Waits in a thread for one QMP event on a monitor that may not be there yet."""

    def __init__(self, path: Path, event: str) -> None:
        self._path, self._event = path, event
        self.stamp_s: float | None = None
        self.pid = 0
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not self._path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            with Qmp(self._path, timeout_s=_WAIT_S) as monitor:
                event = monitor.wait_event(self._event)
        except RigError:
            return  # `result` says so
        stamp = event["timestamp"]
        self.stamp_s = stamp["seconds"] + stamp["microseconds"] / 1e6

    def result(self) -> float:
        """When it happened, on the wall clock."""
        self._thread.join(_WAIT_S)
        if self.stamp_s is None:
            raise RigError(f"no {self._event} on {self._path.name}")
        return self.stamp_s


def move(pair: HostPair, guest: Guest, source: AgentHost, destination: AgentHost, way: Way, channels: int) -> Run:
    """Move the guest and measure; raises RigError where it does not arrive."""
    there, here = guest.machines[source.name], guest.machines[destination.name]
    here.observer_path.unlink(missing_ok=True)
    began = time.monotonic()
    if way != "sealane":
        here.start_incoming()
    stopped = EventWatch(there.observer_path, "STOP")
    resumed = EventWatch(here.observer_path, "RESUME")
    with Meter() as meter:
        meter.watch("qemu source", _pid_on(there.qmp_path))
        if way == "sealane":
            run = _move_sealed(pair, guest, source, destination, channels, meter)
        else:
            run = _move_plainly(guest, source, destination, way, channels, meter)
        ended = resumed.result()
        run.whole_ms = (time.monotonic() - began) * 1e3
        if run.total_ms < 0:  # a start on the wall clock, to be measured against the event
            run.total_ms = ended * 1e3 + run.total_ms
    run.downtime_ms = (ended - stopped.result()) * 1e3
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
    pair: HostPair, guest: Guest, source: AgentHost, destination: AgentHost, channels: int, meter: Meter
) -> Run:
    for end in (source, destination):
        if end.agent is not None:
            meter.watch(f"agent {'source' if end is source else 'destination'}", end.agent.process.pid)
    born = threading.Thread(target=_watch_newborn, args=(meter, guest.machines[destination.name].qmp_path), daemon=True)
    born.start()
    ended = pair.migrate(guest, source, destination, multifd_channels=channels)
    born.join()
    if ended.state != "completed" or ended.result is None or ended.result.copy_ms is None:
        raise RigError(f"Sealane did not move the guest: {ended.problem}")
    other = pair.await_end(destination, ended.id).result
    run = Run("sealane", channels, ended.result.copy_ms, 0.0, ended.result.bytes_wire)
    for name, result in (("enclave source", ended.result), ("enclave destination", other)):
        if result is None or result.enclave_cpu_s is None or result.enclave_peak_rss_bytes is None:
            raise RigError(f"{name} did not say what it cost")
        run.cpu_s[name] = round(result.enclave_cpu_s, 3)
        run.peak_rss_bytes[name] = result.enclave_peak_rss_bytes
    return run


def _watch_newborn(meter: Meter, qmp: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        try:
            meter.watch("qemu destination", _pid_on(qmp), from_birth=True)
        except RigError:
            time.sleep(0.02)
        else:
            return


def _move_plainly(
    guest: Guest, source: AgentHost, destination: AgentHost, way: Way, channels: int, meter: Meter
) -> Run:
    there, here = guest.machines[source.name], guest.machines[destination.name]
    meter.watch("qemu destination", here.pid, from_birth=True)
    uri = f"tcp:{destination.host.address}:{_PLAIN_PORT}"
    with Qmp(here.qmp_path, timeout_s=_WAIT_S) as receiving, Qmp(there.qmp_path, timeout_s=_WAIT_S) as sending:
        credentials = _with_psk(destination.host.scratch) if way == "tls" else None
        _configure(receiving, channels, credentials, "server")
        _configure(sending, channels, credentials, "client")
        receiving.execute("migrate-incoming", uri=uri)
        started = wall_s()
        sending.execute("migrate", uri=uri)
        status = sending.wait_migrated(timeout_s=_WAIT_S)
        bytes_sent = int(status["ram"]["transferred"])
        sending.execute("quit")
    _wait_gone(there.qmp_path)
    guest.travelled.append(destination.name)
    return Run(way, channels, -started * 1e3, 0.0, bytes_sent)


def _configure(monitor: Qmp, channels: int, credentials: Path | None, endpoint: str) -> None:
    states = {"events": True, "return-path": True, "multifd": channels > 0, "pause-before-switchover": False}
    monitor.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": state} for name, state in states.items()],
    )
    parameters: dict[str, Any] = {"max-bandwidth": _UNBOUNDED, "tls-creds": "", "tls-hostname": ""}
    if channels:
        parameters["multifd-channels"] = channels
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


def _wait_gone(qmp: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        try:
            _pid_on(qmp)
        except RigError:
            return
        time.sleep(0.01)
    raise RigError(f"QEMU on {qmp.name} did not end")
