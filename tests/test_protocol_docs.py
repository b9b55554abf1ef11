"""`docs/protocol.md` and the decisions say what the code says."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from sealane import limits
from sealane.enclave.interface import Ecall, Ocall
from sealane.errors import CATALOGUE
from sealane.host import listener
from sealane.host.migration.messages import Message
from sealane.seal.records import HEADER_BYTES, OVERHEAD_BYTES, Kind
from sealane.session.channel import FrameKind
from sealane.session.preface import PREFACE_BYTES, PROTOCOL_VERSION
from tests.session.rig import hello_of

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "protocol.md").read_text()


@pytest.mark.parametrize("page", ["protocol.md", "handover.md"])
def test_every_code_that_is_named_exists(page: str) -> None:
    families = {code.partition(".")[0] for code in CATALOGUE}
    named = set(re.findall(r"`([a-z]+\.[a-z-]+)`", (DOCS / page).read_text()))
    assert {code for code in named if code.partition(".")[0] in families} - set(CATALOGUE) == set()


def test_every_error_of_a_lane_is_described() -> None:
    assert {code for code in CATALOGUE if code.startswith("lane.")} <= set(re.findall(r"`([a-z.-]+)`", PAGE))


@pytest.mark.parametrize(
    ("what", "bound"),
    [
        ("preface", f"{PREFACE_BYTES} bytes, {limits.PREFACE_TIMEOUT_S:.0f} s"),
        ("connections without a preface", f"{limits.PENDING_CONNECTIONS_MAX}"),
        (
            "enclaves of unproven peers; receptions that are no migrations yet",
            f"{limits.UNPROVEN_ENCLAVES_MAX}; {listener._BEGINNING_MAX}",
        ),
        ("migrations at once, both ways", f"{limits.MIGRATIONS_MAX}"),
        ("handshake", f"{limits.HANDSHAKE_TIMEOUT_S:.0f} s"),
        ("frame", f"{limits.CHANNEL_MESSAGE_MAX // 1024} KiB and 5 bytes"),
        (
            "record",
            f"{limits.RECORD_PAYLOAD_MAX // 1024} KiB and {OVERHEAD_BYTES} bytes; "
            f"2^{limits.RECORDS_PER_KEY.bit_length() - 1} records a key",
        ),
        ("lanes of a migration", f"{limits.LANES_MAX}"),
        ("ecall, ocall", f"{limits.ECALL_MESSAGE_MAX // 1024} KiB"),
    ],
)
def test_limits(what: str, bound: str) -> None:
    assert f"| {what} | {bound} |\n" in PAGE


def test_constants_in_the_text() -> None:
    assert f"({limits.DEFAULT_PORT} unless set otherwise)" in PAGE
    assert f"protocol version {PROTOCOL_VERSION};" in PAGE
    assert f"2 DATA (1 to {limits.RECORD_PAYLOAD_MAX:,})".replace(",", " ") in PAGE
    assert f"1 to {limits.CHANNEL_MESSAGE_MAX + 1:,}.".replace(",", " ") in PAGE
    assert "24\n" in PAGE
    assert HEADER_BYTES == 24
    assert f"# 0007: The default port is {limits.DEFAULT_PORT}" in (DOCS / "adr/0007-the-default-port.md").read_text()


def test_every_kind_of_frame_and_record() -> None:
    for frame in FrameKind:
        assert f"| {frame.value} | {frame.name} |" in PAGE
    for record in Kind:
        assert f"{record.value} {record.name} (" in PAGE


def test_every_call() -> None:
    for call in (*get_args(Ecall), *get_args(Ocall)):
        assert f"| `{call.__name__}` |" in PAGE


def test_every_message_with_its_fields() -> None:
    rows = {row.split("`")[1]: row for row in PAGE.splitlines() if row.startswith("| `")}
    for message in get_args(Message):
        kind = message.model_fields["kind"].default
        named = set(re.findall(r"`(\w+)`", rows[kind].partition("|")[2].partition("|")[2]))
        assert set(message.model_fields) - {"kind"} <= named, kind


def test_every_field_of_the_hello() -> None:
    shown = PAGE[PAGE.index("### Hello") : PAGE.index("## Keys")]
    assert re.findall(r'"(\w+)":', shown) == sorted(each.name for each in fields(hello_of("source")))


def test_decisions_have_their_parts() -> None:
    decisions = sorted((DOCS / "adr").glob("*.md"))
    numbers = [path.name[:4] for path in decisions]
    assert len(set(numbers)) == len(numbers) > 0
    for number, path in zip(numbers, decisions, strict=True):
        text = path.read_text()
        assert re.fullmatch(r"[0-9]{4}-[a-z0-9-]+\.md", path.name)
        assert text.startswith(f"# {number}: ")
        assert re.findall("^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
