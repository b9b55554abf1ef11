"""spin walks every state of the attested handshake under attack: all holds, and what each safeguard is for falls without it."""

import inspect
import re
import shutil
from dataclasses import fields, replace
from typing import Any

import pytest

from sealane.session.attestation import Conversation, Input, State, Subject, report_data
from sealane.session.exchange import End
from tests.models.check import AGREEMENT, HANDSHAKE, unreached, verify
from tests.models.table import HANDSHAKE_TABLE, drawn_handshake

needs_spin = pytest.mark.skipif(not shutil.which("spin") or not shutil.which("gcc"), reason="no spin here")
TWO = ("ENDS=2", "ROUNDS=1")
TWO_TWICE = ("ENDS=2", "ROUNDS=2")
# What the model has in one piece.
TOGETHER = {"own_certificate": "certificates", "peer_certificate": "certificates", "vm": "subject", "epoch": "subject"}

# Safeguards that are taken out, and the claim that falls then, and stands while any one of them is left.
CUTS: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    (TWO, ("NO_exporter",), "same_channel"),
    (TWO, ("NO_exporter",), "secret"),
    (TWO, ("NO_HOST",), "right_host"),
    (TWO, ("NO_LAST_WORD",), "both"),
    (TWO, ("SECRET_WITHOUT_EXPORTER",), "secret"),
    (TWO, ("SECRET_WITHOUT_SOURCE_SEED",), "secret"),
    (TWO, ("SECRET_WITHOUT_DESTINATION_SEED",), "secret"),
    (TWO, ("NO_exporter", "NO_certificates"), "same_peer"),
    (TWO, ("NO_exporter", "NO_seed"), "same_seed"),
    (TWO, ("NO_exporter", "NO_migration"), "same_migration"),
    (TWO, ("NO_exporter", "NO_subject"), "same_subject"),
    (TWO, ("NO_exporter", "NO_peer_nonce"), "fresh"),
    (TWO, ("NO_exporter", "NO_own_nonce"), "same_nonce"),
    (TWO, ("NO_exporter", "NO_role"), "same_role"),
    (TWO_TWICE, ("NO_peer_nonce", "NO_own_nonce", "NO_round_number"), "this_round"),
    (TWO_TWICE, ("NO_peer_nonce", "NO_SINGLE_USE", "NO_round_number"), "once"),
]


def text() -> str:
    return re.sub(r"/\*.*?\*/", "", HANDSHAKE.path.read_text(), flags=re.DOTALL)


def quoted() -> dict[str, Any]:
    """What goes into `report_data`, by its name in the code."""
    conversation = {f.name for f in fields(Conversation)} - {"key_pem", "peer_key"}
    given = set(inspect.signature(report_data).parameters) - {"conversation", "subject"}
    return dict.fromkeys(given | conversation | {f.name for f in fields(Subject)})


def test_the_table_is_the_codes_own() -> None:
    assert HANDSHAKE_TABLE.read_text() == drawn_handshake(), "run: python -m tests.models.table"


def test_the_model_speaks_the_codes_language() -> None:
    words = set(re.findall(r"\w+", text()))
    assert {state.name for state in State} - words <= {"QUOTING", "QUOTING_PEER_SHOWN", "SHOWN", "BOTH_SHOWN"}
    assert set(re.findall(r"\bstep\(me, (\w+)\)", text())) - {"happened"} == set(Input.__members__)
    assert set(End.__members__) <= words


def test_the_model_compares_what_the_code_quotes() -> None:
    """Every field of REPORTDATA has a safeguard in the model and the other way round, and each changes what is quoted."""
    compared = re.search(r"#define fits\(x, s\) \((.*?)\)\n\n", text(), re.DOTALL)
    assert compared
    names = set(re.findall(r"is_(\w+)\(", compared[1]))
    assert names - {"host"} == {TOGETHER.get(name, name) for name in quoted()}
    assert set(re.findall(r"#ifdef NO_([a-z]\w*)", text())) == names - {"host"}


def test_every_field_changes_what_is_quoted() -> None:
    conversation = Conversation(b"m" * 16, b"o" * 32, b"p" * 32, b"e" * 32, b"", b"")
    subject = Subject("vm", 3)
    given: dict[str, Any] = {"seed": b"s" * 32, "peer_nonce": b"n" * 32, "own_nonce": b"N" * 32, "round_number": 1}
    found = {report_data(End.SOURCE, conversation, subject, **given)}
    found.add(report_data(End.DESTINATION, conversation, subject, **given))
    for name, value in {"seed": b"x" * 32, "peer_nonce": b"x" * 32, "own_nonce": b"x" * 32, "round_number": 2}.items():
        found.add(report_data(End.SOURCE, conversation, subject, **{**given, name: value}))
    for name in ("migration", "own_certificate", "peer_certificate", "exporter"):
        other = replace(conversation, **{name: b"x" * len(getattr(conversation, name))})
        found.add(report_data(End.SOURCE, other, subject, **given))
    for another in (Subject("VM", 3), Subject("vm", 4)):
        found.add(report_data(End.SOURCE, conversation, another, **given))
    assert len(found) == 1 + len(quoted())


@needs_spin
def test_two_sessions_with_reattestation_keep_what_must_hold() -> None:
    (verdict,) = verify(["everything"], TWO_TWICE, HANDSHAKE)
    assert verdict.holds, verdict
    assert verdict.states > 100_000, verdict


@needs_spin
def test_every_statement_is_reached() -> None:
    """All but accepting evidence that was made for somebody else: that takes a safeguard less."""
    foreign = next(
        n for n, line in enumerate(HANDSHAKE.path.read_text().splitlines(), 1) if "heard_seed[me_r] = s;" in line
    )
    step = next(n for n, line in enumerate(HANDSHAKE.path.read_text().splitlines(), 1) if "state[me] = follows" in line)
    lines = [int(line.split(":")[1].split(",")[0]) for line in unreached(TWO_TWICE, HANDSHAKE)]
    assert set(lines) == {foreign, step}
    assert lines.count(step) == 1
    assert unreached([*TWO_TWICE, "NO_exporter"], HANDSHAKE) == []


@needs_spin
@pytest.mark.parametrize(("size", "cut", "claim"), CUTS, ids=[f"{' '.join(cut)}: {claim}" for _, cut, claim in CUTS])
def test_what_falls_without(size: tuple[str, ...], cut: tuple[str, ...], claim: str) -> None:
    (verdict,) = verify([claim], [*size, *cut], HANDSHAKE)
    assert "broken" in verdict.violation, verdict


@needs_spin
def test_what_stands_without_the_binding_to_the_channel() -> None:
    """The second line: whoever relays evidence still cannot bend who it is for, which round, migration, VM or seed."""
    verdicts = verify(AGREEMENT, [*TWO, "NO_exporter"], HANDSHAKE)
    assert {verdict.claim for verdict in verdicts if not verdict.holds} == {"same_channel", "secret"}


@pytest.mark.matrix
@needs_spin
@pytest.mark.parametrize(("size", "cut", "claim"), [each for each in CUTS if len(each[1]) > 1], ids=str)
def test_no_safeguard_of_a_cut_is_idle(size: tuple[str, ...], cut: tuple[str, ...], claim: str) -> None:
    for back in cut:
        (verdict,) = verify([claim], [*size, *(each for each in cut if each != back)], HANDSHAKE)
        assert verdict.holds, (back, verdict)


def test_every_safeguard_has_its_case() -> None:
    taken_out = {each for _, cut, _ in CUTS for each in cut}
    assert set(re.findall(r"#ifdef ((?:NO|SECRET)_\w+)", text())) <= taken_out
    assert set(re.findall(r"defined\((\w+)\)", text())) <= taken_out
