"""What the launcher plays through once, so that no enclave has to load anything: inside the sandbox it could not.

Python finds codecs, OpenSSL its algorithms and pyOpenSSL its callbacks at their first use. An attested handshake between two
identities that are made for it, known to nobody and dropped at its end, and one record use all that a migration uses.
"""

import codecs
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np

from sealane.attest.peer import Expectations, PeerJudge
from sealane.attest.platformlog import Measured, encode_line, manifest_digest
from sealane.attest.reference import NO_REFERENCE
from sealane.attest.software import encode_statement, signed_bytes
from sealane.crypto.aead import CIPHER_NAME
from sealane.crypto.authority import (
    Authority,
    create_authority,
    issue_host_certificate,
    issue_revocation_list,
)
from sealane.crypto.identity import Identity, create_identity, public_key, sign
from sealane.crypto.loading import load_everything
from sealane.errors import InternalError
from sealane.seal.compression import RecordCompressor, RecordDecompressor
from sealane.seal.digests import PAGE_BYTES, PageDigests
from sealane.seal.keys import Direction, LaneKeys, derive_digest_key
from sealane.seal.records import RecordReader, RecordSealer
from sealane.seal.reduce import LaneReducer
from sealane.seal.seen import PagesSeen
from sealane.session.attestation import Subject
from sealane.session.channel import Attestor, Channel, Event, EvidenceWanted, Role
from sealane.session.vouching import NO_VOUCHERS, Claims, TrustedAuthority, Vouchers

_CODECS: Final = ("ascii", "utf-8", "latin-1", "utf-16-le", "idna")
_MIGRATION: Final = "00" * 16
_TURNS: Final = 16
_HOUR: Final = timedelta(hours=1)


class _End:
    """One end of the channel, which makes its own evidence."""

    def __init__(self, role: Role, own: Identity, peer: Identity, now: datetime, authority: Authority) -> None:
        """One end trusts the other by itself, the other end by what a CA says."""
        self._identity = own
        by_authority = role == "destination"
        self.channel = Channel(
            own,
            role=role,
            migration=_MIGRATION,
            trusted={} if by_authority else {peer.fingerprint: peer.name},
            protection="sealed",
            cipher=CIPHER_NAME,
            now=now,
            attestor=Attestor(
                Subject("vm", 1) if role == "source" else None,
                lambda name, key: PeerJudge(name, key, lambda: now, Expectations(), NO_REFERENCE),
                vouchers=_vouchers(authority, now) if by_authority else NO_VOUCHERS,
                host_certificate=b"" if by_authority else _certified(authority, own, now),
            ),
        )

    def take(self, data: bytes) -> None:
        if data:
            self._hear(self.channel.receive(data))

    def _hear(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, EvidenceWanted):
                self._hear(self.channel.evidence_made(self._evidence(event.report_data)))

    def _evidence(self, user_data: bytes) -> dict[str, bytes]:
        file = Measured("enclave", "rehearsal.py", "sha256:" + "00" * 32)
        log = encode_line([file, Measured("enclave-manifest", "-", manifest_digest([file]))]) + b"\n"
        digest = hashlib.sha256(log).digest()
        signature = sign(self._identity.key_pem, signed_bytes(user_data, digest))
        statement = encode_statement(public_key(self._identity.key_pem), user_data, digest, signature)
        return {"platform-log": log, "software.statement": statement}


def _vouchers(authority: Authority, now: datetime) -> Vouchers:
    revocations = issue_revocation_list(authority, [(1, now)], number=1, now=now, lifetime=_HOUR)
    trusted = TrustedAuthority(certificate=authority.certificate_pem.decode(), revocations=revocations.decode())
    return Vouchers(authorities=[trusted])


def _certified(authority: Authority, host: Identity, now: datetime) -> bytes:
    claims = Claims(level=1, production_level=1).encode()
    return issue_host_certificate(authority, host.name, public_key(host.key_pem), claims, now=now, lifetime=_HOUR).pem


def rehearse() -> None:
    """Load all that an enclave uses; raises SealaneError where the libraries do not work together."""
    for name in _CODECS:
        codecs.lookup(name)
    load_everything()
    now = datetime.now(UTC)
    one, other = create_identity("one", now=now), create_identity("other", now=now)
    authority = create_authority("authority", now=now, lifetime=_HOUR)
    source = _End("source", one, other, now, authority)
    destination = _End("destination", other, one, now, authority)
    for _ in range(_TURNS):
        destination.take(source.channel.bytes_to_send())
        source.take(destination.channel.bytes_to_send())
    if not (source.channel.established and destination.channel.established):
        raise InternalError("internal.error", "the rehearsal of a handshake did not come to its end")
    _seal_and_open(source.channel.migration_secret())
    _reduce(source.channel.migration_secret())
    source.channel.refuse(InternalError("internal.error"))
    source.channel.say_bye()


def _reduce(secret: bytes) -> None:
    """Every kind of work that reducing does on pages: the table with a page that comes twice, digests, zstd both ways."""
    seen = PagesSeen(1)
    seen.list_block("ram", 4 * PAGE_BYTES)
    digests = PageDigests(derive_digest_key(secret))
    pages = np.zeros((3, PAGE_BYTES), np.uint8)
    for indexes in ((0, 1, 2), (2, 1, 1)):
        seen.needed(0, "ram", np.array(indexes, np.uint64) * np.uint64(PAGE_BYTES), digests.of(pages))
    LaneReducer(seen, 0, derive_digest_key(secret)).feed(pages[0].data)
    RecordDecompressor().decompress(RecordCompressor(1).compress([pages[0].data]))


def _seal_and_open(secret: bytes) -> None:
    sealer = RecordSealer(LaneKeys(secret, lane=0, direction=Direction.TO_DESTINATION))
    reader = RecordReader(LaneKeys(secret, lane=0, direction=Direction.TO_DESTINATION))
    record = memoryview(bytes(sealer.open_lane()))
    while record:
        space = reader.space()
        count = min(len(space), len(record))
        space[:count], record = record[:count], record[count:]
        reader.filled(count)
