"""Whether a copy comes nearer to its end, told from QEMU's figures."""

import pytest

from sealane.errors import SealaneError
from sealane.host.migration.convergence import Convergence, words_of
from sealane.hypervisor.driver import MigrationStatus

MB = 1_000_000


def status(
    iteration: int, left: int, *, dirty: float = 80 * MB, rate: float = 10 * MB, slowed: int = 0
) -> MigrationStatus:
    return MigrationStatus(
        "active",
        ram_remaining=left,
        iteration=iteration,
        dirty_rate_bytes_per_s=dirty,
        rate_bytes_per_s=rate,
        throttle_percent=slowed or None,
    )


class Watched:
    """A copy that is judged, and its clock."""

    def __init__(self, give_up_after_s: float | None) -> None:
        self.now = 0.0
        self.convergence = Convergence(give_up_after_s, clock=lambda: self.now)
        self.stalled_s: list[float] = []

    def looks(self, *looks: MigrationStatus, every_s: float = 10.0) -> None:
        for look in looks:
            self.now += every_s
            self.stalled_s.append(self.convergence.judge(look).stalled_s)


def test_a_copy_that_stands_still_is_given_up_with_the_figures() -> None:
    watched = Watched(25.0)
    watched.looks(status(1, 1000), status(2, 500), status(3, 480), status(4, 510))
    with pytest.raises(
        SealaneError, match=r"no progress for 30 s: the guest writes 80\.0 MB/s, and 10\.0 MB/s go over"
    ) as said:
        watched.looks(status(5, 490))
    assert said.value.code == "migration.no-convergence"
    assert said.value.retryable


def test_a_first_iteration_may_take_as_long_as_it_likes() -> None:
    watched = Watched(25.0)
    watched.looks(*(status(1, left) for left in range(1000, 0, -10)))
    watched.looks(status(2, 500))
    assert watched.stalled_s == [0.0] * 101


def test_a_long_iteration_is_no_stall() -> None:
    watched = Watched(25.0)
    watched.looks(status(1, 1000), status(2, 500), *(status(3, 480) for _ in range(20)))
    assert watched.stalled_s[-1] == 200.0  # told, and not held against it


def test_every_iteration_with_a_tenth_less_starts_the_time_anew() -> None:
    watched, left = Watched(25.0), 1e9
    for iteration in range(2, 60):
        watched.looks(status(iteration, int(left)))
        left *= 0.88
    with pytest.raises(SealaneError):
        watched.looks(*(status(60 + more, int(left)) for more in range(5)))


def test_a_guest_that_is_slowed_down_more_gets_more_time() -> None:
    watched = Watched(25.0)
    watched.looks(*(status(iteration, 500, slowed=10 * iteration) for iteration in range(1, 9)))
    with pytest.raises(SealaneError, match="slowed down by 80 %"):
        watched.looks(*(status(iteration, 500, slowed=80) for iteration in range(9, 15)))


def test_who_waits_waits() -> None:
    watched = Watched(None)
    watched.looks(*(status(iteration, 500) for iteration in range(1, 100)))
    assert watched.stalled_s[-1] == 970.0


@pytest.mark.parametrize(
    ("look", "eta_s", "converges"),
    [
        (status(1, 100 * MB), 10.0, None),
        (status(2, 100 * MB), None, False),
        (status(2, 100 * MB, dirty=10 * MB), None, False),
        (status(2, 100 * MB, dirty=5 * MB), 20.0, True),
        (status(2, 100 * MB, rate=0.0), None, None),
    ],
)
def test_outlook(look: MigrationStatus, eta_s: float | None, converges: bool | None) -> None:
    outlook = Convergence(None).judge(look)
    assert (outlook.eta_s, outlook.converges) == (eta_s, converges)


def test_no_end_is_in_sight_where_iterations_lead_nowhere_whatever_the_rates_say() -> None:
    """And this is told before the copy is given up."""
    convergence, told = Convergence(0.0), list[bool | None]()
    for iteration in (1, 2, 3):
        convergence.judge(status(iteration, 500, dirty=5 * MB), lambda outlook: told.append(outlook.converges))
    with pytest.raises(SealaneError):
        convergence.judge(status(4, 500, dirty=5 * MB), lambda outlook: told.append(outlook.converges))
    assert told == [None, True, True, False]


def test_words_without_figures() -> None:
    assert words_of(MigrationStatus("active")) == "the guest writes 0.0 MB/s, and 0.0 MB/s go over"
