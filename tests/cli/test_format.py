"""Numbers and times in words: properties, and the examples that people see."""

import contextlib
import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sealane.cli import format as words
from sealane.errors import UsageError

FACTORS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
IEC = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}


def value_of(text: str, unit: str, factors: dict[str, float]) -> float:
    match = re.fullmatch(rf"(\d+(?:\.\d)?) (\w*){unit}", text)
    assert match is not None, text
    return float(match[1]) * factors[match[2]]


@given(st.integers(0, 10**20))
@example(999)
@example(999_500)
@example(9_950)
def test_network_bytes_are_close_and_short(count: int) -> None:
    text = words.network_bytes(count)
    assert value_of(text, "B", FACTORS) == pytest.approx(count, rel=0.051, abs=0.05)
    assert len(text) <= 7


@given(st.integers(0, 2**66))
@example(1023)
@example(2**20 - 1)
def test_memory_bytes_are_close_and_short(count: int) -> None:
    text = words.memory_bytes(count)
    assert value_of(text, "B", {key: float(value) for key, value in IEC.items()}) == pytest.approx(
        count, rel=0.051, abs=1
    )
    assert len(text) <= 8


@given(st.integers(1, 10**9), st.sampled_from(["", "k", "M", "G"]), st.sampled_from(["b/s", "B/s", "bps", "bit/s"]))
def test_rates_that_are_shown_can_be_given(number: int, prefix: str, unit: str) -> None:
    bits = number * FACTORS[prefix] * (8 if unit[0] == "B" else 1)
    if bits < 8:
        return
    assert words.parse_rate(f"{number}{prefix}{unit}") == int(bits / 8)


@given(st.floats(1, 1e13))
def test_shown_rate_reads_back(bytes_per_s: float) -> None:
    assert words.parse_rate(words.rate(bytes_per_s)) == pytest.approx(bytes_per_s, rel=0.06, abs=1)


@given(st.text(max_size=20))
def test_any_text_is_a_rate_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert words.parse_rate(text) >= 0


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_usage_error(text: str) -> None:
    try:
        host, port = words.parse_address(text)
    except UsageError:
        return
    assert host
    assert 1 <= port <= 65_535
    assert words.parse_address(words.show_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host-b", ("host-b", 48217)),
        ("host-b:7", ("host-b", 7)),
        ("192.0.2.7", ("192.0.2.7", 48217)),
        ("::1", ("::1", 48217)),
        ("[2001:db8::1]:99", ("2001:db8::1", 99)),
        ("[::]", ("::", 48217)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert words.parse_address(text) == expected


@pytest.mark.parametrize("text", ["", ":7", "a:0", "a:65536", "a:x", "[::1", "a b", "[::1]x", "a:", "a/b"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError):
        words.parse_address(text)


@given(st.floats(0, 1e7))
def test_durations_have_a_unit_and_never_carry_wrongly(seconds: float) -> None:
    text = words.duration(seconds)
    assert re.fullmatch(r"\d+(\.\d)? ms|\d+(\.\d)? s|\d+ min( \d+ s)?|\d+ h( \d+ min)?|\d+ days", text), text
    assert not re.search(r"\b60 (s|min)\b|\b1000 ms\b", text), text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0314, "31 ms"), (0.9999, "1 s"), (4.8102, "4.8 s"), (59.7, "1 min"), (125, "2 min 5 s"), (12_000, "3 h 20 min"),
     (3599.9, "1 h"), (1_036_800, "12 days"), (-5, "0 ms")],
)  # fmt: skip
def test_duration_examples(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_ago() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert words.ago(now - timedelta(seconds=125), now) == "2 min 5 s ago"
    assert words.ago(now + timedelta(hours=1), now) == "just now"


@given(st.integers(-(10**12), 10**12), st.integers(-5, 10**12))
def test_percent_stays_in_range(done: int, total: int) -> None:
    share = words.percent(done, total)
    assert share is None if total <= 0 else share is not None and 0 <= share <= 100
    if share == 100:
        assert done >= total
