"""When reducing begins, grows, shrinks and ends."""

from dataclasses import replace

import pytest

from sealane.seal.effort import LEVELS, Effort, Interval

MB = 1_000_000
# a line of 1 Gb/s: the thread waits for it nearly always
SLOW_LINE = Interval(0.05, 0.045, 0.0, 0.0, wire_bytes=6 * MB, plaintext_bytes=6 * MB)
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


def test_levels_rise_while_the_line_is_waited_for_and_stay_at_the_highest() -> None:
    assert after(*[SLOW_LINE] * 4) == 3
    assert after(*[SLOW_LINE] * 50) == LEVELS[-1]


def test_levels_fall_under_work_and_end() -> None:
    begun = [SLOW_LINE] * 4
    assert after(*begun, *[AT_WORK] * 2) == 1
    assert after(*begun, *[AT_WORK] * 4) == -1
    assert after(*begun, *[AT_WORK] * 6) is None


def test_waiting_for_the_vm_changes_nothing() -> None:
    assert after(*[SLOW_LINE] * 2, *[SLOW_VM] * 50) == 1


def test_it_begins_again_only_where_the_line_carries_clearly_less_than_reducing_did() -> None:
    begun = [SLOW_LINE] * 2
    reduced = replace(AT_WORK, plaintext_bytes=7 * MB)
    ended = [*begun, *[reduced] * 4]
    assert after(*ended) is None
    assert after(*ended, *[SLOW_LINE] * 9) is None
    slower = replace(SLOW_LINE, wire_bytes=3 * MB)
    assert after(*ended, *[slower] * 2) == 1


def test_an_interval_without_time_is_passed_over() -> None:
    assert after(*[replace(SLOW_LINE, elapsed_s=0.0)] * 5) is None
