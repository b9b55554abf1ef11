"""Page classes against the truth from inside the guest, and `sealane inspect pages` through agent and enclave.

The classifier sees the guest from outside, through /proc/PID/mem, and must find at least RECALL of the pages that processes map,
and little else. What each guest holds is told in testing/guest/pages.c: ordinary memory, huge pages, PROT_NONE at both
levels, memory above 47 bits, secret memory, and a process with an LDT that runs on a CPU while the guest is looked at.

CI runs the two guests that between them have everything but pages of 1 GiB; `./run test -m matrix` all, with each QEMU.
"""

import os
import re
import struct
import time
import zlib
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from sealane.enclave.memory import ProcessMemory
from sealane.errors import ControlError
from sealane.guest import Classifier, CpuState, PageClass, RamLayout
from sealane.guest.qemu_text import parse_registers
from sealane.host.migration.monitoring import open_guest_memory
from sealane.hypervisor.guest_memory import describe_guest_memory
from sealane.testing.machine import GuestMachine, Hardware
from sealane.testing.pages import FAILED, HUGE_PROT_NONE, READY, PagesWorkload, read_truth, score, truth_options
from sealane.testing.pair import PROGRAM
from sealane.testing.qemu import QemuBinary, all_qemus
from sealane.testing.qmp import Qmp
from tests.e2e.rig import WORKLOAD, Rig

pytestmark = pytest.mark.e2e

RECALL, PRECISION = 0.999, 0.99
BOOT_TIMEOUT_S = 200.0
LOOKS_MAX = 2000


@dataclass(frozen=True)
class Case:
    """A guest, and what it must show besides recall and precision."""

    hardware: Hardware
    workload: PagesWorkload
    options: tuple[str, ...] = field(default=())
    levels: int = 4
    pti: bool = False
    above_4_gib: int = 0
    """User pages that must lie above the hole."""
    huge_prot_none: bool = False
    """Memory is plenty, so that huge pages must have been there when they became PROT_NONE."""


NUMA = (
    *("-object", "memory-backend-ram,id=ram-node0,size=2304M", "-numa", "node,nodeid=0,cpus=0,memdev=ram-node0"),
    *("-object", "memory-backend-ram,id=ram-node1,size=2304M", "-numa", "node,nodeid=1,cpus=1,memdev=ram-node1"),
)
CASES = {
    "qemu64-pti": Case(
        Hardware(memory_mib=256, cpus=2, machine="q35", cpu="qemu64"),
        PagesWorkload(fill_mib=32, huge_2m=4, kernel="pti=on"),
        pti=True,
    ),
    "max-numa-4608": Case(
        Hardware(memory_mib=4608, cpus=2, machine="q35", cpu="max"),
        PagesWorkload(fill_mib=64, huge_2m=4, high=True),
        NUMA,
        levels=5,
        above_4_gib=10_000,
        huge_prot_none=True,
    ),
    "qemu64": Case(
        Hardware(memory_mib=256, cpus=1, machine="pc", cpu="qemu64"), PagesWorkload(fill_mib=32, kernel="pti=off")
    ),
    "max-pti": Case(
        Hardware(memory_mib=512, cpus=2, machine="pc", cpu="max"),
        PagesWorkload(fill_mib=32, huge_2m=4, high=True, kernel="pti=on"),
        levels=5,
        pti=True,
    ),
    "max-1g": Case(
        Hardware(memory_mib=5120, cpus=2, machine="q35", cpu="max"),
        PagesWorkload(fill_mib=64, huge_2m=4, huge_1g=1, high=True),
        levels=5,
    ),
}


@pytest.mark.parametrize("name", ["qemu64-pti", "max-numa-4608"])
def test_user_pages_are_found(name: str, tmp_path: Path) -> None:
    qemus = all_qemus()
    judge(name, qemus[0] if name == "qemu64-pti" else qemus[-1], tmp_path)


@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("qemu", all_qemus(), ids=lambda qemu: ".".join(map(str, qemu.version)))
def test_user_pages_are_found_with_every_qemu(qemu: QemuBinary, name: str, tmp_path: Path) -> None:
    judge(name, qemu, tmp_path)


def judge(name: str, qemu: QemuBinary, directory: Path) -> None:
    case = CASES[name]
    machine = GuestMachine(directory, qemu=qemu, hardware=case.hardware, workload=case.workload)
    with machine:
        machine.start(*truth_options(directory / "truth"), *case.options)
        machine.wait_for(READY, timeout_s=BOOT_TIMEOUT_S)
        assert FAILED not in machine.console.text, machine.console.text
        assert not case.huge_prot_none or HUGE_PROT_NONE in machine.console.text
        with machine.observe() as monitor:
            cpus = stop_in_user_mode(monitor, pti=case.pti)
            layout = described(monitor)
            truth = read_truth((directory / "truth").read_bytes(), layout)
            found = classified(machine.pid, layout, cpus)
    assert {cpu.levels for cpu in cpus if cpu.is_long_mode} == {case.levels}
    result = score(truth, found)
    print(f"{name}, {qemu}: {result}")
    assert result.truth > 10_000
    assert result.recall >= RECALL, result
    assert result.precision >= PRECISION, result
    assert above_the_hole(layout, truth & found) >= case.above_4_gib


def stop_in_user_mode(monitor: Qmp, *, pti: bool) -> list[CpuState]:
    """Pause the guest while the process with the LDT runs in user mode, on the process's own tables (bit 12 of CR3 with PTI)."""
    for _ in range(LOOKS_MAX):
        monitor.execute("stop")
        said = monitor.monitor("info registers -a")
        for cpu in said.split("CPU#")[1:]:
            with_ldt = re.search(r"^LDT=(?!0000 )", cpu, re.MULTILINE)
            if with_ldt and "CPL=3" in cpu and (not pti or parse_registers(cpu)[0].cr3 & 0x1000):
                return parse_registers(said)
        monitor.execute("cont")
        time.sleep(0.005)  # the guest must run to get somewhere; how far is up to its scheduler
    raise AssertionError("the process with the LDT never runs")


class Observer:
    """A test's monitor as the driver wants it."""

    def __init__(self, monitor: Qmp) -> None:
        self._monitor = monitor

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        return self._monitor.execute(
            command, **{name.replace("-", "_"): each for name, each in (arguments or {}).items()}
        )


def described(monitor: Qmp) -> RamLayout:
    """`describe_guest_memory`, which never waits for anything here."""
    steps = describe_guest_memory(Observer(monitor))
    try:
        steps.send(None)
    except StopIteration as ended:
        layout: RamLayout = ended.value
        return layout
    raise AssertionError("it waits")


def classified(pid: int, layout: RamLayout, cpus: list[CpuState]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    files = open_guest_memory(pid, layout)
    assert len(files) == 2, "guest memory is private to QEMU here, so that its page map tells what was never touched"
    with closing(ProcessMemory(*(os.dup(file.fileno()) for file in files))) as memory:
        for file in files:
            file.close()
        classifier = Classifier(memory, layout)
        classifier.refresh(cpus)
    return np.concatenate([classifier.classes(b.name) == PageClass.USER for b in layout.blocks if b.is_ram])


def above_the_hole(layout: RamLayout, pages: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> int:
    frames = [np.arange(s.first_frame, s.first_frame + s.frames) for s in layout.segments if s.first_frame >= 1 << 20]
    return int(np.count_nonzero(pages[layout.pages_of(np.concatenate(frames))])) if frames else 0


# Through the agent


def test_inspect_pages(rig: Rig, tmp_path: Path) -> None:
    """The agent opens, a short-lived enclave looks; the guest goes on, and nothing stays behind."""
    picture = tmp_path / "map.png"
    with rig.home.client() as client:
        found = client.pages(rig.guest.name, with_classes=False)
    filled = WORKLOAD.fill_mib * 256
    assert filled < found.counts.user < filled + 4000
    assert found.processes >= 1
    assert sum(found.counts.model_dump().values()) == sum(block.pages for block in found.blocks) == 65536
    assert all(block.classes is None for block in found.blocks)
    done = rig.home.host.run(*PROGRAM, "inspect", "pages", rig.guest.name, "--png", picture)
    assert "reachable by a process" in done.stdout
    header, lines = read_png(picture.read_bytes())
    assert header[:4] == (1024, 64, 8, 3)
    assert abs(lines.count(3) - found.counts.user) < 64
    rig.assert_goes_on()


def test_a_vm_that_is_not_there(rig: Rig) -> None:
    with rig.home.client() as client, pytest.raises(ControlError) as caught:
        client.pages("nobody", with_classes=False)
    assert caught.value.code == "vm.unknown"


def read_png(data: bytes) -> tuple[tuple[int, ...], bytes]:
    """Header and pixels of a PNG with a palette and no filters; every checksum is checked."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack_from(">I", data, at + 8 + size)[0]
        chunks[kind] = body
        at += 12 + size
    header = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    raw, width = zlib.decompress(chunks[b"IDAT"]), header[0]
    assert len(raw) == header[1] * (width + 1)
    return header, b"".join(raw[row + 1 : row + 1 + width] for row in range(0, len(raw), width + 1))
