"""The rate that all copies from a host share."""

from hypothesis import given
from hypothesis import strategies as st

from sealane.host.rates import SharedRate, fair_shares

BOUNDS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 2_000), min_size=1)


@given(total=st.integers(8, 4_000), bounds=BOUNDS)
def test_nobody_can_have_more_without_another_having_less(total: int, bounds: dict[str, int]) -> None:
    shares = fair_shares(total, bounds)
    assert shares.keys() == bounds.keys()
    assert sum(shares.values()) <= total
    most = max(shares.values())
    for name, share in shares.items():
        assert 1 <= share <= (bounds[name] or total)
        # below the most only who wants no more, or by what does not divide
        assert share == bounds[name] or share >= most - 1
    wanted = sum(bounds.values()) if all(bounds.values()) else total
    assert sum(shares.values()) > min(total, wanted) - len(bounds)


@given(bounds=BOUNDS)
def test_without_a_total_each_has_its_own_bound(bounds: dict[str, int]) -> None:
    assert fair_shares(0, bounds) == bounds


def test_fewer_bytes_than_copies_stop_none() -> None:
    assert set(fair_shares(2, dict.fromkeys("abcd", 0)).values()) == {1}


def test_shares_move_as_copies_come_and_go_and_the_total_changes() -> None:
    rate = SharedRate(100)
    assert rate.share_of("a", 0) == 100
    assert rate.share_of("b", 20) == 20
    assert rate.share_of("a", 0) == 80
    rate.total_bytes_per_s = 30
    assert (rate.share_of("a", 0), rate.share_of("b", 20)) == (15, 15)
    rate.leave("b")
    rate.leave("b")
    assert rate.share_of("a", 0) == 30
    rate.total_bytes_per_s = 0
    assert rate.share_of("a", 0) == 0
