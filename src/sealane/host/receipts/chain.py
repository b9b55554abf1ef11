"""Writes receipts: one after the other, durably, each naming the digest of the one before.

    STATE/receipts/000017-web01.dsse            ours, in order
    STATE/receipts/peers/<migration id>.dsse    the other end's receipt of the same migration, where it was exchanged
    STATE/receipts/certificates/own-*.crt       certificates that signed ours; peer-*.crt those that signed the peers'

The file comes first, then the journal's row with its digest, which is the chain's head. An agent that is killed between
the two finds the file at its next start and adopts it; killed before the file, it writes the receipt then.
"""

import errno
import os
import re
from pathlib import Path
from typing import Final

import structlog

from sealane.crypto.dsse import Certificate, parse_certificate, sign_envelope
from sealane.crypto.identity import Identity
from sealane.crypto.signatures import SignatureInvalid
from sealane.errors import EvidenceError, InternalError, PeerError, SealaneError, make_error
from sealane.host.models import Migration
from sealane.host.receipts.statement import (
    PAYLOAD_TYPE,
    RECEIPT_BYTES_MAX,
    Statement,
    digest_of,
    make_statement,
    parse_receipt,
)
from sealane.host.store import Store

_FITS_A_FILE: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
RESTING: Final = frozenset({"completed", "aborted", "in-doubt"})
_log = structlog.get_logger()


class Receipts:
    """This host's chain. The state directory belongs to one agent at a time (its lock), and so does the chain."""

    def __init__(self, state: Path, store: Store, identity: Identity, name: str) -> None:
        self.directory = state / "receipts"
        self._store, self._identity, self._name = store, identity, name

    def issue(self, migration: Migration, *, recovered: bool = False) -> Migration:
        """Write the receipt of a migration that rests; the snapshot with its number. Once for each state it rests in.

        Raises host.store, host.disk-full; what could not be written is written by `catch_up`.
        """
        if migration.state not in RESTING:
            return migration
        if not _FITS_A_FILE.match(migration.vm):
            raise InternalError("internal.error", "a VM's name that cannot be part of a file's")
        if (known := self._store.receipt_of(migration.id, migration.state)) is not None:
            return migration.model_copy(update={"receipt": known})
        last, previous = self._store.receipt_head()
        sequence = last + 1
        payload = make_statement(
            migration,
            sequence=sequence,
            previous=previous,
            name=self._name,
            fingerprint=self._identity.fingerprint,
            epoch=self._store.epoch(migration.vm),
            recovered=recovered,
        )
        data = sign_envelope(self._identity, PAYLOAD_TYPE, payload).encode()
        self._keep_certificate("own", self._identity.fingerprint, self._identity.certificate_pem)
        _write(self.directory / f"{sequence:06d}-{migration.vm}.dsse", data)
        return self._note(migration, sequence, digest_of(data))

    def catch_up(self) -> list[Migration]:
        """Adopt what a previous agent had written and not noted, then write what it had not; the oldest first."""
        written = []
        for migration in self._store.without_receipt():
            try:
                adopted = self._adopt(migration)
                written.append(adopted or self.issue(migration, recovered=True))
            except SealaneError as error:
                _log.error("a receipt is still missing", migration=migration.id[:8], code=error.code)
                break
        return written

    def read(self, migration: Migration) -> bytes | None:
        """The receipt of this migration as it lies there, if it does."""
        if migration.receipt is None:
            return None
        try:
            return (self.directory / f"{migration.receipt:06d}-{migration.vm}.dsse").read_bytes()
        except OSError:
            return None

    @property
    def certificate_pem(self) -> bytes:
        """What verifies ours."""
        return self._identity.certificate_pem

    def keep_peers(self, migration: Migration, data: bytes, certificate_pem: bytes) -> str:
        """Verify and keep the other end's receipt of this migration; its digest. Raises `peer.message`, host.store."""
        try:
            certificate = parse_certificate(certificate_pem)
            if certificate.fingerprint != migration.peer_fingerprint:
                raise PeerError("peer.message", "the peer's receipt came with another certificate")
            envelope, statement = parse_receipt(data)
            envelope.verify(certificate)
        except (EvidenceError, ValueError, SignatureInvalid) as error:
            raise PeerError("peer.message", f"the peer's receipt does not hold: {error or 'its signature'}") from error
        if (wrong := why_not_counterpart(statement, migration, self._identity.fingerprint)) is not None:
            raise PeerError("peer.message", f"the peer's receipt is not for this migration: {wrong}")
        self._keep_certificate("peer", certificate.fingerprint, certificate_pem)
        _write(self.directory / "peers" / f"{migration.id}.dsse", data)
        return digest_of(data)

    def _note(self, migration: Migration, sequence: int, digest: str) -> Migration:
        noted = migration.model_copy(update={"receipt": sequence})
        self._store.note_receipt(sequence, digest, noted)
        return noted

    def _adopt(self, migration: Migration) -> Migration | None:
        last, previous = self._store.receipt_head()
        for path in sorted(self.directory.glob(f"{last + 1:06d}-*.dsse")):
            data = path.read_bytes()[: RECEIPT_BYTES_MAX + 1]
            try:
                envelope, statement = parse_receipt(data)
                envelope.verify(parse_certificate(self._identity.certificate_pem))
                said = statement.predicate
                if (said.sequence, said.previous, said.migration.id, said.outcome.state) == (
                    *(last + 1, previous, migration.id, migration.state),
                ):
                    return self._note(migration, last + 1, digest_of(data))
            except (SealaneError, ValueError, SignatureInvalid):
                pass
            _log.error("a file in the place of the next receipt is not ours; it is put aside", path=str(path))
            path.rename(path.with_suffix(".rejected"))
        return None

    def _keep_certificate(self, whose: str, fingerprint: str, pem: bytes) -> None:
        path = certificate_path(self.directory, whose, fingerprint)
        if not path.exists():
            _write(path, pem)


def certificate_path(directory: Path, whose: str, fingerprint: str) -> Path:
    """Where a certificate is kept that signed receipts; `whose` is "own" or "peer"."""
    return directory / "certificates" / f"{whose}-{fingerprint.removeprefix('SHA256:')}.crt"


def load_certificate(path: Path, fingerprint: str) -> Certificate | None:
    """A kept certificate, if it is there and is the one that its name says."""
    try:
        certificate = parse_certificate(path.read_bytes())
    except (OSError, ValueError):
        return None
    return certificate if certificate.fingerprint == fingerprint else None


def why_not_counterpart(theirs: Statement, ours: Migration, own_fingerprint: str) -> str | None:
    """What speaks against `theirs` being the other end's receipt of `ours`; None where nothing does."""
    said = theirs.predicate
    here = said.hosts.source if ours.role == "source" else said.hosts.destination
    # who was in doubt claimed no outcome, so none of the other end's contradicts it
    outcome = said.outcome.state if ours.state == "in-doubt" else ours.state
    pairs = {
        "the migration": (said.migration.id, ours.id),
        "the VM": (said.migration.vm, ours.vm),
        "the role": (said.migration.role, "destination" if ours.role == "source" else "source"),
        "the outcome": (said.outcome.state, outcome),
        "the epoch": (said.migration.epoch, ours.epoch),
        "the stream": (said.transcript.lanes, ours.stream_digest),
        "this host": (here.fingerprint, own_fingerprint),
        "the signer": (said.signer, ours.peer_fingerprint),
    }
    return next((what for what, (there, mine) in pairs.items() if there != mine), None)


def _write(path: Path, data: bytes) -> None:
    """Durable and whole, or not there: a new file, synced, then renamed."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        code = "host.disk-full" if error.errno in _FULL else "host.store"
        raise make_error(code, f"{path}: {error.strerror}") from error


_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
