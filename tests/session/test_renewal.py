"""A renewal as a transcript: a host, its CA's host, strangers at either end, and any bytes."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import SealaneError, make_error
from sealane.session.renewal import Ask, Asked, Event, EvidenceWanted, Grant, Granted, HostEntry, Renewal, Shown
from tests.seal.rig import PROPERTY
from tests.session.rig import DAY, DESTINATION, NOW, SOURCE, STRANGER

HOST, OFFICE = SOURCE, DESTINATION
ENTRY = HostEntry(name="host-c", fingerprint=STRANGER.fingerprint, address="192.0.2.3", port=48217, reference="{}")
GRANT = Grant(certificate="a certificate", revocations="a list", hosts=[ENTRY])


def host(want: str = "certificate", **changes: Any) -> Renewal:
    facts = {"peers": frozenset({OFFICE.fingerprint}), "now": NOW, "ask": Ask(want=want, port=48217), **changes}  # type: ignore[arg-type]
    identity = facts.pop("identity", HOST)
    return Renewal(identity, **facts)


def office(**changes: Any) -> Renewal:
    facts = {"peers": frozenset({HOST.fingerprint}), "now": NOW, **changes}
    identity = facts.pop("identity", OFFICE)
    return Renewal(identity, **facts)


def run(
    one: Renewal, other: Renewal, tamper: Callable[[bytes], bytes] = lambda data: data, step: int = 0
) -> tuple[list[Event], list[Event]]:
    """Carries bytes until both are silent; the CA's host grants what is asked, the host shows what is wanted."""
    to_host: list[Event] = []
    to_office: list[Event] = []
    while True:
        there, back = one.bytes_to_send(), other.bytes_to_send()
        if not there and not back:
            return to_host, to_office
        for said, end, heard in ((there, other, to_office), (back, one, to_host)):
            data = tamper(said)
            for at in range(0, len(data), step or len(data) or 1):
                for event in end.receive(data[at : at + (step or len(data))]):
                    heard.append(event)
                    react(end, event)


def react(end: Renewal, event: Event) -> None:
    if isinstance(event, Asked):
        end.challenge() if event.ask.want == "certificate" else end.grant(GRANT.model_copy(update={"certificate": ""}))
    elif isinstance(event, EvidenceWanted):
        end.evidence_made({"quote": event.user_data})
    elif isinstance(event, Shown):
        end.grant(GRANT)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_certificate(step: int) -> None:
    to_host, to_office = run(host(), office(), step=step)
    asked, shown = to_office
    wanted, granted = to_host
    assert isinstance(asked, Asked)
    assert (asked.fingerprint, asked.ask.port) == (HOST.fingerprint, 48217)
    assert isinstance(wanted, EvidenceWanted)
    assert isinstance(shown, Shown)
    assert shown.user_data == wanted.user_data == shown.pieces["quote"]
    assert isinstance(granted, Granted)
    assert granted.grant == GRANT


def test_news_alone() -> None:
    to_host, _ = run(host("news"), office())
    assert [type(event) for event in to_host] == [Granted]


def test_evidence_is_of_one_renewal() -> None:
    first, second = (run(host(), office())[1][1] for _ in range(2))
    assert isinstance(first, Shown)
    assert isinstance(second, Shown)
    assert first.user_data != second.user_data
    fixed = [run(host(), office(random=bytes))[1][1] for _ in range(2)]
    assert fixed[0].user_data != fixed[1].user_data  # type: ignore[union-attr]  # by the channel, even with one nonce


def code(one: Renewal, other: Renewal) -> str:
    with pytest.raises(SealaneError) as raised:
        run(one, other)
    return raised.value.code


def test_a_host_that_was_never_enrolled() -> None:
    assert code(host(identity=STRANGER), office()) == "ca.not-enrolled"


def test_another_one_at_the_ca_s_address() -> None:
    assert code(host(), office(identity=STRANGER)) == "peer.unknown"


def test_identities_that_expired() -> None:
    assert code(host(now=NOW + 5000 * DAY), office()) == "peer.expired"
    assert code(host(), office(now=NOW + 5000 * DAY)) == "peer.expired"


def test_a_refusal_is_told_in_its_words() -> None:
    one, other = host(), office()
    other.receive(one.bytes_to_send())
    one.receive(other.bytes_to_send())
    other.receive(one.bytes_to_send())
    other.refuse(make_error("ca.revoked", "gone since yesterday"))
    with pytest.raises(SealaneError, match="gone since yesterday") as raised:
        one.receive(other.bytes_to_send())
    assert raised.value.code == "ca.revoked"


def test_a_changed_byte_ends_it() -> None:
    for place in (0, 60, 300):
        one, other = host(), office()
        changed = [False]

        def tamper(data: bytes, place: int = place, changed: list[bool] = changed) -> bytes:
            if changed[0] or len(data) <= place:
                return data
            changed[0] = True
            return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]

        with pytest.raises(SealaneError):
            run(one, other, tamper)


def test_what_comes_out_of_turn() -> None:
    """A host grants itself a certificate, or asks twice."""
    for kind in ("grant", "evidence", "ask"):
        one, other = host(), office()
        other.receive(one.bytes_to_send())
        one.receive(other.bytes_to_send())
        if kind == "grant":
            one.grant(GRANT)
        elif kind == "evidence":
            one.evidence_made({})
        else:
            one._judge_peer()
        with pytest.raises(SealaneError, match=r"peer\.message"):
            other.receive(one.bytes_to_send())


@PROPERTY
@given(st.binary(max_size=400))
def test_any_bytes_inside_the_channel(data: bytes) -> None:
    one, other = host(), office()
    other.receive(one.bytes_to_send())
    one.receive(other.bytes_to_send())
    other.receive(one.bytes_to_send())  # ASK came
    one._tls.send(data or b"\0")
    try:
        assert other.receive(one.bytes_to_send()) == []
    except SealaneError as error:
        assert error.code in {"peer.message", "internal.error"}  # noqa: PT017
