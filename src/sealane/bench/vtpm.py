"""`./run bench vtpm`: what the protection of a VM's own TPM costs.

    image       the files: a TPM command that writes them, and the TPM's start from them; in clear, under a key, and kept by
                Sealane, which notes each write beside the TPM's next command
    operations  the seed's four, of the permanent and the volatile state: each alone, and as QEMU meets them at the control
                channel when it reads a state (tpm_state_read, volatile_state_enc) and brings one (volatile_state_dec,
                tpm_state_write): swtpm in clear, swtpm with --migration-key, Sealane's keeper with an enclave's part
    total       VMs moved to and fro through Sealane's lanes over a line of 1 Gb/s, their TPM an swtpm in clear, one with swtpm's
                own encryption of files and state, or Sealane's; total time and downtime as the source sees them

Means with their standard deviation, and medians. Goals: total at most 1.5 % over no protection (the seed's own figure), downtime
at most 20 ms more. Hosts of `total` have no TPM: the files' keys are in files.
"""

import argparse
import json
import math
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

from sealane.bench.line import limit_line
from sealane.bench.turns import in_turn
from sealane.bench.verdicts import interval
from sealane.crypto.aead import KEY_BYTES
from sealane.enclave.vtpm import VtpmStates
from sealane.errors import SealaneError
from sealane.host.models import VmDefinition
from sealane.testing.hosts import BackgroundProcess
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair
from sealane.testing.problems import RigError
from sealane.vtpm.control import BlobType, Command, ControlChannel
from sealane.vtpm.envelope import Journey, StateSealer
from sealane.vtpm.keeper import call_keeper
from sealane.vtpm.launcher import KeeperLauncher
from sealane.vtpm.order import Order
from sealane.vtpm.record import Records
from sealane.vtpm.swtpm import ANSWER_TIMEOUT_S, STATE_FILE, Swtpm, manufacture

Way = Literal["none", "swtpm", "sealane"]
WAYS: Final[tuple[Way, ...]] = ("none", "swtpm", "sealane")
TOTAL_GOAL_PERCENT: Final = 1.5
DOWNTIME_GOAL_MS: Final = 20.0
_STARTUP: Final = bytes.fromhex("80010000000c000001440000")
# TPM2_NV_DefineSpace of a counter at 0x01500001 under the owner, and TPM2_NV_Increment of it, both without a password
_DEFINE: Final = bytes.fromhex(
    "80020000002d0000012a40000001000000094000000900000000000000000e01500001000b0204001400000008"
)
_INCREMENT: Final = bytes.fromhex("80020000001f00000134015000010150000100000009400000090000000000")
_STATES: Final = (BlobType.PERMANENT, BlobType.VOLATILE)
_JOURNEY: Final = Journey("bench", 0, bytes(16))


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="./run bench vtpm", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="moves of each VM in each way (20)")
    parser.add_argument("--vms", type=int, default=5, help="how many VMs, one after another (5)")
    parser.add_argument("--times", type=int, default=100, help="how often each operation is done (100)")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="each guest's memory (512)")
    parser.add_argument("--fill", type=int, default=256, metavar="MIB", help="incompressible data in it (256)")
    parser.add_argument(
        "--rate", type=int, default=1000, metavar="MBIT", help="the line between the hosts, Mb/s; 0: loopback (1000)"
    )
    parser.add_argument("--json", type=Path, help="write all figures here too")
    options = parser.parse_args(argv)
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="sl-") as directory:
        image = manufacture(_fresh(Path(directory) / "made"))
        figures["image, us"] = measure_image(image, Path(directory), options.times)
        figures["operations, us"] = measure_operations(image, Path(directory), options.times)
    for name, unit in figures.items():
        print_table(name, unit)
    if options.runs and options.vms:
        moves = measure_moves(options.vms, options.runs, options.memory, options.fill, options.rate)
        print_table("total, ms", moves)
        print_goals(moves)
        figures["total, ms"] = moves
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def print_table(name: str, rows: dict[str, list[float]]) -> None:
    """One line a row: mean, spread, median."""
    print(f"\n{name:42} {'mean':>9} {'+-':>8} {'median':>9} {'n':>4}")
    for label, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(
            f"  {label:40} {statistics.mean(values):9.1f} {spread:8.1f} {statistics.median(values):9.1f} {len(values):4}"
        )


def print_goals(moves: dict[str, list[float]]) -> None:
    """What each protection adds to none, and by how much Sealane falls short of the goals, if it does.

    Once of the means, with the standard error of their difference; once of the differences within a round, the middle one and the
    interval that has the true one with 99 %. What is less than these was not measured.
    """
    print("\nadded to no protection (means, one standard error)")
    for way in WAYS[1:]:
        none, total = moves["none, total"], moves[f"{way}, total"]
        down_none, down = moves["none, downtime"], moves[f"{way}, downtime"]
        unprotected = statistics.mean(none)
        percent = 100 * (statistics.mean(total) / unprotected - 1)
        late = statistics.mean(down) - statistics.mean(down_none)
        errors = f"+-{100 * standard_error(total, none) / unprotected:.1f}", f"+-{standard_error(down, down_none):.1f}"
        _print_added(way, (percent, errors[0]), (late, errors[1]))
    print("\nadded to no protection in the same round (the middle, its 99 %)")
    for way in WAYS[1:]:
        percents = [
            100 * (one / other - 1) for one, other in zip(moves[f"{way}, total"], moves["none, total"], strict=True)
        ]
        later = [one - other for one, other in zip(moves[f"{way}, downtime"], moves["none, downtime"], strict=True)]
        _print_added(way, *((statistics.median(values), _interval_of(values)) for values in (percents, later)))


def _interval_of(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"({low:+.1f} to {high:+.1f})"


def _print_added(way: str, total: tuple[float, str], downtime: tuple[float, str]) -> None:
    """Percent of the total time and ms of downtime, each with how sure it is; Sealane's beside their goals."""
    words = ""
    if way == "sealane":
        words = f"   {_judged(total[0], TOTAL_GOAL_PERCENT, '%')}; {_judged(downtime[0], DOWNTIME_GOAL_MS, ' ms')}"
    print(f"  {way:8} total {total[0]:+.1f}% {total[1]}   downtime {downtime[0]:+.1f} ms {downtime[1]}{words}")


def standard_error(one: Sequence[float], other: Sequence[float]) -> float:
    """Of the difference of their means; 0.0 where one of them has fewer than two values."""
    if min(len(one), len(other)) < 2:
        return 0.0
    return math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))


def _judged(value: float, goal: float, unit: str) -> str:
    """A figure beside its goal."""
    short = f"MISSED by {value - goal:+.1f}{unit}" if value > goal else "met"
    return f"goal at most {goal:+.1f}{unit}: {short}"


def _fresh(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def _timed(times: int, work: Callable[..., object], *arguments: Any) -> list[float]:
    """Microseconds of each of so many calls."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work(*arguments)
        found.append((time.perf_counter() - began) * 1e6)
    return found


# ---- image


def measure_image(image: bytes, directory: Path, times: int) -> dict[str, list[float]]:
    """Writing (an NV counter's increment) and reading (the TPM's start), in clear and under a key."""
    rows = {}
    for name, key in (("in clear", None), ("under a key", os.urandom(KEY_BYTES))):
        swtpm = Swtpm(_fresh(directory / name.replace(" ", "-")), key)
        try:
            with _started(swtpm, image) as tpm:
                tpm(_DEFINE)
                rows[f"write, {name}"] = _timed(times, tpm, _INCREMENT)
                rows[f"read, {name}"] = _timed(times, _restart, swtpm.control)
        finally:
            swtpm.stop()
    with _kept(image, directory / "image-sealane") as (control, _admin):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            control.command(Command.SET_DATAFD, descriptors=[theirs.fileno()])
            control.start()
            tpm = _commands(ours)
            tpm(_STARTUP)
            tpm(_DEFINE)
            rows["write, Sealane"] = _timed(times, tpm, _INCREMENT)
            rows["read, Sealane"] = _timed(times, _restart, control)
    return rows


def _restart(control: ControlChannel) -> None:
    control.command(Command.STOP)
    control.start()


@contextmanager
def _started(swtpm: Swtpm, image: bytes) -> Iterator[Callable[[bytes], None]]:
    """A TPM with this image's state, started up; what sends it commands that must succeed."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / STATE_FILE).write_bytes(image)
        reader = Swtpm(Path(scratch), None)
        reader.control.start()
        state = reader.control.tpm_state_read(BlobType.PERMANENT)
        reader.stop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        swtpm.control.tpm_state_write(BlobType.PERMANENT, state)
        swtpm.control.command(Command.SET_DATAFD, descriptors=[theirs.fileno()])
        swtpm.control.start()
        tpm = _commands(ours)
        tpm(_STARTUP)
        yield tpm


def _commands(connection: socket.socket) -> Callable[[bytes], None]:
    def tpm(command: bytes) -> None:
        connection.sendall(command)
        answer = connection.recv(4096)
        if int.from_bytes(answer[6:10], "big"):
            raise RigError(f"TPM command {command[6:10].hex()}: {answer.hex()}")

    return tpm


# ---- operations


def measure_operations(image: bytes, directory: Path, times: int) -> dict[str, list[float]]:
    """The four, alone and as QEMU meets them."""
    rows: dict[str, list[float]] = {}
    plain = Swtpm(_fresh(directory / "operations"), None)
    try:
        with _started(plain, image):
            states = {each: plain.control.tpm_state_read(each) for each in _STATES}
            _measure_alone(rows, plain, states, times)
    finally:
        plain.stop()
    for name, key in (("in clear", None), ("swtpm's key", os.urandom(KEY_BYTES))):
        swtpm = Swtpm(_fresh(directory / ("clear" if key is None else "own")), None, migration_key=key)
        try:
            with _started(swtpm, image):
                _measure_channel(rows, name, swtpm.control, swtpm.control, times)
        finally:
            swtpm.stop()
    with (
        _kept(image, directory / "here") as (here, admin),
        _enclave(admin, is_source=True),
        _kept(None, directory / "there") as (there, other),
        _enclave(other, is_source=False),
    ):
        here.start()
        _measure_channel(rows, "Sealane", here, there, times)
    return rows


def _measure_channel(
    rows: dict[str, list[float]],
    name: str,
    source: ControlChannel,
    destination: ControlChannel,
    times: int,
) -> None:
    """QEMU's two parts at the control channels of both ends, which may be one."""
    states = {each: source.tpm_state_read(each) for each in _STATES}
    for each in states:
        rows[f"QEMU reads {each.name.lower()}, {name}"] = _timed(times, source.tpm_state_read, each)
    if destination is source:
        source.command(Command.STOP)
    for each, state in states.items():
        rows[f"QEMU brings {each.name.lower()}, {name}"] = _timed(times, destination.tpm_state_write, each, state)


def _measure_alone(rows: dict[str, list[float]], swtpm: Swtpm, states: dict[BlobType, bytes], times: int) -> None:
    sealer = StateSealer(bytes(32), _JOURNEY, os.urandom)
    for each, state in states.items():
        name, sealed = f"{each.name.lower()}, {len(state)} B", sealer.volatile_state_enc(each, state)

        rows[f"tpm_state_read, {name}"] = _timed(times, swtpm.control.tpm_state_read, each)
        rows[f"volatile_state_enc, {name}"] = _timed(times, sealer.volatile_state_enc, each, state)
        rows[f"volatile_state_dec, {name}"] = _timed(times, sealer.volatile_state_dec, each, sealed)
    swtpm.control.command(Command.STOP)
    for each, state in states.items():
        name = f"tpm_state_write, {each.name.lower()}, {len(state)} B"
        rows[name] = _timed(times, swtpm.control.tpm_state_write, each, state)
    swtpm.control.start()


@contextmanager
def _kept(image: bytes | None, root: Path) -> Iterator[tuple[ControlChannel, Path]]:
    """QEMU's side of a keeper of this TPM (None: of one that is to come), and the agent's socket."""
    (_fresh(_fresh(root) / "files") / STATE_FILE).write_bytes(image or b"")
    order = Order(
        vm="bench", how="adopt" if image else "receive", epoch=0, storage=str(root / "files"),
        records=str(root / "records"), scratch=str(root / "scratch"), control_path=str(root / "c"),
        admin_path=str(root / "a"), tcti=None,
    )  # fmt: skip
    launcher = KeeperLauncher()
    launcher.launch(order, 2)
    launcher.stop()
    admin = Path(order.admin_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as qemu:
        qemu.connect(order.control_path)
        try:
            yield ControlChannel(qemu, ANSWER_TIMEOUT_S), admin
        finally:
            call_keeper(admin, "stop")
            with Records(root / "records").locked(order.vm, wait=True):
                pass  # it has ended


@contextmanager
def _enclave(admin: Path, *, is_source: bool) -> Iterator[None]:
    """An enclave's part in a thread of this process."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            call_keeper(admin, "link", descriptors=[theirs.fileno()])
        states = VtpmStates(ours, StateSealer(bytes(32), _JOURNEY, os.urandom), is_source=is_source)
        ours.settimeout(None)
        enclave = threading.Thread(target=_serve, args=[states], daemon=True)
        enclave.start()
        try:
            yield
        finally:
            call_keeper(admin, "unlink")
            enclave.join()


def _serve(states: VtpmStates) -> None:
    with suppress(SealaneError, OSError):
        while states.serve():
            pass
    states.close()


# ---- whole moves


class _OwnSwtpms:
    """swtpm as its manual has it, at both hosts, with and without its own encryption."""

    def __init__(self, guest: Guest, key_file: Path | None) -> None:
        self._guest, self._key_file, self._count = guest, key_file, 0

    def start(self, end: AgentHost) -> BackgroundProcess:
        """One for the QEMU that comes next at this host."""
        self._count += 1
        control = end.host.paths.run / "vtpm" / f"{self._guest.name}.sock"
        control.parent.mkdir(exist_ok=True)
        control.unlink(missing_ok=True)
        state = _fresh(end.host.scratch / f"own-{self._guest.name}-{self._count}")
        if self._count == 1:
            manufacture(state)
        words = ["--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
        if self._key_file is not None:
            option = f"file={self._key_file},format=binary,mode=aes-256-cbc"
            words += ["--migration-key", option]
            words += ["--key", option] if self._count > 1 else []  # what was just made lies there in clear
        process = end.host.start("swtpm", "socket", "--tpm2", "--terminate", *words)
        process.wait_until(control.exists, "its control channel")
        return process


def measure_moves(vms: int, runs: int, memory_mib: int, fill_mib: int, mbit: int) -> dict[str, list[float]]:
    """Total and downtime of every way over a line of `mbit` Mb/s, or loopback (0); the ways take turns within each run."""
    rows: dict[str, list[float]] = {f"{way}, {what}": [] for way in WAYS for what in ("total", "downtime")}
    with make_pair(network="netns" if mbit else "loopback") as pair:
        if mbit:
            limit_line(pair, mbit)
        key_file = pair.a.host.scratch / "swtpm.key"
        key_file.write_bytes(os.urandom(KEY_BYTES))
        for number in range(vms):
            movers = [_Mover(pair, way, number, memory_mib, fill_mib, key_file) for way in WAYS]
            for run in range(runs + 1):
                for mover in in_turn(movers, run):
                    total, downtime = mover.move()
                    if run:  # the first warms caches
                        rows[f"{mover.way}, total"].append(total)
                        rows[f"{mover.way}, downtime"].append(downtime)
            for mover in movers:
                mover.stop()
    return rows


class _Mover:
    """One VM with a TPM kept in one way."""

    def __init__(self, pair: HostPair, way: Way, number: int, memory_mib: int, fill_mib: int, key_file: Path) -> None:
        self.way, self._pair, self._ends = way, pair, (pair.a, pair.b)
        hardware = Hardware(memory_mib=memory_mib)
        workload = Workload(fill_mib=fill_mib, tick_ms=1000, tpm_secret="bench")  # noqa: S106 - nobody's
        self._guest = pair.add_guest(f"{way}{number}", hardware=hardware, workload=workload, vtpm=True)
        self._own = None if way == "sealane" else _OwnSwtpms(self._guest, key_file if way == "swtpm" else None)
        if self._own is None:
            with pair.a.client() as client:
                client.start_vtpm(self._guest.name)
        else:
            for end in self._ends:
                _without_vtpm(end, self._guest.name)
            self._own.start(pair.a)
        pair.start_guest(self._guest, pair.a, warm=False)

    def move(self) -> tuple[float, float]:
        """Total and downtime in ms."""
        source, destination = self._ends
        if self._own is not None:
            self._own.start(destination)
        done = self._pair.migrate(self._guest, source, destination, multifd_channels=0)
        if done.result is None or done.result.downtime_ms is None:
            raise RigError(f"{self.way}: {done.problem}")
        self._ends = destination, source
        return done.result.total_ms, done.result.downtime_ms

    def stop(self) -> None:
        """End the VM, wherever its QEMU is."""
        for end in self._ends:
            with suppress(RigError, OSError), self._guest.machines[end.name].observe() as monitor:
                monitor.execute("quit")


def _without_vtpm(end: AgentHost, name: str) -> None:
    with end.client() as client:
        known = next(vm for vm in client.vms() if vm.name == name)
        client.remove_vm(name)
        client.add_vm(VmDefinition(name=name, qmp=known.qmp, launch_incoming=known.launch_incoming))
