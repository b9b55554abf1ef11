"""What is done to a lane's bytes on the way ends the migration with its own error, and the VM runs on at the source."""

import pytest

from sealane.seal.records import Kind
from sealane.testing.faults import (
    Change,
    LaneRecorder,
    Part,
    append,
    cut,
    cut_before,
    drop,
    flip,
    on_preface,
    on_record,
    replay,
    swap_with_next,
    take_from_lane,
)
from sealane.testing.wiretap import Direction
from tests.e2e.rig import Rig

pytestmark = pytest.mark.e2e

START = 0
# A data record in the middle of what the lane carries, with others after it.
MIDDLE = 20
# Beside multifd lanes the main lane carries little: alone it is that has a middle.
ALONE = {0: 0, 1: None, 2: None}
CODES: dict[Part, str] = {
    "kind": "lane.malformed",
    "identifier": "lane.foreign",
    "sequence": "lane.integrity",
    "body": "lane.integrity",
    "tag": "lane.integrity",
}


@pytest.mark.parametrize("part", ["kind", "identifier", "tag"])
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_bit_flipped_at_start(rig: Rig, lane: int, part: Part) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=START, change=flip(part)))
    rig.assert_aborted(attempt, CODES[part], destination=[CODES[part]])


@pytest.mark.parametrize("part", ["kind", "identifier", "sequence", "body", "tag"])
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_bit_flipped_in_the_middle(rig: Rig, lane: int, part: Part) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=MIDDLE, change=flip(part)), multifd_channels=ALONE[lane])
    rig.assert_aborted(attempt, CODES[part], destination=[CODES[part]])


@pytest.mark.parametrize("part", ["identifier", "tag"])
def test_bit_flipped_in_the_main_lane_beside_others(rig: Rig, part: Part) -> None:
    attempt = rig.attempt(on_record(lane=0, which=2, change=flip(part)))
    rig.assert_aborted(attempt, CODES[part], destination=[CODES[part]])


@pytest.mark.parametrize("lane", [1, 2])
def test_length_changed(rig: Rig, lane: int) -> None:
    codes = ["lane.integrity", "lane.malformed"]
    attempt = rig.attempt(on_record(lane=lane, which=MIDDLE, change=flip("length")))
    rig.assert_aborted(attempt, *codes, destination=codes)


@pytest.mark.parametrize("part", ["kind", "identifier", "tag"])
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_bit_flipped_at_the_end(rig: Rig, lane: int, part: Part) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=Kind.CLOSE, change=flip(part)))
    rig.assert_aborted(attempt, CODES[part], destination=[CODES[part]])


@pytest.mark.parametrize("which", [START, Kind.CLOSE], ids=["start", "end"])
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_bit_flipped_on_the_way_back(rig: Rig, lane: int, which: int | Kind) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=which, direction="back", change=flip("tag")))
    rig.assert_aborted(attempt, "lane.integrity", destination=["lane.integrity"])


@pytest.mark.parametrize("part", ["kind", "identifier", "sequence", "body", "tag"])
def test_bit_flipped_on_the_return_path(rig: Rig, part: Part) -> None:
    attempt = rig.attempt(on_record(lane=0, which=1, direction="back", change=flip(part)))
    rig.assert_aborted(attempt, CODES[part], destination=[CODES[part]])


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_lane_cut(rig: Rig, lane: int, reset: bool) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=MIDDLE, change=cut(reset=reset)), multifd_channels=ALONE[lane])
    codes = ["lane.cut", "lane.truncated"]
    rig.assert_aborted(attempt, *codes, destination=codes)


@pytest.mark.parametrize("direction", ["forward", "back"])
@pytest.mark.parametrize("lane", [0, 1])
def test_lane_ends_before_its_close(rig: Rig, lane: int, direction: Direction) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=Kind.CLOSE, direction=direction, change=cut_before))
    codes = ["lane.cut", "lane.truncated"]
    rig.assert_aborted(attempt, *codes, destination=codes)


@pytest.mark.parametrize("direction", ["forward", "back"])
@pytest.mark.parametrize("lane", [0, 2])
def test_close_is_left_out(rig: Rig, lane: int, direction: Direction) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=Kind.CLOSE, direction=direction, change=drop))
    rig.assert_aborted(attempt, "lane.truncated", destination=["lane.truncated"])


@pytest.mark.parametrize("more", [b"!", bytes(100)], ids=["one byte", "a record's worth"])
@pytest.mark.parametrize("direction", ["forward", "back"])
@pytest.mark.parametrize("lane", [0, 1])
def test_bytes_after_close(rig: Rig, lane: int, direction: Direction, more: bytes) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=Kind.CLOSE, direction=direction, change=append(more)))
    rig.assert_aborted(attempt, "lane.after-close", destination=["lane.after-close"])


@pytest.mark.parametrize(
    ("change", "code"), [(replay, "lane.replay"), (drop, "lane.reordered")], ids=["replayed", "dropped"]
)
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_record_replayed_or_dropped(rig: Rig, lane: int, change: Change, code: str) -> None:
    attempt = rig.attempt(on_record(lane=lane, which=MIDDLE, change=change), multifd_channels=ALONE[lane])
    rig.assert_aborted(attempt, code, destination=[code])


@pytest.mark.parametrize("lane", [0, 1])
def test_records_swapped(rig: Rig, lane: int) -> None:
    attempt = rig.attempt(swap_with_next(lane=lane, which=MIDDLE), multifd_channels=ALONE[lane])
    rig.assert_aborted(attempt, "lane.reordered", destination=["lane.reordered"])


@pytest.mark.parametrize(("other", "into"), [(2, 1), (1, 2), (0, 1)])
def test_record_from_another_lane(rig: Rig, other: int, into: int) -> None:
    attempt = rig.attempt(take_from_lane(other, into=into))
    rig.assert_aborted(attempt, "lane.foreign", destination=["lane.foreign"])


def test_record_and_lane_of_another_migration(rig: Rig) -> None:
    recorder = LaneRecorder()
    rig.assert_arrived(rig.attempt(recorder))
    earlier = recorder.records[1][10]
    one = rig.attempt(on_record(lane=1, which=10, change=lambda data: earlier))
    rig.assert_aborted(one, "lane.foreign", destination=["lane.foreign"])
    for lane in (0, 1):
        spliced = rig.attempt(recorder.splice(lane))
        rig.assert_aborted(spliced, "lane.foreign", destination=["lane.foreign"])
    rig.assert_arrived(rig.attempt())


@pytest.mark.parametrize("lane", [0, 2])
def test_preface_of_a_lane_changed(rig: Rig, lane: int) -> None:
    attempt = rig.attempt(on_preface(lane=lane, change=flip("kind")))
    rig.assert_aborted(attempt, "lane.cut", "lane.truncated")


def test_preface_of_a_lane_names_another(rig: Rig) -> None:
    attempt = rig.attempt(on_preface(lane=1, change=lambda data: data[:11] + b"\x02" + data[12:]))
    rig.assert_aborted(attempt, "lane.foreign", "lane.cut", "lane.truncated")


def test_afterwards_it_migrates(rig: Rig) -> None:
    rig.migrate_and_return()
