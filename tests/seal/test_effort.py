"""When reducing begins, grows, shrinks and ends."""

from dataclasses import replace

import pytest

from sealane.seal.effort import LEVELS, Effort, Interval

MB = 1_000_000
# a line of 1 Gb/s: the thread waits for it nearly always
SLOW_LINE = Interval(0.05, 0.048, 0.0, 0.0, wire_bytes=6 * MB, plaintext_bytes=6 * MB)
# loopback: 2 GB/s, and still the thread waits for it
FAST_LINE = replace(SLOW_LINE, wire_bytes=100 * MB, plaintext_bytes=100 * MB)
SLOW_RECEIVER = replace(SLOW_LINE, receiver_limited_s=0.02)
SLOW_VM = replace(SLOW_LINE, line_wait_s=0.005, vm_wait_s=0.04)
AT_WORK = replace(SLOW_LINE, line_wait_s=0.002)


def after(*intervals: Interval, lanes: int = 1) -> int | None:
    effort = Effort(lanes)
    for interval in intervals:
        effort.learn(interval)
    return effort.level


def test_nothing_is_reduced_at_first_nor_on_one_interval_alone() -> None:
    assert after() is None
    assert after(SLOW_LINE) is None
    assert after(SLOW_LINE, SLOW_VM, SLOW_LINE) is None


def test_a_slow_line_begins() -> None:
    assert after(SLOW_LINE, SLOW_LINE) == 1


@pytest.mark.parametrize("interval", [FAST_LINE, SLOW_RECEIVER, SLOW_VM, AT_WORK])
def test_anything_else_does_not(interval: Interval) -> None:
    assert after(*[interval] * 20) is None


def test_lanes_share_the_line() -> None:
    quarter_of_fast = replace(SLOW_LINE, wire_bytes=6 * MB)  # 120 MB/s a lane
    assert after(*[quarter_of_fast] * 2, lanes=3) == 1
    assert after(*[quarter_of_fast] * 2, lanes=4) is None


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_the_fastest_of_slow_lines_is_known_before_a_lane_is_followed_no_more(lanes: int) -> None:
    effort, passed, bytes_each = Effort(lanes), 0, int(0.05 * 399 * MB / lanes)
    while effort.level is None:
        effort.learn(replace(SLOW_LINE, wire_bytes=bytes_each, plaintext_bytes=bytes_each))
        passed += bytes_each
    assert passed < effort.decided_bytes <= 64 * MB // lanes


def test_levels_rise_while_the_line_is_waited_for_and_stay_at_the_highest() -> None:
    assert after(*[SLOW_LINE] * 4) == 3
    assert after(*[SLOW_LINE] * 50) == LEVELS[-1]


def test_a_line_that_is_busy_for_most_of_the_time_is_no_reason_to_compress_harder() -> None:
    mostly = replace(SLOW_LINE, line_wait_s=0.04)
    assert after(*[SLOW_LINE] * 2, *[mostly] * 50) == 1
    assert after(*[SLOW_LINE] * 4, *[mostly] * 50) == 3


def test_levels_fall_under_work_and_end_where_less_gets_through_than_the_line_carried() -> None:
    begun = [SLOW_LINE] * 4
    behind = replace(AT_WORK, plaintext_bytes=MB)
    assert after(*begun, *[behind] * 2) == 1
    assert after(*begun, *[behind] * 4) == -1
    assert after(*begun, *[behind] * 6) is None


def test_the_lowest_level_stays_under_work_while_more_gets_through_than_the_line_carried() -> None:
    assert after(*[SLOW_LINE] * 2, *[replace(AT_WORK, plaintext_bytes=8 * MB)] * 50) == -1


def test_a_host_that_is_too_busy_to_reduce_stops_though_it_seems_to_do_nothing() -> None:
    starved = replace(SLOW_LINE, line_wait_s=0.01, vm_wait_s=0.02, wire_bytes=MB, plaintext_bytes=3 * MB)
    assert after(*[SLOW_LINE] * 2, *[starved] * 8) is None


def test_after_a_rest_it_is_tried_again_and_then_after_a_longer_one() -> None:
    tried = [SLOW_LINE] * 2 + [replace(AT_WORK, plaintext_bytes=MB)] * 4
    assert after(*tried, *[SLOW_LINE] * 38) is None
    assert after(*tried, *[SLOW_LINE] * 43) is not None
    again = [*tried, *[SLOW_LINE] * 41, *[replace(AT_WORK, plaintext_bytes=MB)] * 9]
    assert after(*again, *[SLOW_LINE] * 43) is None
    assert after(*again, *[SLOW_LINE] * 84) is not None


def test_waiting_for_the_vm_changes_nothing() -> None:
    assert after(*[SLOW_LINE] * 2, *[SLOW_VM] * 50) == 1


def test_it_begins_again_only_where_the_line_carries_clearly_less_than_reducing_did() -> None:
    begun = [SLOW_LINE] * 2
    reduced = replace(AT_WORK, plaintext_bytes=4 * MB)
    ended = [*begun, *[reduced] * 4]
    assert after(*ended) is None
    assert after(*ended, *[SLOW_LINE] * 9) is None
    slower = replace(SLOW_LINE, wire_bytes=3 * MB)
    assert after(*ended, *[slower] * 2) == 1


def test_an_interval_without_time_is_passed_over() -> None:
    assert after(*[replace(SLOW_LINE, elapsed_s=0.0)] * 5) is None
