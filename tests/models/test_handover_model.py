"""spin walks every state of the model: what must hold holds, and fails as soon as a safeguard is taken out."""

import re
import shutil

import pytest

from sealane.session.handover import Input, Role, State
from tests.models.check import LIVENESS, MODEL, SAFETY, unreached, verify
from tests.models.table import TABLE, drawn, kinds, pml_name

needs_spin = pytest.mark.skipif(not shutil.which("spin") or not shutil.which("gcc"), reason="no spin here")
# One crash at any step of two migrations; `./run model` allows more.
SMALL = ("ROUNDS=2", "CRASHES=1")

# What is in a model of its own: test_postcopy_model.py.
BY_POSTCOPY = {"POSTCOPY", "POSTCOPY_PAUSED", "TICKET_HELD", "SWITCHED", "REJOINED", "ARRIVED"}
SAID_IN_POSTCOPY = {"postcopy_ticket", "ticket_held", "arrived", "rejoin", "rejoined"}


def test_the_table_is_the_codes_own() -> None:
    assert TABLE.read_text() == drawn(), "run: python -m tests.models.table"


def test_the_model_speaks_the_codes_language() -> None:
    """Every name of a state, an input or a message in the model is one of the code's, and all of the hand-over's are used."""
    text = re.sub(r"/\*.*?\*/", "", MODEL.read_text(), flags=re.DOTALL)
    words = set(re.findall(r"\w+", text))
    assert set(State.__members__) - BY_POSTCOPY <= words
    assert set(Input.__members__) - BY_POSTCOPY <= words
    after = {
        (role.value, given)
        for role in Role
        for given in re.findall(rf"{role}_(?:after\(\w+, |step\()(\w+)\)", text)
        if given != "happened"
    }
    assert {given for _, given in after} == set(Input.__members__) - BY_POSTCOPY
    said = set(re.findall(r"\b(?:say|was_said)\((\w+), ", text)) - {"kind"}
    after_the_end = {"receipt_copy"}  # comes when all is decided
    assert said == {pml_name(kind) for kind in kinds()} - after_the_end - SAID_IN_POSTCOPY


@needs_spin
@pytest.mark.timeout(600)
def test_every_state_keeps_what_must_hold() -> None:
    for verdict in verify([*SAFETY, *LIVENESS], SMALL):
        assert verdict.holds, verdict
        assert verdict.states > 100_000, verdict


@needs_spin
@pytest.mark.timeout(600)
def test_every_statement_is_reached() -> None:
    """What no run comes to is not checked: with one crash all but what needs two."""
    assert unreached(SMALL) == []


@needs_spin
@pytest.mark.parametrize(
    "safeguard",
    [
        "TICKET_BEFORE_JOURNAL",
        "NO_EPOCH_CHECK",
        "RESUME_AFTER_RELEASED",
        "RECLAIM_AFTER_RELEASED",
        "REFUSE_BEFORE_DESTROY",
        "REFUSAL_OF_ANY_MIGRATION",
        "PROMISE_WHILE_UNDER_WAY",
        "WORDS_WITHOUT_LOOKING",
    ],
)
def test_two_copies_run_without(safeguard: str) -> None:
    (verdict,) = verify(["never_two"], [*SMALL, "CLAIMS_ONLY", safeguard])
    assert "source_qemu==" in verdict.violation, verdict
    assert "destination_qemu==" in verdict.violation, verdict


@needs_spin
def test_a_running_copy_is_ended_without_the_tickets_entry() -> None:
    (verdict,) = verify(["never_two"], [*SMALL, "RESUME_BEFORE_JOURNAL"])
    assert "destination_qemu!=" in verdict.violation, verdict


@needs_spin
def test_no_copy_is_left_where_a_receipt_is_given_for_one_that_is_gone() -> None:
    (verdict,) = verify(["never_none"], ["ROUNDS=2", "CRASHES=2", "CLAIMS_ONLY", "RECEIPT_OF_THE_GONE"])
    assert "source_qemu!=" in verdict.violation, verdict
