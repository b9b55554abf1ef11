"""Pairing as transcripts: two ends, the wrong code, somebody in between, and any bytes."""

import contextlib
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealane.crypto.dsse import parse_certificate
from sealane.crypto.identity import Identity, create_identity
from sealane.crypto.pake import Side
from sealane.errors import SealaneError, make_error
from sealane.session.pairing import (
    Answered,
    Challenged,
    CodeProved,
    Done,
    Event,
    Offer,
    OfferReceived,
    Pairing,
    make_code,
    normal_code,
)
from sealane.session.words import WORDS

NOW = datetime(2025, 1, 2, tzinfo=UTC)
A, B, M = (create_identity(name, now=NOW) for name in ("host-a", "host-b", "host-m"))
CODE = "7-orchid-tempo"


def end(side: Side, identity: Identity, code: str = CODE, *, offered: Identity | None = None, seed: int = 0) -> Pairing:
    offer = Offer(parse_certificate((offered or identity).certificate_pem), 48217, {"ek": "AAAA"})
    rng = random.Random(f"{side}{identity.name}{seed}")
    return Pairing(side, code, identity, offer, entropy=rng.randbytes)


def run(inviter: Pairing, joiner: Pairing, tamper: Callable[[int, bytes], bytes] = lambda _, data: data) -> list[Event]:
    """Carries bytes to and fro until nothing moves; both ends accept what they are offered."""
    events: list[Event] = []
    for turn in itertools.count():
        sender, receiver = (joiner, inviter) if turn % 2 == 0 else (inviter, joiner)
        data = sender.bytes_to_send()
        if not data:
            return events
        for event in receiver.receive(tamper(turn, data)):
            events.append(event)
            react(receiver, event)
    raise AssertionError


def react(receiver: Pairing, event: Event) -> None:
    """What a host does; the secrets stand for what its TPM found."""
    match event:
        case OfferReceived():
            receiver.accept() if receiver._side == "joiner" else receiver.challenge(b"for the joiner")
        case Challenged():
            receiver.answer(b"opened " + event.credential, b"for the inviter")
        case Answered():
            receiver.accept(b"opened " + event.credential)


def test_two_ends_learn_each_other_and_show_the_same_words() -> None:
    events = run(end("inviter", A), end("joiner", B))
    proved, to_joiner, to_inviter, challenged, answered, done = events
    assert isinstance(proved, CodeProved)
    assert challenged == Challenged(b"for the joiner")
    assert answered == Answered(b"opened for the joiner", b"for the inviter")
    assert done == Done(b"opened for the inviter")
    assert isinstance(to_joiner, OfferReceived)
    assert isinstance(to_inviter, OfferReceived)
    assert to_joiner.offer.certificate.fingerprint == A.fingerprint
    assert to_inviter.offer.certificate.fingerprint == B.fingerprint
    assert (to_joiner.offer.port, to_joiner.offer.endorsements) == (48217, {"ek": "AAAA"})
    assert to_joiner.words == to_inviter.words
    assert len(to_joiner.words.split()) == 3


def test_byte_by_byte() -> None:
    inviter, joiner = end("inviter", A), end("joiner", B)
    seen: list[Event] = []
    for turn in range(8):
        sender, receiver = (joiner, inviter) if turn % 2 == 0 else (inviter, joiner)
        for byte in sender.bytes_to_send():
            for event in receiver.receive(bytes([byte])):
                seen.append(event)
                react(receiver, event)
    expected = [CodeProved, OfferReceived, OfferReceived, Challenged, Answered, Done]
    assert [type(event) for event in seen] == expected


@pytest.mark.parametrize("wrong", ["8-orchid-tempo", "7-orchid-tiger", "7-tempo-orchid"])
def test_a_wrong_code_is_told_to_the_inviter_and_shows_nothing(wrong: str) -> None:
    inviter, joiner = end("inviter", A), end("joiner", B, wrong)
    with pytest.raises(SealaneError, match=r"pairing\.code"):
        run(inviter, joiner)
    assert A.certificate_pem[30:60] not in inviter.bytes_to_send()
    inviter.refuse(make_error("pairing.code"))
    with pytest.raises(SealaneError, match=r"pairing\.code"):
        joiner.receive(inviter.bytes_to_send())


def test_somebody_in_between_without_the_code_is_noticed() -> None:
    """He speaks to each end for himself; the first that he has to prove something to notices."""
    with pytest.raises(SealaneError, match=r"pairing\.code"):
        run(end("inviter", M, "1-acorn-agate"), end("joiner", B))
    with pytest.raises(SealaneError, match=r"pairing\.code"):
        run(end("inviter", A), end("joiner", M, "1-acorn-agate"))


def test_somebody_in_between_who_knows_the_code_makes_the_words_differ() -> None:
    one = run(end("inviter", A), end("joiner", M))
    other = run(end("inviter", M), end("joiner", B))
    shown_by_a = next(e for e in one if isinstance(e, OfferReceived) and e.offer.certificate.name == "host-m")
    shown_by_b = next(e for e in other if isinstance(e, OfferReceived) and e.offer.certificate.name == "host-m")
    assert shown_by_a.words != shown_by_b.words


@pytest.mark.parametrize("turn", range(8))
def test_every_changed_byte_ends_it(turn: int) -> None:
    size = 0

    def measure(at: int, data: bytes) -> bytes:
        nonlocal size
        size = len(data) if at == turn else size
        return data

    run(end("inviter", A), end("joiner", B), measure)
    for place in sorted({*range(0, min(size, 40)), *range(40, size, 97), size - 1}):

        def change(at: int, data: bytes, place: int = place) -> bytes:
            return data if at != turn else data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

        events: list[Event] = []
        with contextlib.suppress(SealaneError):  # or it only waits for more: no pairing either
            events = run(end("inviter", A), end("joiner", B), change)
        assert Done not in [type(event) for event in events]


def test_nobody_offers_anothers_certificate() -> None:
    with pytest.raises(SealaneError, match=r"pairing\.mismatch"):
        run(end("inviter", A), end("joiner", M, offered=B))
    with pytest.raises(SealaneError, match=r"pairing\.mismatch"):
        run(end("inviter", M, offered=A), end("joiner", B))


def test_a_name_that_can_be_no_hosts() -> None:
    odd = create_identity("../host a", now=NOW)
    with pytest.raises(SealaneError, match=r"peer\.message"):
        run(end("inviter", A), end("joiner", odd))


def test_reflection() -> None:
    joiner = end("joiner", B)
    with pytest.raises(SealaneError, match=r"peer\.message"):
        joiner.receive(joiner.bytes_to_send())
    with pytest.raises(SealaneError, match=r"pairing\.mismatch"):
        run(end("inviter", B, seed=1), end("joiner", B, seed=2))


def test_a_recorded_pairing_cannot_be_played_again() -> None:
    heard: list[bytes] = []

    def listen(_: int, data: bytes) -> bytes:
        heard.append(data)
        return data

    run(end("inviter", A), end("joiner", B), listen)
    again = end("inviter", A, seed=5)
    with pytest.raises(SealaneError, match=r"pairing\.code"):
        again.receive(heard[0] + heard[2])


def test_accept_only_what_was_offered() -> None:
    with pytest.raises(SealaneError, match=r"internal\.error"):
        end("inviter", A).accept()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["inviter", "joiner"]), st.lists(st.binary(max_size=80), max_size=4))
def test_any_bytes_give_events_or_one_error(side: Side, pieces: list[bytes]) -> None:
    pairing = end(side, A)
    try:
        for piece in pieces:
            assert pairing.receive(piece) == []
    except SealaneError as error:
        assert error.code in {"peer.message", "pairing.code", "pairing.over"}  # noqa: PT017


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=20), st.integers() | st.text(max_size=20) | st.none(), max_size=5))
def test_any_refusal_is_a_known_one_or_a_broken_peer(value: dict[str, object]) -> None:
    joiner = end("joiner", B)
    payload = json.dumps(value).encode()[:190]
    with pytest.raises(SealaneError, match=r"peer\.message"):
        joiner.receive((len(payload) + 1).to_bytes(2, "big") + b"\x05" + payload)


# Codes


def test_the_words_are_256_and_far_apart() -> None:
    assert len(WORDS) == len(set(WORDS)) == len({word[:4] for word in WORDS}) == 256
    assert all(word.isascii() and word.islower() and word.isalpha() and 4 <= len(word) <= 6 for word in WORDS)


def test_codes() -> None:
    assert make_code(lambda _: 0) == "1-acorn-acorn"
    assert make_code(lambda n: n - 1) == f"99-{WORDS[-1]}-{WORDS[-1]}"
    for _ in range(50):
        code = make_code()
        assert normal_code(f"  {code.upper().replace('-', ' ')}\n") == code


@pytest.mark.parametrize(
    "typed",
    ["", "7", "7-orchid", "0-orchid-tempo", "100-orchid-tempo", "7-orchid-tempo-x", "x-y-z", "7-örchid-tempo"],
)
def test_what_can_be_no_code(typed: str) -> None:
    with pytest.raises(SealaneError, match=r"usage\.argument"):
        normal_code(typed)


def test_a_slip_is_recognised() -> None:
    with pytest.raises(SealaneError, match="is it orchid"):
        normal_code("7-orchyd-tempo")


def test_an_offer_too_large_is_our_own_fault() -> None:
    inviter = end("inviter", A)
    inviter._offer = replace(inviter._offer, endorsements={"ek": "A" * 70_000})
    with pytest.raises(SealaneError, match=r"internal\.error"):
        run(inviter, end("joiner", B))
