"""How a postcopy may rest: what is told apart, and what no fault excuses."""

import pytest

from sealane.host.models import Migration
from sealane.testing.halves import Rest, how_it_rests, why_not
from tests.host.factories import migration

PARTED = migration(1, state="postcopy-paused", runs_at="destination")
GONE = migration(1, state="completed", runs_at="nowhere", role="destination")
REFUSED = migration(1, state="aborted", runs_at="source", role="destination")


@pytest.mark.parametrize(
    ("source", "destination", "told", "rest"),
    [
        (PARTED, PARTED, "postcopy-paused", ""),
        (PARTED, PARTED, "failed", "split"),
        (migration(1, state="postcopy", runs_at="destination"), PARTED, "failed", ""),  # its agent has not seen it yet
        (PARTED, PARTED, "", "lost"),
        (PARTED, GONE, "postcopy-paused", "lost"),
        (PARTED, REFUSED, "failed", ""),  # the source will hear it
        (PARTED, None, "failed", ""),
        (None, PARTED, "failed", ""),
        (migration(1, state="aborted", runs_at="source"), PARTED, "failed", ""),
    ],
)
def test_how_it_rests(source: Migration | None, destination: Migration | None, told: str, rest: Rest) -> None:
    assert how_it_rests(source, destination, lambda: told, lambda: "postcopy-paused") == rest


def test_a_destination_that_lost_its_qemu_will_say_so() -> None:
    assert how_it_rests(PARTED, PARTED, lambda: "failed", lambda: "") == ""


@pytest.mark.parametrize(
    ("rest", "fired", "was_cut", "is_excused"),
    [
        ("lost", ["kill-qemu"], False, True),
        ("lost", ["kill-agent"], True, False),
        ("split", [], True, True),
        ("split", ["kill-enclave"], False, True),
        ("split", ["clock-back"], False, False),
        ("", [], False, True),
    ],
)
def test_what_excuses_it(rest: Rest, fired: list[str], was_cut: bool, is_excused: bool) -> None:
    assert (why_not(rest, fired, was_cut=was_cut) == "") == is_excused
