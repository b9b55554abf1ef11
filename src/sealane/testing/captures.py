"""Records migration streams of real QEMU, with the source's RAM as truth: `python -m sealane.testing.captures DIR [NAME…]`.

A small guest without an operating system (`dirtier.S`) goes from one QEMU to another over a recorder on unix sockets:

    source QEMU -> recorder (one file for each connection and direction) -> destination QEMU

The truth is read from the stopped source's memory beside the stream: `info ramblock` tells each block's host address (QEMU
8 and later; before, `gpa2hva` tells it for the blocks whose guest address is known), and /proc/PID/mem what stands there.
QEMU before 9.0 loses dirty pages under TCG, so there the guest is stopped before its migration begins.

DIR gets a directory for each scenario: `0-main.zst`, `1-multifd.zst` … in the order in which they were opened,
`return.zst`, and `provenance.json`.
"""

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import zstandard

from sealane.testing.accel import choose_accel
from sealane.testing.problems import RigError
from sealane.testing.qemu import QemuBinary, all_qemus
from sealane.testing.qmp import Qmp

_SOURCE = Path(__file__).parent / "dirtier.S"
_CHUNK = 1 << 18
_TIMEOUT_S = 60.0
# Where blocks begin in the guest, for QEMU without host addresses in `info ramblock`; pc.bios ends at 4 GiB.
_GUEST_ADDRESSES = {"pc.ram": 0, "ram-node0": 0, "tpm-ppi": 0xFED4_5000}


@dataclass(frozen=True)
class Scenario:
    """One capture: what is migrated, and how. `how` is when the guest stops and what happens in between."""

    name: str
    machine: str = "q35"
    memory_mib: int = 32
    pages: int = 512
    options: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    how: Literal["stopped", "running", "postcopy", "back-and-forth"] = "stopped"
    since: tuple[int, int, int] = (0, 0, 0)
    until: tuple[int, int, int] = (99, 0, 0)
    shared_memory: bool = False
    tpm: Literal["", "tpm-tis", "tpm-crb"] = ""

    def fits(self, qemu: QemuBinary) -> bool:
        """Whether this QEMU can do it, and rightly."""
        if not self.since <= qemu.version < self.until:
            return False
        return self.how in ("stopped", "back-and-forth") or qemu.tracks_dirty_pages_under_tcg


_MULTIFD = ("multifd", "return-path")
_TWO = {"multifd-channels": 2}
_NUMA = (
    *("-object", "memory-backend-ram,id=ram-node0,size=16M,x-use-canonical-path-for-ramblock-id=off"),
    *("-object", "memory-backend-ram,id=ram-node1,size=16M,x-use-canonical-path-for-ramblock-id=off"),
    *("-smp", "2", "-numa", "node,nodeid=0,memdev=ram-node0,cpus=0", "-numa", "node,nodeid=1,memdev=ram-node1,cpus=1"),
)
_V8, _V9, _V10 = (8, 0, 0), (9, 0, 0), (10, 0, 0)
SCENARIOS = (
    Scenario("single-q35"),
    Scenario("single-pc", machine="pc", capabilities=("return-path",)),
    Scenario("single-running", how="running", capabilities=("return-path",)),
    Scenario("single-old-type", machine="pc-q35-7.2", how="running", since=_V8),
    Scenario("numa", machine="pc", options=_NUMA),
    Scenario("vtpm", tpm="tpm-tis"),
    Scenario("vtpm-running", tpm="tpm-crb", how="running", capabilities=_MULTIFD, parameters=_TWO),
    Scenario("ignore-shared", capabilities=("x-ignore-shared",), shared_memory=True),
    Scenario("xbzrle", how="running", capabilities=("xbzrle",), since=_V9),
    Scenario("xbzrle", capabilities=("xbzrle",), until=_V9),
    Scenario("compress", capabilities=("compress",), parameters={"compress-threads": 2}, until=_V9),
    Scenario("postcopy-enabled", capabilities=("postcopy-ram",)),
    Scenario("postcopy", how="postcopy", capabilities=("postcopy-ram", "return-path")),
    Scenario("postcopy-preempt", how="postcopy", capabilities=("postcopy-ram", "postcopy-preempt"), since=_V8),
    Scenario("multifd", capabilities=_MULTIFD, parameters=_TWO),
    Scenario("multifd-pc", machine="pc", capabilities=_MULTIFD, parameters=_TWO),
    Scenario("multifd-running", how="running", capabilities=_MULTIFD, parameters=_TWO),
    Scenario(
        "multifd-old-type", machine="pc-q35-7.2", how="running", capabilities=_MULTIFD, parameters=_TWO, since=_V8
    ),
    Scenario(
        "multifd-legacy-zero", capabilities=_MULTIFD, parameters={**_TWO, "zero-page-detection": "legacy"}, since=_V9
    ),
    Scenario("multifd-zstd", capabilities=_MULTIFD, parameters={**_TWO, "multifd-compression": "zstd"}),
    Scenario("multifd-zlib", capabilities=_MULTIFD, parameters={**_TWO, "multifd-compression": "zlib"}),
    Scenario(
        "multifd-zstd-running",
        how="running",
        capabilities=_MULTIFD,
        parameters={**_TWO, "multifd-compression": "zstd"},
    ),
    Scenario("back-and-forth", how="back-and-forth", capabilities=("return-path",)),
)


class Recorder:
    """A relay between unix sockets that keeps what passes, for each connection and direction."""

    def __init__(self, listen: Path, target: Path) -> None:
        self.forward: list[bytearray] = []
        self.back: list[bytearray] = []
        self._target = target
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen(16)
        self._run(self._accept)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._target))
                for record, source, sink in ((self.forward, near, far), (self.back, far, near)):
                    record.append(bytearray())
                    self._run(_pump, source, sink, record[-1])

    def finish(self) -> None:
        """Stops listening and waits until both ends have closed."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(_TIMEOUT_S)


def _pump(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            record += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class Machine:
    """One QEMU with the dirtying guest."""

    def __init__(self, directory: Path, qemu: QemuBinary, scenario: Scenario, guest: Path, memory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        accel = choose_accel("auto", qemu).name
        words = [
            *(str(qemu.path), "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"),
            *("-machine", scenario.machine, "-accel", accel, "-m", str(scenario.memory_mib), "-kernel", str(guest)),
            *scenario.options,
        ]
        if scenario.shared_memory:
            backend = f"memory-backend-file,id=pc.ram,size={scenario.memory_mib}M,mem-path={memory},share=on"
            words += [
                "-object",
                f"{backend},x-use-canonical-path-for-ramblock-id=off",
                "-machine",
                "memory-backend=pc.ram",
            ]
        if scenario.tpm:
            words += ["-chardev", f"socket,id=tpm,path={self._tpm_socket}"]
            words += ["-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", f"{scenario.tpm},tpmdev=tpm0"]
        self.words = words
        self._scenario = scenario
        self.serial = directory / "serial"
        self._process: subprocess.Popen[bytes] | None = None
        self._swtpm: subprocess.Popen[bytes] | None = None

    @property
    def _tpm_socket(self) -> Path:
        return self.directory / "tpm.sock"

    def _start_swtpm(self) -> None:
        """A TPM 2.0 of this machine's own: at the destination one without state, which comes with the migration."""
        state = self.directory / "tpm"
        state.mkdir()
        with (self.directory / "swtpm.log").open("wb") as log:
            self._swtpm = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "--", "swtpm", "socket", "--tpm2"),
                    *("--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={self._tpm_socket}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        _wait(self._tpm_socket.exists, "the TPM's socket")

    def start(self, *extra: str) -> Qmp:
        """Starts it and gives its monitor, with the scenario's capabilities and parameters set."""
        monitor = self.directory / "qmp"
        if self._scenario.tpm:
            self._start_swtpm()
        channels = ["-serial", f"file:{self.serial}", "-qmp", f"unix:{monitor},server=on,wait=off"]
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self.words, *channels, *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        _wait(monitor.exists, "its monitor")
        qmp = Qmp(monitor)
        names = ("events", *self._scenario.capabilities)
        qmp.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])
        parameters = {"max-bandwidth": 100 << 30, **self._scenario.parameters}
        qmp.execute("migrate-set-parameters", **{name.replace("-", "_"): value for name, value in parameters.items()})
        return qmp

    def wait_rounds(self, count: int) -> None:
        """Waits until the guest has gone round `count` times more."""
        before = self.serial.stat().st_size if self.serial.exists() else 0
        _wait(lambda: self.serial.exists() and self.serial.stat().st_size >= before + count, "the guest's rounds")

    def stop(self) -> None:
        """Ends QEMU, and its TPM."""
        for process in (self._process, self._swtpm):
            if process is not None:
                process.kill()
                process.wait()

    def ram(self, qmp: Qmp) -> dict[str, dict[str, Any]]:
        """Length and SHA-256 of each RAM block whose memory can be found, of a stopped machine."""
        blocks = {}
        process = self._process
        if process is None:
            raise RigError("the machine was not started")
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
            for name, used, address in _host_addresses(qmp):
                memory.seek(address)
                digest = hashlib.sha256()
                left = used
                while left:
                    data = memory.read(min(left, 1 << 20))
                    if not data:
                        raise RigError(f"the memory of RAM block {name} cannot be read")
                    digest.update(data)
                    left -= len(data)
                blocks[name] = {"length": used, "sha256": digest.hexdigest()}
        return blocks


def _host_addresses(qmp: Qmp) -> list[tuple[str, int, int]]:
    """Name, used length and host address of the RAM blocks."""
    found = []
    nodes_end = 0
    for line in qmp.monitor("info ramblock").splitlines():
        words = line.split()
        numbers = [int(word, 16) for word in words if re.fullmatch(r"0x[0-9a-f]+", word)]
        if len(numbers) < 3:
            continue
        name, used = words[0], numbers[1]
        if len(numbers) > 3:
            found.append((name, used, numbers[3]))
            continue
        guest = nodes_end if name.startswith("ram-node") else _GUEST_ADDRESSES.get(name)
        guest = (1 << 32) - used if name == "pc.bios" else guest
        if guest is not None:
            nodes_end = guest + used
            answer = qmp.monitor(f"gpa2hva {guest:#x}")
            match = re.search(r"is (0x[0-9a-f]+)", answer)
            if match is None:
                raise RigError(f"gpa2hva said {answer!r}")
            found.append((name, used, int(match[1], 16)))
    return found


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise RigError(f"{what} did not come in {_TIMEOUT_S:.0f} s")
        time.sleep(0.01)


def _build_guest(directory: Path, scenario: Scenario) -> Path:
    guest = directory / "guest.bin"
    subprocess.run(
        [
            *("gcc", "-m32", "-nostdlib", "-static", "-Wl,-Ttext=0x100000,--build-id=none,--oformat=binary"),
            *(f"-DPAGES={scenario.pages}", "-DPAUSE=400000", str(_SOURCE), "-o", str(guest)),
        ],
        check=True,
        capture_output=True,
    )
    return guest


def record(scenario: Scenario, qemu: QemuBinary, into: Path) -> Path:
    """Makes one capture in a directory below `into` and gives it. RigError where something does not work."""
    version = ".".join(map(str, qemu.version))
    target = into / f"{scenario.name}-{version}"
    with tempfile.TemporaryDirectory(prefix="sl-") as scratch, ExitStack() as ends:
        directory = Path(scratch)
        guest = _build_guest(directory, scenario)
        memories = [directory / f"memory-{end}" for end in "ab"]
        if scenario.shared_memory:
            memories[1] = memories[0]  # that is what ignoring shared memory is for
        machines = [
            Machine(directory / end, qemu, scenario, guest, memory) for end, memory in zip("ab", memories, strict=True)
        ]
        for machine in machines:
            ends.callback(machine.stop)
        source = machines[0].start()
        machines[0].wait_rounds(3)
        recorder, blocks = _migrate(scenario, machines[0], source, machines[1], directory / "one")
        if scenario.how == "back-and-forth":
            machines[0].stop()
            back = Machine(directory / "c", qemu, scenario, guest, directory / "memory-c")
            ends.callback(back.stop)
            away = Qmp(machines[1].directory / "qmp")
            away.execute("cont")
            machines[1].wait_rounds(3)
            recorder, blocks = _migrate(scenario, machines[1], away, back, directory / "two")
        words = " ".join(machines[0].words).replace(str(qemu.path), "qemu-system-x86_64").replace(scratch, "DIR")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    files = _write(recorder, target)
    provenance = {
        "qemu": version,
        "command": words,
        "guest": f"dirtier.S, PAGES={scenario.pages}",
        "capabilities": scenario.capabilities,
        "parameters": dict(scenario.parameters),
        "how": scenario.how,
        "truth": "the stopped source's memory, read through /proc/PID/mem",
        "files": files,
        "blocks": blocks,
    }
    (target / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    return target


def _migrate(
    scenario: Scenario, machine: Machine, source: Qmp, destination: Machine, sockets: Path
) -> tuple[Recorder, dict[str, dict[str, Any]]]:
    """Moves the guest through a recorder, and reads the source's RAM when it has stopped."""
    sockets.mkdir()
    # after postcopy the guest has to run at the destination, or it would ask for no page
    paused = () if scenario.how == "postcopy" else ("-S",)
    waiting = destination.start(*paused, "-incoming", "defer")
    waiting.execute("migrate-incoming", uri=f"unix:{sockets / 'far'}")
    recorder = Recorder(sockets / "near", sockets / "far")
    if scenario.how in ("stopped", "back-and-forth"):
        source.execute("stop")
    else:
        # so slow, with so short a downtime, that it goes on until it is told otherwise
        source.execute(
            "migrate-set-parameters", max_bandwidth=1 << 20, max_postcopy_bandwidth=1 << 20, downtime_limit=1
        )
    source.execute("migrate", uri=f"unix:{sockets / 'near'}")
    if scenario.how in ("postcopy", "running"):
        _wait(lambda: _passes(source) > (1 if scenario.how == "postcopy" else 2), "another pass")
    if scenario.how == "postcopy":
        source.execute("migrate-start-postcopy")
    elif scenario.how == "running":
        source.execute("migrate-set-parameters", max_bandwidth=100 << 30, downtime_limit=2000)
    source.wait_migrated(timeout_s=_TIMEOUT_S)
    blocks = machine.ram(source)
    source.execute("quit")
    recorder.finish()
    return recorder, blocks


def _passes(source: Qmp) -> int:
    answer = source.execute("query-migrate")
    if answer.get("status") in ("completed", "failed"):
        raise RigError("the migration was over too soon")
    return int(answer.get("ram", {}).get("dirty-sync-count", 0))


def _write(recorder: Recorder, target: Path) -> dict[str, dict[str, Any]]:
    compressor = zstandard.ZstdCompressor(level=19, write_checksum=True)
    kinds = {b"\x51\x45\x56\x4d": "main", b"\x11\x22\x33\x44": "multifd"}
    named = [(f"{n}-{kinds.get(bytes(data[:4]), 'preempt')}", data) for n, data in enumerate(recorder.forward)]
    named += [("return", data) for data in recorder.back if data]
    files = {}
    for name, data in named:
        (target / f"{name}.zst").write_bytes(compressor.compress(bytes(data)))
        files[f"{name}.zst"] = {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return files


def main() -> int:
    """Makes the captures that are named, or all; 0 when all of them worked."""
    into, names = Path(sys.argv[1]), sys.argv[2:]
    failed = 0
    for qemu in all_qemus():
        for scenario in SCENARIOS:
            if not scenario.fits(qemu) or (names and scenario.name not in names):
                continue
            try:
                made = record(scenario, qemu, into)
            except (RigError, OSError) as error:
                failed += 1
                print(f"{scenario.name} {qemu}: {error}", flush=True)
            else:
                size = sum(path.stat().st_size for path in made.iterdir())
                print(f"{made.name}: {size} bytes", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
