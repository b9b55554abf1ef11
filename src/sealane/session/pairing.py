"""Pairing by a short code, without I/O: two agents that were strangers learn each other's certificates.

One host shows a code, the other is given it. A frame is `length u16 | kind u8 | payload`, length counting kind and payload.

    joiner                          inviter
    HELLO   -- SPAKE2 message -->
            <-- SPAKE2 message --   HELLO
    PROOF   ------------------->            the code is right, or this was one of three tries
            <-------------------    PROOF
            <-------------------    OFFER   who the inviter is, sealed
    OFFER   ------------------->            who the joiner is, sealed: the inviter was acceptable
            <-------------------    CHALLENGE   a credential that only the joiner's TPM opens
    ANSWER  ------------------->            what was in it, and a credential for the inviter's TPM
            <-------------------    DONE    what was in that; the joiner was acceptable, and is trusted there now

    T      = SHA-256("sealane pairing v1" or "sealane enrolment v1" || joiner's message || inviter's message)
    K      = SPAKE2's key; every other key is HKDF-Expand(K, label || T, 32)
    PROOF  = HMAC(key "joiner proof" or "inviter proof", T)
    OFFER  = AES-256-GCM(key "joiner offer" or "inviter offer"); the others likewise, each with the next nonce

Credentials are those of TPM 2.0's credential activation (part 1, 24), empty where a host shows no TPM: each end has the other's
TPM prove that the attestation key that it shows lives beside its endorsement key.

An offer is signed by its identity's key over T and the side, so that nobody offers another's certificate. The words that
both screens show come from K, T and both fingerprints: somebody in between, even one who knows the code, has two different
keys and so two different sets of words.
"""

import base64
import binascii
import difflib
import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Literal, TypeAlias

from sealane.crypto.aead import NONCE_BYTES, TAG_BYTES, Aead, OpenFailed
from sealane.crypto.dsse import Certificate, parse_certificate
from sealane.crypto.identity import Identity, sign
from sealane.crypto.kdf import expand
from sealane.crypto.pake import MESSAGE_BYTES, Pake, PakeFailed, Side, check_proof, proof
from sealane.crypto.signatures import SignatureInvalid
from sealane.errors import CATALOGUE, InternalError, PeerError, SealaneError, UsageError, make_error
from sealane.session.words import WORDS

Purpose = Literal["pairing", "enrolment"]
_FRAME: Final = struct.Struct(">HB")
# A certificate has some 700 bytes, endorsements of a TPM (EK and AK with certificates) some KiB.
OFFER_BYTES_MAX: Final = 60 * 1024
_NUMBERS: Final = 99
_CODE: Final = re.compile(r"^([1-9][0-9]?)-([a-z]+)-([a-z]+)$")
_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
# What an end may say when it gives up; anything else is told as a broken peer.
_REFUSALS: Final = frozenset(
    {"pairing.code", "pairing.over", "pairing.mismatch", "pairing.tpm", "trust.exists", "ca.exists"}
)


class FrameKind(IntEnum):
    """What a frame carries."""

    HELLO = 1
    PROOF = 2
    OFFER = 3
    DONE = 4
    REFUSE = 5
    CHALLENGE = 6
    ANSWER = 7


_LENGTHS: Final = {
    FrameKind.HELLO: (MESSAGE_BYTES, MESSAGE_BYTES),
    FrameKind.PROOF: (32, 32),
    FrameKind.OFFER: (TAG_BYTES + 2, OFFER_BYTES_MAX),
    FrameKind.DONE: (TAG_BYTES, 4096),
    FrameKind.REFUSE: (2, 200),
    FrameKind.CHALLENGE: (TAG_BYTES, 4096),
    FrameKind.ANSWER: (TAG_BYTES, 8192),
}


@dataclass(frozen=True)
class Offer:
    """Who an end is: its certificate, the port of its agent, and what vouches for its hardware, by name, in base64."""

    certificate: Certificate
    port: int
    endorsements: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CodeProved:
    """The other end knows the code (told to the inviter)."""


@dataclass(frozen=True)
class OfferReceived:
    """Who the other end is, and the words to compare. `accept` or `refuse` it."""

    offer: Offer
    words: str


@dataclass(frozen=True)
class Challenged:
    """A credential for this host's TPM (told to the joiner); empty where it shows none. `answer` it."""

    credential: bytes = field(repr=False)


@dataclass(frozen=True)
class Answered:
    """What the joiner's TPM found in its credential, and one for this host's (told to the inviter). `accept` or `refuse`."""

    secret: bytes = field(repr=False)
    credential: bytes = field(repr=False)


@dataclass(frozen=True)
class Done:
    """The inviter trusts the joiner (told to the joiner); `secret` is what the inviter's TPM found."""

    secret: bytes = field(repr=False, default=b"")


Event: TypeAlias = CodeProved | OfferReceived | Challenged | Answered | Done


def make_code(choose: Callable[[int], int] = secrets.randbelow) -> str:
    """A new code: a number and two words, 6.5 million of them, for three tries."""
    return f"{1 + choose(_NUMBERS)}-{WORDS[choose(256)]}-{WORDS[choose(256)]}"


def normal_code(text: str) -> str:
    """The code as it was shown, from what somebody typed; raises `usage.argument` for what can be none."""
    code = "-".join(re.split(r"[\s_-]+", text.strip().lower()))
    match = _CODE.match(code)
    if match is None:
        raise UsageError("usage.argument", "a pairing code is a number and two words, as in 7-orchid-tempo")
    for word in match.group(2, 3):
        if word not in WORDS:
            near = difflib.get_close_matches(word, WORDS, 1)
            hint = f"is it {near[0]}?" if near else "copy it from the other screen"
            raise UsageError("usage.argument", f"no pairing code has the word {word}; {hint}", mend=hint)
    return code


class Pairing:
    """One attempt at one end: bytes in, events and bytes out, or one SealaneError that ends it."""

    def __init__(
        self,
        side: Side,
        code: str,
        identity: Identity,
        offer: Offer,
        *,
        purpose: Purpose = "pairing",
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """A code that was shown for one purpose is a wrong one for the other."""
        self._label = f"sealane {purpose} v1".encode()
        self._side: Side = side
        self._other: Side = "inviter" if side == "joiner" else "joiner"
        self._identity, self._offer = identity, offer
        self._pake = Pake(f"{self._label.decode()} code {code}".encode(), side, entropy=entropy)
        self._buffer, self._out = bytearray(), bytearray()
        self._awaited = FrameKind.HELLO
        self._key, self._transcript = b"", b""
        self._accepting = False
        if side == "joiner":
            self._send(FrameKind.HELLO, self._pake.message)

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes; raises `pairing.code`, `peer.message`, or what the other end refuses with."""
        self._buffer += data
        events: list[Event] = []
        while len(self._buffer) >= _FRAME.size:
            length, number = _FRAME.unpack_from(self._buffer)
            if number not in (self._awaited, FrameKind.REFUSE):
                raise PeerError("peer.message", "something came out of turn")
            kind = FrameKind(number)
            least, most = _LENGTHS[kind]
            if not least <= length - 1 <= most:
                raise PeerError("peer.message", f"a {kind.name} of {length} bytes")
            end = _FRAME.size + length - 1
            if len(self._buffer) < end:
                break
            payload = bytes(self._buffer[_FRAME.size : end])
            del self._buffer[:end]
            events += self._take(kind, payload)
        return events

    def accept(self, secret: bytes = b"") -> None:
        """The other end is acceptable: the joiner answers an offer with its own, the inviter an answer with DONE."""
        if not self._accepting:
            raise InternalError("internal.error", "nothing was offered")
        self._accepting = False
        if self._side == "joiner":
            self._send(FrameKind.OFFER, self._seal(self._encode_offer(), 0))
            self._awaited = FrameKind.CHALLENGE
        else:
            self._send(FrameKind.DONE, self._seal(_encode_parts(secret=secret), 2))

    def challenge(self, credential: bytes) -> None:
        """Inviter: have the joiner's TPM prove itself before it is accepted; empty where it shows none."""
        self._send(FrameKind.CHALLENGE, self._seal(_encode_parts(credential=credential), 1))
        self._accepting, self._awaited = False, FrameKind.ANSWER

    def answer(self, secret: bytes, credential: bytes) -> None:
        """Joiner: what this host's TPM found, and a credential for the inviter's."""
        self._send(FrameKind.ANSWER, self._seal(_encode_parts(secret=secret, credential=credential), 1))
        self._awaited = FrameKind.DONE

    def refuse(self, error: SealaneError) -> None:
        """Tell the other end why this one gives up."""
        code = error.code if error.code in _REFUSALS else "pairing.over"
        self._send(FrameKind.REFUSE, json.dumps({"code": code}).encode())

    def bytes_to_send(self) -> bytes:
        """Everything that waits for the wire."""
        out, self._out = bytes(self._out), bytearray()
        return out

    # What comes

    def _take(self, kind: FrameKind, payload: bytes) -> list[Event]:
        match kind:
            case FrameKind.HELLO:
                self._take_hello(payload)
                return []
            case FrameKind.PROOF:
                return self._take_proof(payload)
            case FrameKind.OFFER:
                return [self._take_offer(payload)]
            case FrameKind.CHALLENGE:
                self._awaited = FrameKind.REFUSE
                return [Challenged(*_parse_parts(self._open(payload, 1), "credential"))]
            case FrameKind.ANSWER:
                self._accepting, self._awaited = True, FrameKind.REFUSE
                return [Answered(*_parse_parts(self._open(payload, 1), "secret", "credential"))]
            case FrameKind.DONE:
                return [Done(*_parse_parts(self._open(payload, 2), "secret"))]
            case FrameKind.REFUSE:
                raise _parse_refusal(payload)

    def _take_hello(self, theirs: bytes) -> None:
        ours = self._pake.message
        try:
            self._key = self._pake.finish(theirs)
        except PakeFailed:
            raise PeerError("peer.message", "the other end's first message is none of the group") from None
        first, second = (ours, theirs) if self._side == "joiner" else (theirs, ours)
        self._transcript = hashlib.sha256(self._label + first + second).digest()
        if self._side == "joiner":
            self._send(FrameKind.PROOF, self._proof())
        else:
            self._send(FrameKind.HELLO, ours)
        self._awaited = FrameKind.PROOF

    def _take_proof(self, theirs: bytes) -> list[Event]:
        if not check_proof(self._key, f"{self._other} proof".encode(), self._transcript, theirs):
            raise PeerError("pairing.code")
        self._awaited = FrameKind.OFFER
        if self._side == "joiner":
            return []
        self._send(FrameKind.PROOF, self._proof())
        self._send(FrameKind.OFFER, self._seal(self._encode_offer(), 0))
        return [CodeProved()]

    def _take_offer(self, sealed: bytes) -> OfferReceived:
        offer = self._parse_offer(self._open(sealed, 0))
        if offer.certificate.fingerprint == self._offer.certificate.fingerprint:
            raise PeerError("pairing.mismatch", "the other end is this host itself")
        self._accepting, self._awaited = True, FrameKind.REFUSE
        return OfferReceived(offer, self._words(offer.certificate.fingerprint))

    # What is made of the key

    def _derive(self, label: bytes) -> bytes:
        return expand(self._key, self._label + b" " + label + self._transcript, 32)

    def _proof(self) -> bytes:
        return proof(self._key, f"{self._side} proof".encode(), self._transcript)

    def _seal(self, plaintext: bytes, number: int) -> bytes:
        out = bytearray(len(plaintext) + TAG_BYTES)
        key = self._derive(f"{self._side} offer".encode())
        Aead(key).seal_into(number.to_bytes(NONCE_BYTES, "big"), plaintext, self._label, out)
        return bytes(out)

    def _open(self, sealed: bytes, number: int) -> bytes:
        out = bytearray(len(sealed) - TAG_BYTES)
        key = self._derive(f"{self._other} offer".encode())
        try:
            Aead(key).open_into(number.to_bytes(NONCE_BYTES, "big"), sealed, self._label, out)
        except OpenFailed:
            raise PeerError("pairing.mismatch", "what the other end sent was changed on the way") from None
        return bytes(out)

    def _words(self, theirs: str) -> str:
        ours = self._offer.certificate.fingerprint
        first, second = (ours, theirs) if self._side == "inviter" else (theirs, ours)
        made = hashlib.sha256(self._derive(b"words") + first.encode() + second.encode()).digest()
        number = int.from_bytes(made[2:6], "big") % 90 + 10
        return f"{WORDS[made[0]]} {WORDS[made[1]]} {number}"

    # Offers

    def _encode_offer(self) -> bytes:
        offer = self._offer
        signature = sign(self._identity.key_pem, self._to_sign(self._side, offer))
        value = {
            "certificate": offer.certificate.pem.decode(),
            "port": offer.port,
            "endorsements": offer.endorsements,
            "signature": base64.b64encode(signature).decode(),
        }
        encoded = json.dumps(value).encode()
        if len(encoded) + TAG_BYTES > OFFER_BYTES_MAX:
            raise InternalError("internal.error", f"an offer of {len(encoded)} bytes")
        return encoded

    def _parse_offer(self, data: bytes) -> Offer:
        try:
            value: Any = json.loads(data)
            certificate = parse_certificate(value["certificate"].encode())
            port, endorsements = value["port"], value["endorsements"]
            texts = [part for item in endorsements.items() for part in item]
            if type(port) is not int or not 1 <= port <= 65535 or not all(isinstance(part, str) for part in texts):
                raise ValueError("a field does not fit")
            if not _NAME.match(certificate.name):
                raise ValueError("its name cannot be a host's")
            offer = Offer(certificate, port, dict(endorsements))
            signature = base64.b64decode(value["signature"], validate=True)
            certificate.verify(signature, self._to_sign(self._other, offer))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
            raise PeerError("peer.message", f"the other end's offer does not fit ({type(error).__name__})") from None
        except SignatureInvalid:
            raise PeerError("pairing.mismatch", "the other end does not hold the key of its certificate") from None
        return offer

    def _to_sign(self, side: Side, offer: Offer) -> bytes:
        said = json.dumps([offer.certificate.fingerprint, offer.port, offer.endorsements], sort_keys=True)
        return self._label + b" offer of the " + side.encode() + b"\0" + self._transcript + said.encode()

    def _send(self, kind: FrameKind, payload: bytes) -> None:
        self._out += _FRAME.pack(len(payload) + 1, kind) + payload


def _encode_parts(**parts: bytes) -> bytes:
    return json.dumps({name: base64.b64encode(part).decode() for name, part in parts.items()}).encode()


def _parse_parts(data: bytes, *names: str) -> list[bytes]:
    try:
        value: Any = json.loads(data)
        return [base64.b64decode(value[name], validate=True) for name in names]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise PeerError("peer.message", "what the other end sent does not fit") from None


def _parse_refusal(payload: bytes) -> SealaneError:
    try:
        code = json.loads(payload)["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        code = None
    if not isinstance(code, str) or code not in _REFUSALS:
        return PeerError("peer.message", "a refusal without a known code")
    return make_error(code, f"the other end says: {CATALOGUE[code].summary}")
