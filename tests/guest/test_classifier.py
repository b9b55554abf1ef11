"""Each feature of x86-64 page tables as Linux uses them, on tables made by hand."""

import itertools

import numpy as np
import pytest

from sealane.errors import HostError
from sealane.guest import PAGE_BYTES, Classifier, CpuState, PageClass
from sealane.guest.search import _SCAN_PAGES
from tests.guest.rig import LONG_MODE, PS, RW, G, Guest, P, U, hole_layout, user_pages

HIGH = 0x7FFF_F000_0000


def populated(guest: Guest, processes: int = 5, pages: int = 20) -> list[int]:
    tops = [guest.process() for _ in range(processes)]
    for number, top in enumerate(tops):
        for page in range(pages):
            guest.map(top, 0x40_0000 + page * PAGE_BYTES)
        guest.map(top, HIGH + number * PAGE_BYTES)
    for _ in range(50):  # the kernel's own
        guest.fill(guest.frame())
    return tops


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("pti", [False, True])
@pytest.mark.parametrize("in_user_mode", [False, True])
def test_every_process_is_found_from_one_cr3(levels: int, pti: bool, in_user_mode: bool) -> None:
    guest = Guest(levels=levels, pti=pti)
    tops = populated(guest)
    assert guest.found(guest.cpu(tops[2], in_user_mode=pti and in_user_mode)) == guest.user_pages


def test_a_process_above_47_bits_with_five_levels() -> None:
    guest = Guest(levels=5)
    tops = populated(guest)
    guest.map(tops[0], 1 << 50)
    guest.map(tops[1], (1 << 56) - PAGE_BYTES)
    assert guest.found(guest.cpu(tops[0])) == guest.user_pages


def test_an_odd_cr3_without_pti_is_no_user_copy() -> None:
    guest = Guest()
    tops = populated(guest)
    odd = next(top for top in tops if top % 2)
    assert guest.found(guest.cpu(odd)) == guest.user_pages


@pytest.mark.parametrize("pti", [False, True])
def test_the_kernel_entry_of_an_ldt_hides_no_process(pti: bool) -> None:
    """The LDT's process runs on one CPU, or on none: under PTI it has a kernel entry that nobody else has."""
    guest = Guest(pti=pti, kernel_entries=6)
    tops = populated(guest)
    special = guest.process(ldt=True)
    guest.map(special, 0x60_0000)
    for cpus in ([special], [tops[0]], [special, tops[1]]):
        assert guest.found(*(guest.cpu(top, in_user_mode=pti) for top in cpus)) == guest.user_pages


@pytest.mark.parametrize(("level", "pat"), list(itertools.product((1, 2), (False, True))))
@pytest.mark.parametrize(("prot_none", "transparent"), [(False, False), (True, False), (True, True)])
def test_leaves_of_each_size_readable_or_not(level: int, pat: bool, prot_none: bool, transparent: bool) -> None:
    guest = Guest()
    top = guest.process()
    guest.process()
    guest.map(top, 0x4000_0000, level=level, prot_none=prot_none, pat=pat and level > 1, transparent=transparent)
    assert guest.found(guest.cpu(top)) == guest.user_pages
    assert len(guest.user_pages) == (1 if level == 1 else 512)


@pytest.mark.parametrize("prot_none", [False, True])
def test_a_page_of_one_gibibyte(prot_none: bool) -> None:
    layout = hole_layout(below=1 << 19, above=1024)
    guest = Guest(layout)
    top = guest.process()
    base, rest = 1 << 18, PS | (G if prot_none else P | RW | U)
    entry = ((base << 12) ^ (((1 << 52) - 1) & ~0xFFF) if prot_none else base << 12) | rest
    guest.write(guest.table_for(top, 0x40_0000_0000, 3), 256, entry)
    assert guest.found(guest.cpu(top)) == set(range(base, base + (1 << 18)))


@pytest.mark.parametrize("bits", [1 << 13, 1 << 20])
def test_a_huge_page_off_its_alignment_is_none(bits: int) -> None:
    guest = Guest()
    top = guest.process()
    base = guest.aligned(512)
    guest.write(guest.table_for(top, 0, 2), 0, (base << 12) | bits | PS | P | RW | U)
    assert guest.found(guest.cpu(top)) == set()


def test_entries_without_the_user_bit_lead_nowhere() -> None:
    guest = Guest()
    top = guest.process()
    for address, flags in ((0, P | RW), (1 << 39, P)):  # at the top, where trampolines map low memory
        table = guest.table_for(top, address, 1, flags)
        guest.write(table, 0, (guest.frame() << 12) | P | RW | U)
    guest.write(guest.table_for(top, 1 << 40, 1), 0, (guest.frame() << 12) | P | RW)
    assert guest.found(guest.cpu(top)) == set()


def test_swap_entries_are_no_pages() -> None:
    guest = Guest()
    top = guest.process()
    guest.map(top, 0)
    guest.write(guest.table_for(top, PAGE_BYTES, 1), 1, (guest.frame() << 12) | RW | U)
    guest.write(
        guest.table_for(top, PAGE_BYTES, 2), 5, (guest.frame() << 12) | G
    )  # bit 8 means nothing in a table's entry
    assert guest.found(guest.cpu(top)) == guest.user_pages


def test_frames_above_the_hole_and_outside_ram() -> None:
    guest = Guest(hole_layout())
    tops = [guest.process() for _ in range(3)]
    for number in range(3000):  # more than lies below the hole
        guest.map(tops[number % 3], number * PAGE_BYTES)
    for number, frame in enumerate((0xB8, 0xFEE00, 1 << 39, 5000)):
        guest.write(guest.table_for(tops[0], 1 << 45, 1), number, (frame << 12) | P | RW | U)
    found = guest.found(guest.cpu(tops[0]))
    assert found == guest.user_pages
    assert max(found) >= 2048


def test_classes_of_everything_else() -> None:
    guest = Guest(hole_layout())
    top = guest.process()
    mapped = guest.map(top, 0)
    kernel, blank = guest.frame(), guest.frame()
    guest.fill(kernel)
    guest.memory.never[-_SCAN_PAGES * 4 :] = True
    classifier = Classifier(guest.memory, guest.layout)
    done = classifier.refresh([guest.cpu(top)])
    classes = classifier.classes("pc.ram")
    assert classes[guest.page(mapped)] == PageClass.USER
    assert classes[guest.page(kernel)] == PageClass.KERNEL
    assert classes[guest.page(blank)] == PageClass.FREE
    assert (classes[-_SCAN_PAGES * 4 :] == PageClass.FREE).all()
    assert (classes[0xA0:0x100] == PageClass.OTHER).all()
    assert (classifier.classes("0000:00:02.0/vga.vram") == PageClass.OTHER).all()
    assert sum(done.counts.values()) == guest.layout.page_count
    with pytest.raises(KeyError):
        classifier.classes("nothing")


def test_pages_change_hands_between_refreshes() -> None:
    guest = Guest()
    tops = populated(guest)
    classifier = Classifier(guest.memory, guest.layout)
    cpus = [guest.cpu(tops[0])]
    classifier.refresh(cpus)
    before = classifier.classes("pc.ram")
    kept = before.copy()
    late = guest.process()
    moved = guest.map(late, 0x1000)
    gone = guest.table_for(tops[1], 0x40_0000, 1)
    guest.user_pages -= {guest.page((guest.read(gone, i) & ((1 << 52) - 4096)) >> 12) for i in range(20)}
    guest.memory.pages[guest.page(gone)] = 0
    classifier.refresh(cpus, scan=False)  # known tables only
    assert user_pages(classifier, guest.layout) == guest.user_pages - {guest.page(moved)}
    classifier.refresh(cpus)
    assert user_pages(classifier, guest.layout) == guest.user_pages
    assert (before == kept).all(), "an array that was given out has changed"


def test_a_table_that_became_something_else_is_forgotten() -> None:
    guest = Guest()
    tops = populated(guest)
    classifier = Classifier(guest.memory, guest.layout)
    classifier.refresh([guest.cpu(tops[0])])
    mapped = guest.found(guest.cpu(tops[0]))
    guest.memory.pages[guest.page(tops[3])] = guest.read(guest.table_for(tops[3], 0x40_0000, 1), 0)
    classifier.refresh([guest.cpu(tops[0])], scan=False)
    assert user_pages(classifier, guest.layout) < mapped
    classifier.refresh([guest.cpu(tops[0])])
    assert user_pages(classifier, guest.layout) < mapped


@pytest.mark.parametrize(
    "cpu",
    [
        CpuState(0x6000_0010, 0, 0, 0),  # firmware, before paging
        CpuState(0x8000_0011, 0x1000, 0x20, 0),  # a 32-bit guest
    ],
)
def test_without_long_mode_there_are_no_users(cpu: CpuState) -> None:
    guest = Guest()
    populated(guest)
    classifier = Classifier(guest.memory, guest.layout)
    assert classifier.refresh([cpu]).tops == 0
    assert classifier.refresh([]).tops == 0
    assert not user_pages(classifier, guest.layout)


@pytest.mark.parametrize("cr3", [0, 0x5000, 1 << 51, (1 << 64) - 1])
def test_tables_are_found_where_cr3_leads_nowhere(cr3: int) -> None:
    """As in system management mode: the largest group of pages that look like top-level tables is taken."""
    guest = Guest()
    populated(guest)
    assert guest.found(CpuState(cr3=cr3, cr4=0x20, **LONG_MODE)) == guest.user_pages


def test_memory_that_is_gone_is_one_error() -> None:
    guest = Guest()
    tops = populated(guest)
    classifier = Classifier(guest.memory, guest.layout)
    guest.memory.is_gone = True
    with pytest.raises(HostError) as caught:
        classifier.refresh([guest.cpu(tops[0])])
    assert caught.value.code == "guest.memory"


def test_what_was_never_touched_and_what_is_known_is_not_scanned() -> None:
    guest = Guest()
    tops = populated(guest, processes=3, pages=600)
    guest.memory.never = np.asarray(~guest.memory.pages.any(axis=1))
    classifier = Classifier(guest.memory, guest.layout)
    first = classifier.refresh([guest.cpu(tops[0])])
    assert first.scanned_pages < guest.layout.page_count - int(np.count_nonzero(guest.memory.never))
    assert classifier.refresh([guest.cpu(tops[0])]).scanned_pages < first.scanned_pages - 1000
