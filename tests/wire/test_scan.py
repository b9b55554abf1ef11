"""The fast scan over records against one that looks at each, from any rhythm that came before."""

import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sealane.wire.ram import Rhythm, scan_continued

PAGE, ZERO = 0x28, 0x22
FOREIGN = (0x10, 0x128, 0x422, 0x08, 0x02, 0x68, 0x30)
LENGTHS = {PAGE: 4104, ZERO: 9}
RHYTHMS: tuple[Rhythm, ...] = ((), (PAGE,), (ZERO,), (PAGE, ZERO), (ZERO, PAGE))


def slowly(data: bytes) -> tuple[list[int], list[int], int]:
    """Headers, starts and the position behind the last whole record of a page or zero page."""
    headers, starts, position = [], [], 0
    while position + 9 <= len(data):
        header: int = struct.unpack_from(">Q", data, position)[0]
        length = LENGTHS.get(header & 0xFFF)
        if length is None or position + length > len(data):
            break
        headers.append(header)
        starts.append(position + 8)
        position += length
    return headers, starts, position


runs = st.lists(
    st.tuples(st.sampled_from(((PAGE,), (ZERO,), (PAGE, ZERO), (ZERO, ZERO, PAGE))), st.integers(1, 60)), max_size=6
)


@settings(max_examples=150, deadline=None)
@given(runs, st.integers(0, 4200), st.sampled_from(RHYTHMS), st.sampled_from((0, *FOREIGN)), st.integers(0, 400))
@example([((PAGE,), 60), ((ZERO,), 60)], 0, (PAGE,), 0x128, 30)
@example([((ZERO, PAGE), 60)], 0, (PAGE, ZERO), 0x422, 71)
def test_it_finds_what_a_look_at_each_record_finds(
    records: list[tuple[tuple[int, ...], int]], cut: int, rhythm: Rhythm, foreign: int, where: int
) -> None:
    flags = [flag for pattern, count in records for flag in pattern * count]
    if foreign and flags:
        flags[where % len(flags)] = foreign
    parts = [struct.pack(">Q", 4096 * number | flag) for number, flag in enumerate(flags)]
    # contents look like heads of records, which nobody may take them for
    fill = struct.pack(">QQ", 0x4000 | PAGE, 0x5000 | ZERO) * 256
    data = b"".join(head + fill[: LENGTHS.get(flag, 9) - 8] for head, flag in zip(parts, flags, strict=True))
    data = data[: max(0, len(data) - cut)]
    headers, starts, position = slowly(data)
    found = scan_continued(memoryview(data), 0, len(data), first=(ZERO, 3), rhythm=rhythm)
    assert found[0].tolist() == [ZERO, *headers]
    assert found[1].tolist() == [3, *starts]
    assert found[2] == position
    assert found[3] in RHYTHMS
