"""The papers' experiments on real migrations: what somebody on the wire reads, and what he cannot."""

from collections.abc import Iterator

import pytest

from sealane.testing.lab.attacks import ATTACKS
from sealane.testing.lab.guest import USERS
from sealane.testing.lab.leak import LeakTable, measure
from sealane.testing.lab.stage import Stage, make_stage

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CODES = {
    "downgrade": ("peer.tls-version",),
    "redirect": ("peer.unknown",),
    "replay": ("",),
    "truncate": ("lane.truncated", "lane.cut"),
    "tamper": ("lane.integrity",),
}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with make_stage() as made:
        yield made


@pytest.fixture(scope="module")
def table(stage: Stage) -> LeakTable:
    return measure(stage, ways=("plain", "sealed", "shift", "affine", "hrt"), is_thorough=False)


def test_all_is_planted_and_plain_shows_all_of_it(table: LeakTable) -> None:
    assert len(table.cells) >= 12
    assert all(table.planted.values()), table.planted
    assert {row["plain"] for row in table.cells.values()} == {"read"}


def test_plain_shows_screen_password_document_and_key(stage: Stage, table: LeakTable) -> None:
    carved = table.carved["plain"]
    assert any("eleven million" in "".join(screen) for screen in carved.screens)
    assert ("root", stage.secrets.passwords[1]) in carved.logins
    assert any(stage.secrets.document_word in text for text in carved.documents)
    assert any(stage.secrets.pem_line in key for key in carved.keys)


def test_sealed_shows_nothing(table: LeakTable) -> None:
    assert table.count("sealed") == 0
    assert table.captured_bytes["sealed"] > 32 << 20
    assert table.carved["sealed"].is_empty
    assert (table.document["sealed"], table.key["sealed"]) == ("-", "-")
    (attack,) = [each for each in table.breaking if each.way == "sealed"]
    assert (attack.coded_pages, attack.key) == (0, {})


@pytest.mark.parametrize("codec", ["shift", "affine", "hrt"])
def test_the_seeds_codecs_are_broken_from_one_capture(table: LeakTable, codec: str) -> None:
    (attack,) = [each for each in table.breaking if each.way == codec]
    # what the monitor has not classified when it goes is encrypted: on a slow machine a part of all
    assert attack.coded_pages > 100
    # a page that the guest wrote to between the look at its memory and the copy is another one
    assert attack.right_pages >= 0.98 * attack.coded_pages, attack
    assert "read" not in {table.cells[place][codec] for place in USERS}
    assert "read" in {table.cells[place][codec] for place in table.cells if place not in USERS}


@pytest.mark.parametrize("attack", ["truncate", "downgrade", "redirect", "replay", "tamper"])
def test_sealed_withstands(stage: Stage, table: LeakTable, attack: str) -> None:
    """One clear error, and the VM runs on at the source."""
    told = ATTACKS[attack](stage, "sealed")
    assert not told.attacker_won, told
    assert told.vm == "runs at the source", told
    # what is cut is noticed by the end that reads, or by the one that writes
    assert told.code in CODES[attack], told


def test_many_false_sources_do_not_keep_the_true_one_out(stage: Stage, table: LeakTable) -> None:
    told = ATTACKS["flood"](stage, "sealed")
    assert (told.attacker_won, told.vm) == (False, "runs at the destination"), told


def test_plain_does_not_withstand(stage: Stage, table: LeakTable) -> None:
    told = ATTACKS["tamper"](stage, "plain")
    assert told.attacker_won, told
    assert "pay 999 to mallo" in stage.guest.console.text
