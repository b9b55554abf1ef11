"""The attested handshake as transcripts: two ends that fit, and everybody who does not."""

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.attest.bundle import encode_bundle, parse_bundle
from sealane.attest.platformlog import Measured, manifest_digest
from sealane.attest.reasons import Level
from sealane.attest.reference import NO_REFERENCE, Reference
from sealane.crypto.identity import Identity, public_key
from sealane.crypto.signatures import parse_public_key
from sealane.errors import AttestationRejected, InternalError, PeerError
from sealane.session.attestation import (
    Action,
    Attestation,
    Attested,
    Conversation,
    Send,
    Subject,
    WantEvidence,
)
from sealane.session.exchange import HEADER, AttestMessage, AttestReader, End, MessageKind
from tests.attest.tpm_rig import PCRS, TpmRig, boot_events
from tests.seal.rig import PROPERTY
from tests.session.attestation_diagram import PAGE, drawn
from tests.session.rig import (
    CODE,
    DESTINATION,
    MIGRATION,
    QEMU,
    SOURCE,
    STRANGER,
    SUBJECT,
    judge,
    platform_log,
    software_evidence,
)

Quote = Callable[[bytes], Mapping[str, bytes]]
Tamper = Callable[[AttestMessage], "list[AttestMessage]"]
EXPORTER = bytes(range(32))
PLATFORM = {"enclave_manifest": [manifest_digest(CODE)], "qemu": [QEMU.digest]}
ROLES = [End.SOURCE, End.DESTINATION]


def certificate(identity: Identity) -> bytes:
    return bytes.fromhex(identity.fingerprint.removeprefix("SHA256:"))


def key_digest(identity: Identity) -> str:
    return parse_public_key(public_key(identity.key_pem)).digest


@dataclass
class Side:
    """One end: its machine, what it was told, and how it ended."""

    role: End
    identity: Identity
    peer: Identity
    exporter: bytes = EXPORTER
    migration: str = MIGRATION
    subject: Subject = SUBJECT
    quote: Quote | None = None
    reference: Reference = NO_REFERENCE
    wanted: dict[str, Any] = field(default_factory=dict)
    attested: list[Attested] = field(default_factory=list)
    error: PeerError | None = None
    said: list[AttestMessage] = field(default_factory=list)

    def __post_init__(self) -> None:
        conversation = Conversation(
            bytes.fromhex(self.migration),
            certificate(self.identity),
            certificate(self.peer),
            self.exporter,
            self.identity.key_pem,
            public_key(self.peer.key_pem),
        )
        subject = self.subject if self.role is End.SOURCE else None
        who = judge(self.peer.name, key_digest(self.peer), reference=self.reference, **self.wanted)
        self.machine = Attestation(self.role, conversation, subject, who, os.urandom)
        self.reader = AttestReader()

    def do(self, step: Callable[[], list[Action]]) -> list[AttestMessage]:
        """What this end says to that; an end that refused says nothing more."""
        said: list[AttestMessage] = []
        if self.error is not None:
            return said
        try:
            actions = step()
            while actions:
                action = actions.pop(0)
                if isinstance(action, WantEvidence):
                    quote = self.quote or (lambda user_data: software_evidence(self.identity, user_data))
                    actions = [*self.machine.evidence_made(quote(action.report_data)), *actions]
                elif isinstance(action, Attested):
                    self.attested.append(action)
                elif isinstance(action, Send):
                    said += AttestReader().receive(action.data)
        except PeerError as error:
            self.error = error
        self.said += said
        return said

    def hear(self, message: AttestMessage) -> list[AttestMessage]:
        return self.do(lambda: self.machine.receive(message))

    @property
    def code(self) -> str | None:
        return self.error.code if self.error else None


def sides(**changes: dict[str, Any]) -> tuple[Side, Side]:
    return (
        Side(End.SOURCE, SOURCE, DESTINATION, **changes.get("source", {})),
        Side(End.DESTINATION, DESTINATION, SOURCE, **changes.get("destination", {})),
    )


def unchanged(message: AttestMessage) -> list[AttestMessage]:
    return [message]


def talk(source: Side, destination: Side, tamper: Tamper = unchanged, *, again: bool = False) -> None:
    """Carry messages both ways until both are silent; `tamper` sits between."""
    begin = source.machine.again if again else source.machine.start
    to_destination = source.do(begin)
    to_source = [] if again else destination.do(destination.machine.start)
    while to_destination or to_source:
        there = [one for message in to_destination for one in tamper(message)]
        back = [one for message in to_source for one in tamper(message)]
        to_source = [answer for message in there for answer in destination.hear(message)]
        to_destination = [answer for message in back for answer in source.hear(message)]


def assert_nothing_begins(*ends: Side) -> None:
    """No page goes before both are attested: at most one end can believe that they are, and its peer says no."""
    assert not all(end.attested for end in ends)


# ---- two ends that fit


def test_both_ends_know_each_other_and_share_a_secret() -> None:
    source, destination = sides()
    talk(source, destination)
    assert (source.code, destination.code) == (None, None)
    (here,), (there,) = source.attested, destination.attested
    assert here.secret == there.secret
    assert len(here.secret) == 32
    assert here.subject == there.subject == SUBJECT
    assert here.peer_level == int(there.verdict.level) == 1
    assert set(here.evidence) == {"platform-log", "software.statement"}
    kinds = [message.kind.name for message in source.said + destination.said]
    assert kinds == ["CHALLENGE", "SHOW", "M1", "M3", "CHALLENGE", "SHOW", "M2", "M4"]


def test_keys_and_signatures_are_as_the_documentation_has_them() -> None:
    """Computed anew from docs/handshake.md ("What is bound to what"), so that no ingredient can be left out unnoticed."""

    def expand(key: bytes, info: bytes) -> bytes:  # RFC 5869, one block
        return hmac.digest(key, info + b"\x01", "sha256")

    source, destination = sides()
    talk(source, destination)
    said = {(end.role, message.kind): message for end in (source, destination) for message in end.said}
    begun = [said[end, kind] for kind in (MessageKind.CHALLENGE, MessageKind.SHOW) for end in ROLES]
    seeds = b"".join(message.body[:32] for message in begun[2:])
    secret = hmac.digest(EXPORTER, seeds, "sha256")
    transcript = first = hashlib.sha256(b"".join(message.encode() for message in begun)).digest()
    for kind, end in zip([MessageKind.M1, MessageKind.M2, MessageKind.M3, MessageKind.M4], ROLES * 2, strict=True):
        message = said[end, kind]
        key = expand(secret, b"sealane v1 attest mac" + bytes([end.number]) + first)
        assert message.mac == hmac.digest(key, transcript + message.authenticated, "sha256")
        transcript = hashlib.sha256(transcript + message.encode()).digest()
        if kind in {MessageKind.M2, MessageKind.M3}:
            nonces, signature, logs = message.body[:64], message.body[64:128], message.body[128:]
            signed = b"sealane v1 logs" + bytes([end.number]) + first + nonces + hashlib.sha256(logs).digest()
            identity = SOURCE if end is End.SOURCE else DESTINATION
            parse_public_key(public_key(identity.key_pem)).verify_ed25519(signature, signed)
    assert source.attested[0].secret == expand(secret, b"sealane v1 migration" + transcript)


def test_no_secret_nonce_or_seed_comes_twice() -> None:
    secrets, bodies = set(), set()
    for _ in range(3):
        source, destination = sides()
        talk(source, destination)
        secrets.add(source.attested[0].secret)
        bodies |= {message.encode() for message in (*source.said, *destination.said)}
    assert len(secrets) == 3
    assert len(bodies) == 24


def test_the_secret_follows_from_the_exporter_and_both_seeds() -> None:
    source, destination = sides(source={"exporter": bytes(32)})
    talk(source, destination)
    assert source.code == "attest.binding"
    assert_nothing_begins(source, destination)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_messages_come_whole_under_any_cut(size: int) -> None:
    source, destination = sides()
    talk(source, destination)
    stream = b"".join(message.encode() for message in source.said)
    reader = AttestReader()
    heard = [one for at in range(0, len(stream), size) for one in reader.receive(stream[at : at + size])]
    assert heard == source.said


# ---- what an attacker between them can do


def changing(
    kind: MessageKind, sender: End, change: Callable[[AttestMessage], "AttestMessage | list[AttestMessage]"]
) -> Tamper:
    def tamper(message: AttestMessage) -> list[AttestMessage]:
        if message.kind is not kind or message.sender is not sender:
            return [message]
        changed = change(message)
        return changed if isinstance(changed, list) else [changed]

    return tamper


def refused_by(judging: End, tamper: Tamper, **changes: dict[str, Any]) -> str | None:
    source, destination = sides(**changes)
    talk(source, destination, tamper)
    assert_nothing_begins(source, destination)
    return (source if judging is End.SOURCE else destination).code


@pytest.mark.parametrize("victim", ROLES)
def test_reflection(victim: End) -> None:
    """The victim's own messages come back to it, each in its turn."""
    for kind in (MessageKind.CHALLENGE, MessageKind.SHOW):
        ends = dict(zip(ROLES, sides(), strict=True))
        own = ends[victim]
        sent = own.do(own.machine.start)
        if kind is MessageKind.SHOW:
            other = ends[victim.peer]
            challenge = other.do(other.machine.start)[0]
            sent = own.hear(challenge)
        own.hear(sent[0])
        assert own.code == "attest.role"


@pytest.mark.parametrize("victim", ROLES)
def test_swapped_role(victim: End) -> None:
    """Reflected and relabelled: the role is in what is quoted, too."""
    ends = dict(zip(ROLES, sides(), strict=True))
    own, other = ends[victim], ends[victim.peer]
    own.do(own.machine.start)
    shown = own.hear(other.do(other.machine.start)[0])[0]
    own.hear(replace(shown, sender=victim.peer))
    assert own.code == "attest.binding"  # even the seed is our own
    ends = dict(zip(ROLES, sides(), strict=True))
    own = ends[victim]
    own.do(own.machine.start)
    own.hear(replace(own.said[0], sender=victim.peer))
    assert own.code in {"attest.nonce", "attest.migration"}


@pytest.mark.parametrize("judging", ROLES)
def test_relay_through_a_third_host(judging: End) -> None:
    """The evidence is the right host's, fresh and for these nonces, but made for the attacker's channel with that host."""
    far = Side(judging.peer, DESTINATION if judging is End.SOURCE else SOURCE, STRANGER, exporter=bytes(32))
    near = Side(judging, SOURCE if judging is End.SOURCE else DESTINATION, far.identity)
    challenge = near.do(near.machine.start)[0]
    said = far.do(far.machine.start) + far.hear(challenge)
    for message in said:
        near.hear(message)
    assert near.code == "attest.binding"


@pytest.mark.parametrize("judging", ROLES)
def test_replayed_quote(judging: End) -> None:
    """Yesterday's SHOW of the right host, word for word, and with today's header."""
    earlier = sides()
    talk(*earlier)
    old = next(
        one for end in earlier for one in end.said if one.kind is MessageKind.SHOW and one.sender is judging.peer
    )
    assert refused_by(judging, changing(MessageKind.SHOW, judging.peer, lambda _: old)) == "attest.nonce"
    dressed = changing(MessageKind.SHOW, judging.peer, lambda message: replace(message, body=old.body))
    assert refused_by(judging, dressed) == "attest.binding"


@pytest.mark.parametrize("judging", ROLES)
@pytest.mark.parametrize("kind", list(MessageKind))
def test_stale_nonce(judging: End, kind: MessageKind) -> None:
    sender = judging.peer
    if kind in {MessageKind.M1, MessageKind.M3} and sender is End.DESTINATION:
        return
    if kind in {MessageKind.M2, MessageKind.M4} and sender is End.SOURCE:
        return
    stale = changing(kind, sender, lambda message: replace(message, nonce_source=b"\x05" * 32))
    expected = {"attest.nonce", "attest.authentication"}
    if kind is MessageKind.CHALLENGE and judging is End.DESTINATION:
        expected.add("attest.binding")  # a challenge's own nonce may be anything: what is quoted then fits no other
        source, destination = sides()
        talk(source, destination, stale)
        assert {source.code, destination.code} & {"attest.nonce", "attest.binding"}
        assert_nothing_begins(source, destination)
        return
    assert refused_by(judging, stale) in expected


def test_an_empty_nonce_and_ours_sent_back() -> None:
    for nonce in (bytes(32), None):
        source, destination = sides()
        own = source.do(source.machine.start)[0]
        theirs = destination.do(destination.machine.start)[0]
        source.hear(replace(theirs, nonce_destination=own.nonce_source if nonce is None else nonce))
        assert source.code == "attest.nonce"


@pytest.mark.parametrize("judging", ROLES)
def test_evidence_of_another_migration(judging: End) -> None:
    other = "f" * 32
    assert refused_by(judging, unchanged, **{judging.peer.value: {"migration": other}}) == "attest.migration"
    # the same with a header that lies: what is quoted does not
    ends = dict(zip(ROLES, sides(**{judging.peer.value: {"migration": other}}), strict=True))
    near, far = ends[judging], ends[judging.peer]
    challenge = near.do(near.machine.start)[0]
    said = far.do(far.machine.start) + far.hear(replace(challenge, migration=bytes.fromhex(other)))
    for message in said:
        near.hear(replace(message, migration=bytes.fromhex(MIGRATION)))
    assert near.code == "attest.binding"


def test_evidence_for_another_epoch_or_vm() -> None:
    later = changing(MessageKind.CHALLENGE, End.SOURCE, lambda message: replace(message, epoch=SUBJECT.epoch + 1))
    source, destination = sides()
    talk(source, destination, later)
    assert {source.code, destination.code} == {"attest.migration"}
    other = changing(MessageKind.CHALLENGE, End.SOURCE, lambda message: replace(message, body=b"another"))
    source, destination = sides()
    talk(source, destination, other)
    assert "attest.binding" in {source.code, destination.code}
    assert_nothing_begins(source, destination)
    nameless = changing(MessageKind.CHALLENGE, End.SOURCE, lambda message: replace(message, body=b"\xff"))
    assert refused_by(End.DESTINATION, nameless) == "attest.migration"


@pytest.mark.parametrize("judging", ROLES)
def test_seeds_swapped(judging: End) -> None:
    """Each end's seed in the other's SHOW."""
    seeds: dict[End, bytes] = {}

    def swap(message: AttestMessage) -> list[AttestMessage]:
        if message.kind is not MessageKind.SHOW or message.sender is None:
            return [message]
        seeds[message.sender] = message.body[:32]
        other = seeds.get(message.sender.peer, b"\x07" * 32)
        return [replace(message, body=other + message.body[32:])]

    assert refused_by(judging, swap) == "attest.binding"


@pytest.mark.parametrize("kind", [MessageKind.M1, MessageKind.M2, MessageKind.M3, MessageKind.M4])
def test_a_flipped_bit_in_phase_2(kind: MessageKind) -> None:
    sender = End.SOURCE if kind in {MessageKind.M1, MessageKind.M3} else End.DESTINATION
    for place in (0, -1):
        flip = changing(kind, sender, partial(_flip_body, at=place))
        assert refused_by(sender.peer, flip) == "attest.authentication"
    cut = changing(kind, sender, lambda message: replace(message, mac=bytes(32)))
    assert refused_by(sender.peer, cut) == "attest.authentication"


def _flip_body(message: AttestMessage, at: int) -> AttestMessage:
    changed = bytearray(message.body)
    changed[at] ^= 1
    return replace(message, body=bytes(changed))


@pytest.mark.parametrize("kind", list(MessageKind))
def test_a_message_twice_or_never(kind: MessageKind) -> None:
    sender = End.SOURCE if kind in {MessageKind.M1, MessageKind.M3} else End.DESTINATION
    twice = changing(kind, sender, lambda message: [message, message])
    source, destination = sides()
    talk(source, destination, twice)
    heard = destination if sender is End.SOURCE else source
    assert heard.code in {"attest.order", "attest.nonce"}
    source, destination = sides()
    talk(source, destination, changing(kind, sender, lambda _: []))
    assert_nothing_begins(source, destination)


def test_every_message_out_of_turn() -> None:
    """In each state, every kind that the table does not have there."""
    spoken = sides()
    talk(*spoken)
    for role in ROLES:
        ours = [one for end in spoken for one in end.said if one.sender is role.peer]
        for message in ours:
            if message.kind is MessageKind.CHALLENGE:
                continue
            end = dict(zip(ROLES, sides(), strict=True))[role]
            end.do(end.machine.start)
            end.hear(message)
            assert end.code == "attest.order"


# ---- what a peer runs


def evidence_with(log: bytes, identity: Identity) -> Quote:
    return lambda user_data: software_evidence(identity, user_data, log)


@pytest.mark.parametrize("judging", ROLES)
@pytest.mark.parametrize(
    ("log", "code"),
    [
        (platform_log(*CODE, replace(QEMU, digest="sha256:" + "12" + "11" * 31)), "attest.qemu-changed"),
        (platform_log(*CODE[:2], replace(CODE[2], digest="sha256:" + "ee" * 32), QEMU), "attest.enclave-changed"),
        (platform_log(*CODE[:2], QEMU), "attest.enclave-changed"),
        (platform_log(*CODE), "attest.qemu-changed"),
        (b"[]\n", "attest.refused"),
    ],
    ids=["QEMU changed by a byte", "enclave changed", "enclave without a file", "no QEMU", "no log"],
)
def test_a_peer_that_runs_something_else(judging: End, log: bytes, code: str) -> None:
    reference = NO_REFERENCE.model_validate({"version": 1, "platform": PLATFORM})
    peer = DESTINATION if judging is End.SOURCE else SOURCE
    changes: dict[str, dict[str, Any]] = {
        judging.value: {"reference": reference},
        judging.peer.value: {"quote": evidence_with(log, peer)},
    }
    assert refused_by(judging, unchanged, **changes) == code
    changes[judging.peer.value] = {}
    source, destination = sides(**changes)
    talk(source, destination)
    assert (source.code, destination.code) == (None, None)


def tpm_quote(**changes: Any) -> tuple[TpmRig, Quote]:
    """A host whose TPM quotes boot, IMA and platform log."""
    rig = TpmRig(platform=(platform_log().rstrip(b"\n"),), pcrs=(*PCRS, 13), leave_out=(), **changes)
    names = {"boot": "boot-log", "ima": "runtime-log", "platform": "platform-log"}

    def quote(user_data: bytes) -> Mapping[str, bytes]:
        rig.nonce = user_data
        return {names.get(name, f"tpm.{name}"): content for name, content in rig.files().items()}

    return rig, quote


def tpm_reference(rig: TpmRig, **changes: Any) -> Reference:
    values = {"platform": PLATFORM, "user_data": None, **changes}
    return rig.reference(**values)


def test_a_software_tpm_reaches_level_3_only_where_test_roots_are_accepted() -> None:
    rig, quote = tpm_quote()
    wanted = {"least_level": 3, "accepted_test_roots": ["software-tpm"]}
    ends: dict[str, dict[str, Any]] = {
        "source": {"reference": tpm_reference(rig), "wanted": wanted},
        "destination": {"quote": quote},
    }
    source, destination = sides(**ends)
    talk(source, destination)
    assert (source.code, destination.code) == (None, None)
    verdict = source.attested[0].verdict
    assert verdict.level is Level.HARDWARE_ROOTED
    assert verdict.production_level is Level.NOTHING
    assert [one.root for one in verdict.appraisals] == ["TPM host-a (software)"]


def unknown_key(rig: TpmRig) -> Reference:
    return tpm_reference(rig, tpm={"keys": [{"digest": "00" * 32, "root": "hardware", "name": "another"}]})


@pytest.mark.parametrize(
    ("rig_changes", "reference_of", "wanted", "code"),
    [
        ({}, tpm_reference, {"least_level": 3}, "attest.test-root"),
        ({}, unknown_key, {}, "attest.host-unknown"),
        ({"told_events": [one for one in boot_events() if one[0] != 9]}, tpm_reference, {}, "attest.log-replay"),
        ({"told_platform": platform_log(*CODE, QEMU, QEMU)}, tpm_reference, {}, "attest.log-replay"),
        ({}, lambda rig: tpm_reference(rig, ima=None), {"least_level": 3}, "attest.level"),
        ({"spoil": True}, tpm_reference, {}, "attest.refused"),
        ({}, lambda rig: tpm_reference(rig, peers={"somebody": [f"ak:{rig.digest}"]}), {}, "attest.host-unknown"),
    ],
    ids=["test root", "unknown key", "boot log", "platform log", "level", "signature", "host not named"],
)
def test_a_tpm_that_is_refused(
    rig_changes: dict[str, Any], reference_of: Callable[[TpmRig], Reference], wanted: dict[str, Any], code: str
) -> None:
    rig, quote = tpm_quote(**rig_changes)
    accepted = [] if code == "attest.test-root" else ["software-tpm"]
    ends: dict[str, dict[str, Any]] = {
        "source": {"reference": reference_of(rig), "wanted": {**wanted, "accepted_test_roots": accepted}},
        "destination": {"quote": quote},
    }
    assert refused_by(End.SOURCE, unchanged, **ends) == code


def test_a_level_that_is_too_low_for_a_plain_key() -> None:
    assert refused_by(End.DESTINATION, unchanged, destination={"wanted": {"least_level": 2}}) == "attest.level"


@pytest.mark.parametrize("judging", ROLES)
def test_evidence_that_is_none(judging: End) -> None:
    for pieces in ({}, {"platform-log": platform_log()}, {"software.statement": b"{}"}, {"a": b"what is this"}):
        nothing: Quote = lambda _, said=pieces: said  # type: ignore[misc] # noqa: E731
        assert refused_by(judging, unchanged, **{judging.peer.value: {"quote": nothing}}) == "attest.refused"
    stranger: Quote = lambda user_data: software_evidence(STRANGER, user_data)  # noqa: E731
    assert refused_by(judging, unchanged, **{judging.peer.value: {"quote": stranger}}) == "attest.host-unknown"


# ---- later rounds


def test_a_later_round_has_new_nonces_and_keeps_the_secret() -> None:
    source, destination = sides()
    talk(source, destination)
    talk(source, destination, again=True)
    assert [one.round for one in source.attested] == [one.round for one in destination.attested] == [0, 1]
    assert source.machine.first is source.attested[0]
    nonces = {message.nonce_source for message in source.said}
    assert len(nonces) == 2
    with pytest.raises(InternalError):
        destination.machine.again()


def test_a_nonce_of_an_earlier_round_is_refused() -> None:
    source, destination = sides()
    talk(source, destination)
    old = next(one for one in source.said if one.kind is MessageKind.CHALLENGE)
    destination.hear(replace(old, round=1))
    assert destination.code == "attest.nonce"


def test_a_peer_that_changed_meanwhile() -> None:
    reference = NO_REFERENCE.model_validate({"version": 1, "platform": PLATFORM})
    source, destination = sides(source={"reference": reference})
    talk(source, destination)
    evil = platform_log(*CODE, QEMU, Measured("qemu", "/tmp/q", "sha256:" + "66" * 32))
    destination.quote = evidence_with(evil, DESTINATION)
    talk(source, destination, again=True)
    assert source.code == "attest.qemu-changed"


def test_a_peer_whose_root_changed_meanwhile() -> None:
    rig, quote = tpm_quote()
    wanted = {"accepted_test_roots": ["software-tpm"]}
    source, destination = sides(
        source={"reference": tpm_reference(rig), "wanted": wanted}, destination={"quote": quote}
    )
    talk(source, destination)
    assert source.code is None
    destination.quote = None
    talk(source, destination, again=True)
    assert source.code == "attest.changed"


def test_a_peer_whose_level_fell_meanwhile() -> None:
    rig, quote = tpm_quote()
    wanted = {"accepted_test_roots": ["software-tpm"]}
    source, destination = sides(
        source={"reference": tpm_reference(rig), "wanted": wanted}, destination={"quote": quote}
    )
    talk(source, destination)
    assert source.attested[0].verdict.level is Level.HARDWARE_ROOTED
    rig.leave_out = ("ima",)
    talk(source, destination, again=True)
    assert source.code == "attest.changed"
    assert source.error is not None
    assert "level 3 and has 2 now" in source.error.detail


def test_a_peer_that_quotes_with_another_tpm_meanwhile() -> None:
    (one, quote), (other, another) = tpm_quote(), tpm_quote()
    keys = [{"digest": rig.digest, "root": "software", "name": name} for rig, name in ((one, "one"), (other, "other"))]
    reference = tpm_reference(one, tpm={"keys": keys}, hosts=[f"ak:{one.digest}", f"ak:{other.digest}"])
    source, destination = sides(
        source={"reference": reference, "wanted": {"accepted_test_roots": ["software-tpm"]}},
        destination={"quote": quote},
    )
    talk(source, destination)
    destination.quote = another
    talk(source, destination, again=True)
    assert source.code == "attest.changed"
    assert source.error is not None
    assert "another root" in source.error.detail


# ---- a peer that holds every key and does not keep to the messages


Body = Callable[[bytes], bytes]


def lying(far: End, kind: MessageKind, change: Body, *, nonces: Body | None = None) -> str | None:
    """The code with which the near end refuses, where the far one changes a body before it authenticates it."""
    ends = dict(zip(ROLES, sides(), strict=True))
    round_ = ends[far].machine._round
    say, signed = round_._say, round_._signed_logs
    round_._say = lambda said, body: say(said, change(body) if said is kind else body)  # type: ignore[method-assign,assignment]
    if nonces is not None:
        round_._signed_logs = lambda asked: signed(nonces(asked))  # type: ignore[method-assign,assignment]
    talk(ends[End.SOURCE], ends[End.DESTINATION])
    assert_nothing_begins(*ends.values())
    return ends[far.peer].code


def other_nonce(body: bytes) -> bytes:
    return b"\x09" * 32 + body[32:]


@pytest.mark.parametrize(
    ("far", "kind", "change", "nonces", "code"),
    [
        (End.SOURCE, MessageKind.M1, lambda body: body + b"x", None, "attest.nonce"),
        (End.DESTINATION, MessageKind.M2, other_nonce, other_nonce, "attest.nonce"),
        (End.SOURCE, MessageKind.M3, other_nonce, other_nonce, "attest.nonce"),
        (End.DESTINATION, MessageKind.M2, other_nonce, None, "attest.nonce"),
        (End.DESTINATION, MessageKind.M4, other_nonce, None, "attest.nonce"),
        (End.DESTINATION, MessageKind.M4, lambda body: body + b"x", None, "attest.nonce"),
        (End.DESTINATION, MessageKind.CHALLENGE, lambda _: b"vm", None, "attest.migration"),
    ],
)  # fmt: skip
def test_a_body_that_does_not_answer(far: End, kind: MessageKind, change: Body, nonces: Body | None, code: str) -> None:
    assert lying(far, kind, change, nonces=nonces) == code


@pytest.mark.parametrize("far", ROLES)
def test_logs_that_another_key_signed(far: End) -> None:
    ends = dict(zip(ROLES, sides(), strict=True))
    round_ = ends[far].machine._round
    round_._conversation = replace(round_._conversation, key_pem=STRANGER.key_pem)
    talk(ends[End.SOURCE], ends[End.DESTINATION])
    assert ends[far.peer].code == "attest.authentication"
    assert_nothing_begins(*ends.values())


@pytest.mark.parametrize("far", ROLES)
def test_logs_before_they_are_asked_for_and_evidence_after(far: End) -> None:
    identity = SOURCE if far is End.SOURCE else DESTINATION

    def early(body: bytes) -> bytes:
        return body[:32] + encode_bundle({**parse_bundle(body[32:]), "platform-log": platform_log()})

    assert lying(far, MessageKind.SHOW, early) == "attest.order"
    ends = dict(zip(ROLES, sides(), strict=True))
    round_ = ends[far].machine._round
    signed = round_._signed_logs

    def late(nonces: bytes) -> bytes:
        round_._logs["software.statement"] = software_evidence(identity, nonces)["software.statement"]
        return signed(nonces)

    round_._signed_logs = late  # type: ignore[method-assign]
    talk(ends[End.SOURCE], ends[End.DESTINATION])
    assert ends[far.peer].code == "attest.order"


@pytest.mark.parametrize("far", ROLES)
def test_a_seed_that_is_none_or_ours(far: End) -> None:
    for seed in (bytes(32), None):
        ends = dict(zip(ROLES, sides(), strict=True))
        near = ends[far.peer].machine._round
        ends[far].machine._round._seeds[far] = near._seeds[far.peer] if seed is None else seed
        talk(ends[End.SOURCE], ends[End.DESTINATION])
        assert ends[far.peer].code == "attest.binding"


# ---- bytes


@PROPERTY
@given(st.binary(max_size=400))
def test_any_bytes_give_messages_or_one_typed_error(data: bytes) -> None:
    try:
        messages = AttestReader().receive(data)
    except PeerError as error:
        assert error.code in {"peer.message", "peer.version"}  # noqa: PT017
    else:
        assert sum(len(message.encode()) for message in messages) <= len(data)


@PROPERTY
@given(st.data())
def test_any_body_in_any_message_is_refused_or_out_of_turn(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(MessageKind)))
    body = data.draw(st.binary(max_size=300))
    source, destination = sides()
    sender = data.draw(st.sampled_from(ROLES))
    talk(source, destination, changing(kind, sender, lambda message: replace(message, body=body)))
    for end in (source, destination):
        assert end.error is None or isinstance(end.error, AttestationRejected)


def test_headers_that_cannot_be() -> None:
    good = HEADER.pack(1, 1, 1, 0, 0, bytes(16), 0, bytes(32), bytes(32), 0)
    assert len(AttestReader().receive(good)) == 1
    for at, value, code in (
        (0, 2, "peer.version"),
        (1, 9, "peer.message"),
        (3, 1, "peer.message"),
        (96, 255, "peer.message"),
    ):
        with pytest.raises(PeerError) as raised:
            AttestReader().receive(good[:at] + bytes([value]) + good[at + 1 :])
        assert raised.value.code == code


def test_the_diagram_is_that_of_the_table() -> None:
    assert drawn(PAGE.read_text()) == PAGE.read_text()
