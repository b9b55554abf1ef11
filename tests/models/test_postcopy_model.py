"""spin walks every state of the model of postcopy: what must hold holds, and fails as soon as a safeguard is taken out."""

import re
import shutil

import pytest

from sealane.session.handover import Input, Role, State
from tests.models.check import POSTCOPY, unreached, verify
from tests.models.table import kinds, pml_name
from tests.models.test_handover_model import BY_POSTCOPY, SAID_IN_POSTCOPY

needs_spin = pytest.mark.skipif(not shutil.which("spin") or not shutil.which("gcc"), reason="no spin here")
# Two crashes or cuts at any step; `./run model` allows more.
SMALL = ("CRASHES=2",)
# Of the hand-over by precopy, and of the doubts that it can leave: handover.pml.
BY_PRECOPY = {
    "HANDING_OVER",
    "IN_DOUBT",
    "RELEASED",
    "NOT_SENT",
    "TICKET_JOURNALLED",
    "RECEIPT",
}
SAID_IN_PRECOPY = {"loaded", "ticket", "receipt_copy", "ask", "ran", "promise", "unsettled"}

pytestmark = pytest.mark.timeout(600)


def test_the_model_speaks_the_codes_language() -> None:
    """Every name of a state, an input or a message in the model is one of the code's, and all of postcopy's are used."""
    text = re.sub(r"/\*.*?\*/", "", POSTCOPY.path.read_text(), flags=re.DOTALL)
    words = set(re.findall(r"\w+", text))
    assert set(State.__members__) - BY_PRECOPY <= words
    after = {
        (role.value, given)
        for role in Role
        for given in re.findall(rf"{role}_(?:after\(\w+, |step\()(\w+)\)", text)
        if given != "happened"
    }
    assert {given for _, given in after} == set(Input.__members__) - BY_PRECOPY
    assert {given for _, given in after} >= BY_POSTCOPY & set(Input.__members__)
    said = set(re.findall(r"\b(?:say|was_said)\((\w+)\)", text)) - {"kind"}
    assert said == {pml_name(kind) for kind in kinds()} - SAID_IN_PRECOPY
    assert said >= SAID_IN_POSTCOPY


@needs_spin
def test_every_state_keeps_what_must_hold() -> None:
    for verdict in verify([*POSTCOPY.safety, *POSTCOPY.liveness], SMALL, POSTCOPY):
        assert verdict.holds, verdict
        assert verdict.states > 10_000, verdict


@needs_spin
def test_every_statement_is_reached() -> None:
    assert unreached(SMALL, POSTCOPY) == []


@needs_spin
@pytest.mark.parametrize(
    ("safeguard", "claim"),
    [
        ("SWITCH_BEFORE_JOURNAL", "never_two"),
        ("TICKET_LETS_RUN", "never_two"),
        ("TAKE_BACK_WHEN_CUT", "never_two"),
        ("RECLAIM_AFTER_SWITCHED", "never_two"),
        ("QEMU_PAUSES_THE_VM", "never_two"),
        ("REFUSE_WITHOUT_LOOKING", "never_none"),
        ("LOOK_BEFORE_CUT", "never_none"),
        ("FORGET_THE_HALF", "never_none"),
        ("RECEIPT_ENDS_THE_HALF", "never_none"),
        ("WAIT_FOR_ARRIVED", "ends"),
        ("DROP_WITHOUT_LOOKING", "never_none"),
        ("OWN_WITHOUT_LOOKING", "never_two"),
        ("JOIN_BEFORE_ASKING", "ends"),
        ("RUN_UNREFUSED", "never_two"),
        ("RUN_UNREFUSED", "never_back"),
        ("LEAVE_UNSHARED", "ends"),
    ],
)
def test_what_falls_without(safeguard: str, claim: str) -> None:
    (verdict,) = verify([claim], [*SMALL, "CLAIMS_ONLY", safeguard], POSTCOPY)
    assert not verdict.holds, verdict


def test_every_safeguard_has_its_case() -> None:
    text = POSTCOPY.path.read_text()
    (mark,) = (each for each in test_what_falls_without.pytestmark if each.name == "parametrize")  # type: ignore[attr-defined]
    assert set(re.findall(r"^ \*   -D(\w+)", text, re.MULTILINE)) == {safeguard for safeguard, _ in mark.args[1]}
