"""The attested handshake without I/O: mutual remote attestation, then the exchange of measurement logs.

Phase 1, in both directions: a nonce goes over, and evidence that names it comes back with a key seed. What is quoted:

    REPORTDATA = SHA-256("sealane v1 report" || role u8 || peer's nonce || own nonce || TLS exporter || own certificate ||
                         peer's certificate || seed || migration id || round u32 || epoch u64 || length u8 || VM's name)

certificates by their SHA-256. Phase 2, authenticated under a key of both seeds and the exporter: M1 asks for the
destination's logs, M2 brings them, signed, and asks for the source's, M3 brings those, M4 says that they are accepted.

    secret  = HKDF-Extract(exporter, source's seed || destination's seed)
    T1      = SHA-256(CHALLENGE of source || CHALLENGE of destination || SHOW of source || SHOW of destination)
    T(n+1)  = SHA-256(T(n) || message)                                 for M1 to M4, with their MACs
    MAC key = HKDF-Expand(secret, "sealane v1 attest mac" || role u8 || T1, 32), MAC = HMAC(key, T(n) || message)

A later round (re-attestation) is the same again with new nonces and seeds and the next number; the lanes' keys stay those
of round 0. Which message may come when stands in TRANSITIONS; everything else is refused.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol, TypeAlias

from sealane.attest.bundle import LOGS, encode_bundle, parse_bundle
from sealane.attest.peer import PeerRejected, digests_of
from sealane.attest.verdict import Verdict
from sealane.crypto.identity import sign
from sealane.crypto.kdf import authenticate, expand, extract, same
from sealane.crypto.signatures import SignatureInvalid, parse_public_key
from sealane.errors import AttestationRejected, EvidenceError, InternalError
from sealane.session.exchange import (
    NO_NONCE,
    NONCE_BYTES,
    SEED_BYTES,
    SIGNATURE_BYTES,
    VM_NAME_MAX,
    AttestMessage,
    End,
    MessageKind,
)

_REPORT_LABEL: Final = b"sealane v1 report"
_MAC_LABEL: Final = b"sealane v1 attest mac"
_LOGS_LABEL: Final = b"sealane v1 logs"
_SECRET_LABEL: Final = b"sealane v1 migration"
REPORT_DATA_BYTES: Final = 32


class State(StrEnum):
    """Where a round stands."""

    CHALLENGED = "challenged"  # our nonce is out
    QUOTING = "quoting"  # the root of trust is asked
    QUOTING_PEER_SHOWN = "quoting-peer-shown"
    SHOWN = "shown"  # our evidence is out
    BOTH_SHOWN = "both-shown"  # destination: waits for M1
    M1_SENT = "m1-sent"
    M2_SENT = "m2-sent"
    M3_SENT = "m3-sent"
    ATTESTED = "attested"


class Input(StrEnum):
    """What happened."""

    PEER_CHALLENGED = "peer-challenged"
    EVIDENCE_MADE = "evidence-made"
    PEER_SHOWED = "peer-showed"
    M1 = "m1"
    M2 = "m2"
    M3 = "m3"
    M4 = "m4"


TRANSITIONS: Final[Mapping[End, Mapping[State, Mapping[Input, State]]]] = {
    End.SOURCE: {
        State.CHALLENGED: {Input.PEER_CHALLENGED: State.QUOTING},
        State.QUOTING: {Input.EVIDENCE_MADE: State.SHOWN, Input.PEER_SHOWED: State.QUOTING_PEER_SHOWN},
        State.QUOTING_PEER_SHOWN: {Input.EVIDENCE_MADE: State.M1_SENT},
        State.SHOWN: {Input.PEER_SHOWED: State.M1_SENT},
        State.M1_SENT: {Input.M2: State.M3_SENT},
        State.M3_SENT: {Input.M4: State.ATTESTED},
        State.ATTESTED: {},
    },
    End.DESTINATION: {
        State.CHALLENGED: {Input.PEER_CHALLENGED: State.QUOTING},
        State.QUOTING: {Input.EVIDENCE_MADE: State.SHOWN, Input.PEER_SHOWED: State.QUOTING_PEER_SHOWN},
        State.QUOTING_PEER_SHOWN: {Input.EVIDENCE_MADE: State.BOTH_SHOWN},
        State.SHOWN: {Input.PEER_SHOWED: State.BOTH_SHOWN},
        State.BOTH_SHOWN: {Input.M1: State.M2_SENT},
        State.M2_SENT: {Input.M3: State.ATTESTED},
        State.ATTESTED: {},
    },
}

_INPUT_OF: Final = {
    MessageKind.CHALLENGE: Input.PEER_CHALLENGED,
    MessageKind.SHOW: Input.PEER_SHOWED,
    MessageKind.M1: Input.M1,
    MessageKind.M2: Input.M2,
    MessageKind.M3: Input.M3,
    MessageKind.M4: Input.M4,
}


class Judge(Protocol):
    """Who appraises the peer; `sealane.attest.peer.PeerJudge` in earnest. Both raise AttestationRejected."""

    def check_shown(self, evidence: Mapping[str, bytes], report_data: bytes) -> None:
        """What is quoted, before any log came: signatures, binding, who it is."""

    def appraise(self, evidence: Mapping[str, bytes], report_data: bytes) -> Verdict:
        """All of it; the verdict is an accepted one."""


@dataclass(frozen=True)
class Subject:
    """What is migrated; the source says it, and both ends' evidence names it."""

    vm: str
    epoch: int


@dataclass(frozen=True)
class Conversation:
    """What both ends know of their channel before the first round; all of it goes into what is quoted."""

    migration: bytes
    own_certificate: bytes
    peer_certificate: bytes
    exporter: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    peer_key: bytes = field(repr=False)


@dataclass(frozen=True)
class Send:
    """Send this to the peer."""

    data: bytes

    def __repr__(self) -> str:
        return f"Send({len(self.data)} bytes)"


@dataclass(frozen=True)
class WantEvidence:
    """Have the root of trust quote these user data for this VM; give the bundle to `evidence_made`."""

    report_data: bytes
    vm: str


@dataclass(frozen=True)
class Attested:
    """The round is over: each end accepted the other. `peer_level` is the level that the peer found in us (M4; else None)."""

    round: int
    verdict: Verdict
    subject: Subject
    evidence: Mapping[str, str]
    secret: bytes = field(repr=False)
    peer_level: int | None = None


@dataclass(frozen=True)
class Known:
    """What an end knows in the middle of a round. The subject is what the peer claims until both are attested."""

    subject: Subject | None
    verdict: Verdict | None
    evidence: Mapping[str, str]


Action: TypeAlias = Send | WantEvidence | Attested
Random: TypeAlias = Callable[[int], bytes]


def report_data(
    role: End,
    conversation: Conversation,
    subject: Subject,
    *,
    seed: bytes,
    peer_nonce: bytes,
    own_nonce: bytes,
    round_number: int,
) -> bytes:
    """What `role`'s evidence has to name; the conversation is seen from that role's end."""
    vm = subject.vm.encode()
    return hashlib.sha256(
        _REPORT_LABEL
        + bytes([role.number])
        + peer_nonce
        + own_nonce
        + conversation.exporter
        + conversation.own_certificate
        + conversation.peer_certificate
        + seed
        + conversation.migration
        + struct.pack(">IQB", round_number, subject.epoch, len(vm))
        + vm
    ).digest()


class Round:
    """One round at one end. `start` it; each method gives the actions that follow, or raises AttestationRejected."""

    def __init__(
        self, role: End, conversation: Conversation, subject: Subject | None, judge: Judge, random: Random, number: int
    ) -> None:
        if (subject is None) != (role is End.DESTINATION):
            raise InternalError("internal.error", "the source knows what is migrated, the destination hears it")
        self.role, self.number, self.state = role, number, State.CHALLENGED
        self._conversation, self._subject, self._judge, self._random = conversation, subject, judge, random
        self._nonces = {role: random(NONCE_BYTES), role.peer: NO_NONCE}
        self._seeds: dict[End, bytes] = {role: random(SEED_BYTES)}
        self._shown: dict[str, bytes] = {}  # the peer's evidence
        self._logs: dict[str, bytes] = {}  # our logs, from the moment of our quote
        self._sent: dict[tuple[End, MessageKind], bytes] = {}
        self._asked = NO_NONCE  # our nonce of phase 2 that the peer has to name
        self._transcript = self._first = b""  # T(n), T1
        self._secret = b""
        self._verdict: Verdict | None = None

    @property
    def peer_nonce(self) -> bytes:
        """The peer's challenge; zeros before it came."""
        return self._nonces[self.role.peer]

    @property
    def known(self) -> "Known":
        """What is known by now; also after this round was refused."""
        return Known(self._subject, self._verdict, digests_of(self._shown))

    def start(self) -> list[Action]:
        """Our challenge."""
        body = self._subject.vm.encode() if self._subject is not None else b""
        return [self._say(MessageKind.CHALLENGE, body)]

    def receive(self, message: AttestMessage) -> list[Action]:
        """A message of the peer."""
        happened = _INPUT_OF[message.kind]
        following = TRANSITIONS[self.role][self.state].get(happened)
        self._check_sender(message)
        if following is None:
            raise AttestationRejected("attest.order", f"{message.kind.name} came while this end was {self.state}")
        self._check_claims(message)
        if message.kind.has_mac:
            self._check_mac(message)
        self._sent[self.role.peer, message.kind] = message.encode()
        actions = _HANDLERS[message.kind](self, message.body)
        self.state = following
        return [*actions, *self._arrived()]

    def evidence_made(self, pieces: Mapping[str, bytes]) -> list[Action]:
        """The bundle that WantEvidence asked for."""
        following = TRANSITIONS[self.role][self.state].get(Input.EVIDENCE_MADE)
        if following is None:
            raise InternalError("internal.error", f"evidence came while this end was {self.state}")
        self.state = following
        self._logs = {name: content for name, content in pieces.items() if name in LOGS}
        shown = {name: content for name, content in pieces.items() if name not in LOGS}
        actions: list[Action] = [self._say(MessageKind.SHOW, self._seeds[self.role] + encode_bundle(shown))]
        return [*actions, *self._arrived()]

    # ---- what every message must say

    def _check_sender(self, message: AttestMessage) -> None:
        if message.sender is not self.role.peer:
            raise AttestationRejected("attest.role", f"{message.kind.name} does not come from a {self.role.peer}")

    def _check_claims(self, message: AttestMessage) -> None:
        if message.migration != self._conversation.migration or message.round != self.number:
            raise AttestationRejected("attest.migration", f"{message.kind.name} is of another migration or round")
        nonces = {End.SOURCE: message.nonce_source, End.DESTINATION: message.nonce_destination}
        if message.kind is MessageKind.CHALLENGE:
            if not any(nonces[self.role.peer]) or nonces[self.role.peer] == self._nonces[self.role]:
                raise AttestationRejected("attest.nonce", "the peer's nonce is empty, or our own")
            if any(nonces[self.role]):
                raise AttestationRejected("attest.nonce", "the peer's challenge answers one that was never sent")
            self._nonces[self.role.peer] = nonces[self.role.peer]
        elif nonces != self._nonces:
            raise AttestationRejected("attest.nonce", f"{message.kind.name} names another nonce than this round's")
        if self.role is End.SOURCE or message.kind is not MessageKind.CHALLENGE:
            epoch = self._subject.epoch if self._subject is not None else None
            expected = 0 if message.kind is MessageKind.CHALLENGE else epoch
            if message.epoch != expected:
                raise AttestationRejected("attest.migration", f"{message.kind.name} is for another epoch of the VM")
        else:
            self._hear_subject(message)

    def _hear_subject(self, message: AttestMessage) -> None:
        name = message.body.decode("utf-8", "replace")
        if not 1 <= len(message.body) <= VM_NAME_MAX or not name.isprintable() or "\ufffd" in name:
            raise AttestationRejected("attest.migration", "the challenge names no VM")
        self._subject = Subject(name, message.epoch)

    def _check_mac(self, message: AttestMessage) -> None:
        mac = authenticate(self._mac_key(self.role.peer), self._transcript + message.authenticated)
        if not same(mac, message.mac):
            raise AttestationRejected(
                "attest.authentication", f"{message.kind.name} was not made with this round's key"
            )
        self._transcript = hashlib.sha256(self._transcript + message.encode()).digest()

    # ---- what each message does

    def _on_challenge(self, body: bytes) -> list[Action]:
        if self.role is End.SOURCE and body:
            raise AttestationRejected("attest.migration", "the destination's challenge names a VM")
        return [WantEvidence(self._report_data(self.role), self._need_subject().vm)]

    def _on_show(self, body: bytes) -> list[Action]:
        seed, shown = body[:SEED_BYTES], body[SEED_BYTES:]
        if len(seed) != SEED_BYTES or not any(seed) or seed == self._seeds[self.role]:
            raise AttestationRejected("attest.binding", "the peer's seed is missing, empty, or our own")
        self._seeds[self.role.peer] = seed
        self._shown = _pieces(shown)
        if LOGS & set(self._shown):
            raise AttestationRejected("attest.order", "a log came with the evidence, before it was asked for")
        self._judge.check_shown(self._shown, self._report_data(self.role.peer))
        return []

    def _on_m1(self, body: bytes) -> list[Action]:
        if len(body) != NONCE_BYTES:
            raise AttestationRejected("attest.nonce", "M1 does not bring one nonce")
        self._asked = self._random(NONCE_BYTES)
        return [self._say(MessageKind.M2, body + self._asked + self._signed_logs(body + self._asked))]

    def _on_m2(self, body: bytes) -> list[Action]:
        nonces = self._take_logs(body)
        nonce2 = nonces[NONCE_BYTES:]
        self._asked = self._random(NONCE_BYTES)
        asked = nonce2 + self._asked
        return [self._say(MessageKind.M3, asked + self._signed_logs(asked))]

    def _on_m3(self, body: bytes) -> list[Action]:
        nonces = self._take_logs(body)
        level = bytes([int(self._need_verdict().level)])
        return [self._say(MessageKind.M4, nonces[NONCE_BYTES:] + self._random(NONCE_BYTES) + level)]

    def _on_m4(self, body: bytes) -> list[Action]:
        if len(body) != 2 * NONCE_BYTES + 1 or not same(body[:NONCE_BYTES], self._asked):
            raise AttestationRejected("attest.nonce", "M4 does not answer M3")
        return []

    def _take_logs(self, body: bytes) -> bytes:
        """The logs of M2 or M3, checked against signature, nonce and quote; gives the two nonces in front."""
        nonces, rest = body[: 2 * NONCE_BYTES], body[2 * NONCE_BYTES :]
        signature, logs = rest[:SIGNATURE_BYTES], rest[SIGNATURE_BYTES:]
        if len(nonces) != 2 * NONCE_BYTES or not same(nonces[:NONCE_BYTES], self._asked):
            raise AttestationRejected("attest.nonce", "the logs do not answer this end's request")
        try:
            key = parse_public_key(self._conversation.peer_key)
            key.verify_ed25519(signature, self._logs_message(self.role.peer, nonces, logs))
        except SignatureInvalid:
            raise AttestationRejected("attest.authentication", "the peer's logs are not signed by its key") from None
        pieces = _pieces(logs)
        if set(pieces) - LOGS:
            raise AttestationRejected("attest.order", "something else came with the logs")
        self._verdict = self._judge.appraise({**self._shown, **pieces}, self._report_data(self.role.peer))
        self._shown.update(pieces)
        return nonces

    # ---- what this end says

    def _arrived(self) -> list[Action]:
        """What a new state asks for by itself."""
        if self.state in {State.BOTH_SHOWN, State.M1_SENT} and not self._secret:
            self._derive()
            if self.role is End.SOURCE:
                self._asked = self._random(NONCE_BYTES)
                return [self._say(MessageKind.M1, self._asked)]
        if self.state is State.ATTESTED:
            return [self._attested()]
        return []

    def _attested(self) -> Attested:
        m4 = self._sent.get((self.role.peer, MessageKind.M4))
        return Attested(
            self.number,
            self._need_verdict(),
            self._need_subject(),
            digests_of(self._shown),
            expand(self._secret, _SECRET_LABEL + self._transcript, SEED_BYTES),
            None if m4 is None else m4[-1 - 32],
        )

    def _derive(self) -> None:
        order = [(end, kind) for kind in (MessageKind.CHALLENGE, MessageKind.SHOW) for end in End]
        self._transcript = hashlib.sha256(b"".join(self._sent[one] for one in order)).digest()
        self._secret = extract(self._conversation.exporter, self._seeds[End.SOURCE] + self._seeds[End.DESTINATION])
        self._first = self._transcript

    def _say(self, kind: MessageKind, body: bytes) -> Send:
        known = {**self._nonces} if kind is not MessageKind.CHALLENGE else {**self._nonces, self.role.peer: NO_NONCE}
        epoch = self._subject.epoch if self._subject is not None else 0
        if kind is MessageKind.CHALLENGE and self.role is End.DESTINATION:
            epoch = 0
        facts = (self.number, self._conversation.migration, epoch, known[End.SOURCE], known[End.DESTINATION])
        message = AttestMessage(kind, self.role, *facts, body)
        if kind.has_mac:
            mac = authenticate(self._mac_key(self.role), self._transcript + message.authenticated)
            message = message.with_mac(mac)
            self._transcript = hashlib.sha256(self._transcript + message.encode()).digest()
        self._sent[self.role, kind] = message.encode()
        return Send(message.encode())

    def _signed_logs(self, nonces: bytes) -> bytes:
        logs = encode_bundle(self._logs)
        return sign(self._conversation.key_pem, self._logs_message(self.role, nonces, logs)) + logs

    def _logs_message(self, role: End, nonces: bytes, logs: bytes) -> bytes:
        return _LOGS_LABEL + bytes([role.number]) + self._first + nonces + hashlib.sha256(logs).digest()

    def _mac_key(self, role: End) -> bytes:
        return expand(self._secret, _MAC_LABEL + bytes([role.number]) + self._first, 32)

    def _report_data(self, role: End) -> bytes:
        ours, seen = self._conversation, self._conversation
        if role is not self.role:
            seen = Conversation(
                ours.migration, ours.peer_certificate, ours.own_certificate, ours.exporter, b"", ours.peer_key
            )
        return report_data(
            role,
            seen,
            self._need_subject(),
            seed=self._seeds[role],
            peer_nonce=self._nonces[role.peer],
            own_nonce=self._nonces[role],
            round_number=self.number,
        )

    def _need_subject(self) -> Subject:
        if self._subject is None:
            raise InternalError("internal.error", "what is migrated is not known yet")
        return self._subject

    def _need_verdict(self) -> Verdict:
        if self._verdict is None:
            raise InternalError("internal.error", "no verdict yet")
        return self._verdict


_HANDLERS: Final[Mapping[MessageKind, Callable[[Round, bytes], list[Action]]]] = {
    MessageKind.CHALLENGE: Round._on_challenge,
    MessageKind.SHOW: Round._on_show,
    MessageKind.M1: Round._on_m1,
    MessageKind.M2: Round._on_m2,
    MessageKind.M3: Round._on_m3,
    MessageKind.M4: Round._on_m4,
}


def _pieces(data: bytes) -> dict[str, bytes]:
    try:
        return parse_bundle(data)
    except EvidenceError as error:
        raise AttestationRejected("attest.refused", f"the peer's evidence cannot be read: {error.detail}") from error


class Attestation:
    """All rounds of one channel: round 0 lets the migration begin, later ones look whether the peer is still the same."""

    def __init__(
        self, role: End, conversation: Conversation, subject: Subject | None, judge: Judge, random: Random
    ) -> None:
        self._role, self._conversation, self._subject, self._judge = role, conversation, subject, judge
        self._random = random
        self._round = self._next_round(0)
        self._used = {NO_NONCE}
        self.first: Attested | None = None

    @property
    def attested(self) -> bool:
        """Whether round 0 is over."""
        return self.first is not None

    @property
    def busy(self) -> bool:
        """Whether a round is under way."""
        return self._round.state is not State.ATTESTED

    @property
    def known(self) -> Known:
        """What the present round knows by now."""
        return self._round.known

    def start(self) -> list[Action]:
        """Begin round 0."""
        return self._round.start()

    def again(self) -> list[Action]:
        """Begin the next round; the source's to do, when none is under way."""
        if self._role is not End.SOURCE or self.busy:
            raise InternalError("internal.error", "a round is under way, or is not ours to begin")
        self._round = self._next_round(self._round.number + 1)
        return self._round.start()

    def receive(self, message: AttestMessage) -> list[Action]:
        """A message of the peer; raises AttestationRejected."""
        actions: list[Action] = []
        again = message.kind is MessageKind.CHALLENGE and message.round == self._round.number + 1
        if again and self._role is End.DESTINATION and not self.busy:
            self._round = self._next_round(message.round)
            actions += self._round.start()
        if message.kind is MessageKind.CHALLENGE and message.sender is self._role.peer:
            nonce = message.nonce_source if self._role is End.DESTINATION else message.nonce_destination
            if nonce in self._used:
                raise AttestationRejected("attest.nonce", "the peer's nonce was used before")
            self._used.add(nonce)
        actions += self._round.receive(message)
        return [self._noted(one) for one in actions]

    def evidence_made(self, pieces: Mapping[str, bytes]) -> list[Action]:
        """The bundle that WantEvidence asked for."""
        return [self._noted(one) for one in self._round.evidence_made(pieces)]

    def _next_round(self, number: int) -> Round:
        return Round(self._role, self._conversation, self._subject, self._judge, self._random, number)

    def _noted(self, action: Action) -> Action:
        if isinstance(action, Attested):
            if self.first is None:
                self.first = action
            else:
                _check_same(self.first, action)
        return action


def _check_same(first: Attested, later: Attested) -> None:
    """The peer may have measured more meanwhile; what it rests on, and how far one can trust it, must not change."""
    if later.subject != first.subject:
        raise AttestationRejected("attest.migration", "the peer attests for another VM or epoch than at first")
    if later.verdict.level < first.verdict.level:
        words = f"the peer had level {int(first.verdict.level)} and has {int(later.verdict.level)} now"
        raise PeerRejected("attest.changed", words, later.verdict, later.evidence)
    roots = [{(one.kind, one.root) for one in each.verdict.appraisals} for each in (first, later)]
    if roots[0] != roots[1]:
        words = "the peer's evidence rests on another root than at first"
        raise PeerRejected("attest.changed", words, later.verdict, later.evidence)
