"""Any text, any tables, any registers: a result or one typed error, in bounded time and memory."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealane.errors import SealaneError
from sealane.guest import Classifier, CpuState, RamBlock, RamLayout, Segment
from sealane.guest.qemu_text import (
    FlatRange,
    ListedBlock,
    blocks_without_address,
    build_layout,
    parse_flat_view,
    parse_host_address,
    parse_ram_blocks,
    parse_registers,
)
from sealane.limits import GUEST_TEXT_MAX
from tests.guest.rig import INVERT, PS, RW, FakeMemory, G, P, U, hole_layout
from tests.seal.rig import PROPERTY

BLOCKS_7 = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000120000000 0x0000000120000000
    /rom@etc/acpi/tables    4 KiB  0x0000000120080000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000120000000 0x0000000000040000 0x0000000000040000
"""
BLOCKS_10 = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
               ram-node0    2 MiB  0x0000000000000000 0x0000000120000000 0x0000000120000000 0x00007f022fe00000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000120080000 0x0000000000020000 0x0000000000200000 0x00007f02bc600000  ro
"""
VIEW = """\
FlatView #0
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000bfffffff (prio 0, ram): pc.ram

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000c2fff (prio 0, ram): pc.ram
  00000000000c3000-00000000000e7fff (prio 0, rom): pc.ram @00000000000c3000
  0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000 KVM
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000015fffffff (prio 0, ram): pc.ram @00000000c0000000
"""
REGISTERS = """\

CPU#0
RAX=000000000001ad40 RBX=0000000000000000 RCX=7ffffffe905bc9ff RDX=4000000000000000
CR0=80050033 CR2=0000000006775730 CR3=0000000001940000 CR4=00751eb0
DR6=00000000ffff0ff0 DR7=0000000000000400
EFER=0000000000000d01

CPU#1
CR0=00000010 CR2=0000000000000000 CR3=0000000000000000 CR4=00000000
EFER=0000000000000000
"""
HOST_ADDRESS = "Host virtual address for 0x100000 (pc.ram) is 0x7f022ff00000\n"
PARSERS: list[tuple[Callable[[str], Any], str]] = [
    (parse_ram_blocks, BLOCKS_7),
    (parse_ram_blocks, BLOCKS_10),
    (parse_flat_view, VIEW),
    (parse_registers, REGISTERS),
    (parse_host_address, HOST_ADDRESS),
]


ONE_ERROR = r"\[guest\.layout\]$"


@contextmanager
def one_error() -> Iterator[None]:
    """What is inside may fail with `guest.layout`, and with nothing else."""
    try:
        yield
    except SealaneError as error:
        if error.code != "guest.layout":
            raise


def test_what_qemu_says() -> None:
    assert parse_ram_blocks(BLOCKS_7)[0] == ListedBlock("pc.ram", 0x120000000, None)
    assert parse_ram_blocks(BLOCKS_10)[0] == ListedBlock("ram-node0", 0x120000000, 0x7F022FE00000)
    assert parse_ram_blocks(BLOCKS_10)[1].name == "/rom@etc/acpi/tables"
    ranges = parse_flat_view(VIEW)
    assert len(ranges) == 6
    assert ranges[2] == FlatRange(0x100000, 0xBFF00000, "ram", "pc.ram", 0x100000)
    cpus = parse_registers(REGISTERS)
    assert cpus[0] == CpuState(0x80050033, 0x1940000, 0x751EB0, 0xD01)
    assert [cpu.is_long_mode for cpu in cpus] == [True, False]
    assert cpus[0].levels == 5
    assert parse_host_address(HOST_ADDRESS) == 0x7F022FF00000


def test_the_layout_of_an_old_qemu_is_put_together() -> None:
    blocks, ranges = parse_ram_blocks(BLOCKS_7), parse_flat_view(VIEW)
    missing = blocks_without_address(blocks, ranges, {"pc.ram"})
    assert missing == {"pc.ram": ranges[0]}
    layout = build_layout(blocks, ranges, {"pc.ram"}, {"pc.ram": 1 << 40})
    assert layout.pages_of(np.array([0, 0xC3, 0x100, 0xC0000, 0xFEE00, 0x100000, 0x15FFFF, 0x160000])).tolist() == [
        *(0, -1, 0x100, -1, -1, 0xC0000, 0x11FFFF, -1)
    ]
    assert layout.positions_of(np.array([5])).tolist() == [(1 << 40) + 5 * 4096]
    assert RamLayout.from_json(layout.to_json()).segments == layout.segments


@PROPERTY
@given(st.data())
@pytest.mark.parametrize(("parse", "said"), PARSERS)
def test_changed_words_give_a_result_or_one_error(parse: Callable[[str], Any], said: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(said)))
    cut = data.draw(st.integers(0, 40))
    put = data.draw(st.text(max_size=20) | st.sampled_from(["0x" + "f" * 16, "\n", " " * 5000, "9" * 5000, said]))
    with one_error():
        assert type(parse(said[:at] + put + said[at + cut :])) is type(parse(said))


@PROPERTY
@given(st.text())
def test_any_text_gives_a_result_or_one_error(said: str) -> None:
    for parse, _ in PARSERS:
        with pytest.raises(SealaneError, match=ONE_ERROR):
            parse(said)


@pytest.mark.parametrize("parse", [parse for parse, _ in PARSERS])
def test_an_answer_without_end_is_refused(parse: Callable[[str], Any]) -> None:
    with pytest.raises(SealaneError, match=ONE_ERROR):
        parse(" " * (GUEST_TEXT_MAX + 1))


NUMBER = st.integers(-2, 8) | st.integers(-(2**65), 2**65)


@PROPERTY
@given(
    st.lists(
        st.builds(FlatRange, NUMBER, NUMBER, st.sampled_from(["ram", "rom"]), st.sampled_from("ab"), NUMBER), max_size=5
    ),
    st.lists(st.builds(ListedBlock, st.sampled_from("abc"), NUMBER, st.none() | NUMBER), max_size=4),
    NUMBER,
)
def test_any_description_gives_a_layout_or_one_error(
    ranges: list[FlatRange], blocks: list[ListedBlock], host: int
) -> None:
    with one_error():
        layout = build_layout(blocks, ranges, {"a", "b"}, {"a": host})
        assert RamLayout.from_json(layout.to_json()).blocks == layout.blocks


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@PROPERTY
@given(JSON)
def test_any_json_gives_a_layout_or_one_error(said: Any) -> None:
    for each in (said, {"blocks": said, "segments": said}, {"blocks": [said], "segments": []}):
        with one_error():
            layout = RamLayout.from_json(json.dumps(each))
            assert RamLayout.from_json(layout.to_json()).segments == layout.segments


@pytest.mark.parametrize(
    ("blocks", "segments"),
    [
        ([RamBlock("a", 4096, 0, True)] * 2, []),
        ([RamBlock("a", 1 << 50, 0, True)], []),
        ([RamBlock("a", 4096, 0, True)], [Segment(0, 2, "a", 0)]),
        ([RamBlock("a", 4096, 0, False)], [Segment(0, 1, "a", 0)]),
        ([RamBlock("a", 1 << 20, 0, True)], [Segment(0, 2, "a", 0), Segment(1, 2, "a", 0)]),
        ([RamBlock("a", 4096, 0, True)], [Segment(1 << 40, 1, "a", 0)]),
    ],
)
def test_a_layout_that_contradicts_itself(blocks: list[RamBlock], segments: list[Segment]) -> None:
    with pytest.raises(SealaneError, match=ONE_ERROR):
        RamLayout(blocks, segments)


FLAGS = np.array([0, P, P | U, P | RW | U, P | RW | U | PS, G, G | PS, P | RW], np.uint64)
# One scan, each level's tables once, and what is read to compare kernel halves: each page some times, whatever it holds.
READS_MAX = 24


@settings(PROPERTY, max_examples=40)
@given(
    st.integers(0, 2**32),
    st.integers(0, 100),
    st.booleans(),
    st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=2),
)
def test_any_tables_and_registers_give_a_result(seed: int, share: int, alike: bool, registers: list[int]) -> None:
    layout = hole_layout(below=512, above=256)
    memory = FakeMemory(layout)
    random = np.random.default_rng(seed)
    frames = random.integers(0, 512, memory.pages.shape, np.uint64)
    frames[random.random(frames.shape) < 0.3] += np.uint64((1 << 20) - 256)
    memory.pages[:] = (frames << np.uint64(12)) | random.choice(FLAGS, frames.shape)
    inverted = random.random(frames.shape) < 0.2
    memory.pages[inverted] ^= np.uint64(INVERT)
    memory.pages[random.random(frames.shape) * 100 < share] = 0
    if alike:  # one kernel half for all: every page is a top-level table
        memory.pages[:, 256:] = (np.arange(256, dtype=np.uint64) << np.uint64(12)) | np.uint64(P)
    cpus = [
        CpuState(1 << 31, 5 << 12, random.choice([0, 0x1000]), 0x400),
        CpuState(1 << 31, registers[0], registers[1], 0x400),
    ]
    classifier = Classifier(memory, layout)
    for scan in (True, False, True):
        done = classifier.refresh(cpus, scan=scan)
        assert sum(done.counts.values()) == layout.page_count
    assert memory.read_bytes <= 3 * READS_MAX * memory.pages.nbytes


def test_tables_that_are_their_own_tables_end() -> None:
    """Every page is a table of every level and maps every page, huge and small: each level still reads each page once."""
    layout = hole_layout(below=4096, above=4096)
    memory = FakeMemory(layout)
    pages = np.arange(512, dtype=np.uint64)
    memory.pages[:] = ((pages * np.uint64(8)) << np.uint64(12)) | np.where(
        pages % 7 == 0, P | RW | U | PS, P | RW | U
    ).astype(np.uint64)
    memory.pages[:, 511] = (100 << 12) | P
    classifier = Classifier(memory, layout)
    tracemalloc.start()
    try:
        done = classifier.refresh([CpuState(1 << 31, 0x200000, 0x1000, 0x400)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert done.tables <= 5 * layout.page_count
    assert memory.read_bytes <= READS_MAX * memory.pages.nbytes
    assert peak < 64 << 20
