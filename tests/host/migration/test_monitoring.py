"""The agent's share: it opens only what QEMU has where it says, asks and never waits, and stays away from `sealed`."""

import asyncio
import ctypes
import mmap
import os
from typing import Any

import pytest
import structlog

from sealane.enclave.interface import ClassifyPages, GuestUnknown, PagesClassified, WatchGuest
from sealane.errors import HostError
from sealane.guest import RamBlock, RamLayout, Segment
from sealane.guest.qemu_text import parse_registers
from sealane.host.migration.monitoring import GuestMonitoring, _is_private, flat, open_guest_memory
from tests.guest.test_hostile import REGISTERS, VIEW

HOST_ADDRESS = 0x7F0000000000
MAP_NORESERVE = 0x4000  # mmap(2); no memory is set aside
MAPS = """\
55d0c0a00000-55d0c0b00000 r-xp 00000000 08:01 1234 /usr/bin/qemu-system-x86_64
7f0000000000-7f0080000000 rw-{mode} 00000000 00:01 {inode}
7f0080000000-7f0160000000 rw-{mode} 00000000 00:01 {inode}
"""


def layout(position: int = HOST_ADDRESS, size: int = 0x160000000) -> RamLayout:
    return RamLayout([RamBlock("pc.ram", size, position, True)], [Segment(0, 1, "pc.ram", 0)])


@pytest.mark.parametrize(
    ("mode", "inode", "private"), [("p", 0, True), ("s", 0, False), ("s", 99, False), ("p", 99, False)]
)
def test_the_page_map_counts_only_where_memory_is_private(mode: str, inode: int, private: bool) -> None:
    assert _is_private(MAPS.format(mode=mode, inode=inode), layout()) is private


@pytest.mark.parametrize("elsewhere", [layout(HOST_ADDRESS - 4096), layout(HOST_ADDRESS + 4096), layout(0x10000, 4096)])
def test_memory_that_is_not_where_qemu_says_is_not_read(elsewhere: RamLayout) -> None:
    with pytest.raises(HostError, match="where it says"):
        _is_private(MAPS.format(mode="p", inode=0), elsewhere)


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(HostError) as caught:
        open_guest_memory(2**22 + 1, layout())
    assert caught.value.code == "guest.memory"


class Qemu:
    """A machine that answers; its memory is this process's."""

    def __init__(self, address: int) -> None:
        self.pid, self.address = os.getpid(), address
        self.asked: list[str] = []
        self.is_deaf = False

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> object:
        line = (arguments or {}).get("command-line", command)
        self.asked.append(line)
        if self.is_deaf:
            raise HostError("vm.unreachable")
        return {
            "query-memdev": [{"id": "pc.ram"}],
            "info ramblock": f"   pc.ram    4 KiB  0x0 0x120000000 0x120000000 0x{self.address:016x}  rw\n",
            "info mtree -f": VIEW,
            "info registers -a": REGISTERS,
        }[line]


class Enclave:
    """Hears the calls and closes what comes with them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.files = 0
        self.on_pages_classified: Any = None

    def call(self, call: Any, *files: Any) -> None:
        self.calls.append(call)
        self.files += len(files)
        for each in files:
            each.close()


def answer(number: int) -> PagesClassified:
    return PagesClassified(number, 5, 4, 3, 2, 1, 6, 7, 0.1, 0.2)


@pytest.fixture
def address() -> Any:
    area = mmap.mmap(-1, 0x120000000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    view = ctypes.c_char.from_buffer(area)
    yield ctypes.addressof(view)
    del view
    area.close()


async def test_it_asks_at_the_start_at_each_iteration_and_at_the_switch_over(address: int) -> None:
    qemu, enclave = Qemu(address), Enclave()
    monitoring = GuestMonitoring("hrt", structlog.get_logger())
    await monitoring.start(qemu, enclave)  # type: ignore[arg-type]
    assert [type(call) for call in enclave.calls] == [WatchGuest, ClassifyPages]
    assert enclave.files == 2
    assert enclave.calls[1] == ClassifyPages(1, flat(parse_registers(REGISTERS)), is_last=False)
    await monitoring.iteration(1)
    assert len(enclave.calls) == 2, "the first look has not ended"
    enclave.on_pages_classified(answer(1))
    await monitoring.iteration(1)
    enclave.on_pages_classified(answer(2))
    await monitoring.iteration(1)
    assert [call.number for call in enclave.calls[1:]] == [1, 2], "one look an iteration"
    await monitoring.iteration(2)
    await monitoring.switch_over()
    assert [(call.number, call.is_last) for call in enclave.calls[1:]] == [
        (1, False),
        (2, False),
        (3, False),
        (4, True),
    ]
    assert monitoring.last == answer(2)


async def test_the_copy_waits_for_the_first_look_and_not_for_ever(
    address: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    enclave = Enclave()
    monitoring = GuestMonitoring("hrt", structlog.get_logger())
    await monitoring.first_look()  # nothing was asked for
    await monitoring.start(Qemu(address), enclave)  # type: ignore[arg-type]
    waiting = asyncio.create_task(monitoring.first_look())
    await asyncio.sleep(0)
    assert not waiting.done()
    enclave.on_pages_classified(answer(1))
    await waiting
    late = GuestMonitoring("hrt", structlog.get_logger())
    await late.start(Qemu(address), Enclave())  # type: ignore[arg-type]
    monkeypatch.setattr("sealane.host.migration.monitoring.FIRST_LOOK_TIMEOUT_S", 0.0)
    await late.first_look()


async def test_under_sealed_nothing_is_asked_and_nothing_opened() -> None:
    qemu, enclave = Qemu(0), Enclave()
    monitoring = GuestMonitoring("sealed", structlog.get_logger())
    await monitoring.start(qemu, enclave)  # type: ignore[arg-type]
    await monitoring.iteration(1)
    await monitoring.switch_over()
    assert (qemu.asked, enclave.calls) == ([], [])


async def test_what_cannot_be_understood_is_no_reason_to_stop(address: int) -> None:
    enclave = Enclave()
    monitoring = GuestMonitoring("hrt", structlog.get_logger())
    await monitoring.start(Qemu(4096), enclave)  # type: ignore[arg-type]
    await monitoring.switch_over()
    assert enclave.calls == []
    qemu = Qemu(address)
    await monitoring.start(qemu, enclave)  # type: ignore[arg-type]
    enclave.on_pages_classified(GuestUnknown(1, "guest.memory", "QEMU is gone"))
    qemu.is_deaf = True
    await monitoring.iteration(2)
    await monitoring.switch_over()
    assert len(enclave.calls) == 2
