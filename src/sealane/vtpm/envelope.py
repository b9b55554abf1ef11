"""One part of a TPM's state, sealed for one migration.

      0   4  "SLvT"
      4   1  version 1
      5   1  type of the state (`control.BlobType`)
      6  16  the migration
     22   8  epoch of the VM before the migration, big-endian
     30  16  first half of the SHA-256 of the VM's name
     46  12  nonce
     58      AES-256-GCM of the state, with its tag; bytes 0 to 57 are authenticated along

    key = HKDF-Expand(migration secret, "sealane v1 vtpm" || type u8, 32)

The migration's secret comes out of the attested channel, so the key is one of this migration and this type alone, and never
leaves the two enclaves. What the header says is looked at first only to say in words what does not fit; that it is true,
the tag shows.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sealane.crypto.aead import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Aead, OpenFailed
from sealane.crypto.kdf import expand
from sealane.errors import make_error
from sealane.limits import VTPM_BLOB_MAX
from sealane.vtpm.control import BlobType

_MAGIC: Final = b"SLvT"
_VERSION: Final = 1
_HEADER: Final = struct.Struct(">4sBB16sQ16s12s")
_VM_BYTES: Final = 16
OVERHEAD_BYTES: Final = _HEADER.size + TAG_BYTES


@dataclass(frozen=True)
class Journey:
    """What a sealed state belongs to."""

    vm: str
    epoch: int
    migration: bytes


class StateSealer:
    """Seals and opens the states of one journey; `random` gives nonces."""

    def __init__(self, migration_secret: bytes, journey: Journey, random: Callable[[int], bytes]) -> None:
        self._secret, self._journey, self._random = migration_secret, journey, random
        self._vm = hashlib.sha256(journey.vm.encode()).digest()[:_VM_BYTES]

    def _aead(self, blob_type: BlobType) -> Aead:
        return Aead(expand(self._secret, b"sealane v1 vtpm" + bytes([blob_type]), KEY_BYTES))

    def volatile_state_enc(self, blob_type: BlobType, state: bytes) -> bytes:
        """Seal one part of the state; a few a migration, so a random nonce never comes twice."""
        nonce, journey = self._random(NONCE_BYTES), self._journey
        header = _HEADER.pack(_MAGIC, _VERSION, blob_type, journey.migration, journey.epoch, self._vm, nonce)
        sealed = bytearray(len(state) + TAG_BYTES)
        self._aead(blob_type).seal_into(nonce, state, header, sealed)
        return header + bytes(sealed)

    def volatile_state_dec(self, blob_type: BlobType, sealed: bytes) -> bytes:
        """Open what `volatile_state_enc` made for the same journey and type.

        Raises `vtpm.blob-malformed`, `vtpm.blob-foreign`, `vtpm.blob-epoch`, `vtpm.blob-type`, `vtpm.blob-migration` for
        what the header does not fit in, `vtpm.blob-altered` where the tag does not fit.
        """
        if not OVERHEAD_BYTES <= len(sealed) <= OVERHEAD_BYTES + VTPM_BLOB_MAX:
            raise make_error("vtpm.blob-malformed", f"{len(sealed)} bytes are no sealed state")
        magic, version, kind, migration, epoch, vm, nonce = _HEADER.unpack_from(sealed)
        if (magic, version) != (_MAGIC, _VERSION):
            raise make_error("vtpm.blob-malformed", "a state came that is not sealed as it should be")
        if vm != self._vm:
            raise make_error("vtpm.blob-foreign", f"the state is not {self._journey.vm}'s")
        if epoch != self._journey.epoch:
            raise make_error("vtpm.blob-epoch", f"the state is of epoch {epoch}, not {self._journey.epoch}")
        if kind != blob_type:
            raise make_error("vtpm.blob-type", f"state {kind} came in the place of {blob_type.name.lower()}")
        if migration != self._journey.migration:
            raise make_error("vtpm.blob-migration", "the state is of another migration")
        state = bytearray(len(sealed) - OVERHEAD_BYTES)
        try:
            self._aead(blob_type).open_into(
                nonce, memoryview(sealed)[_HEADER.size :], sealed[: _HEADER.size], memoryview(state)
            )
        except OpenFailed:
            raise make_error("vtpm.blob-altered") from None
        return bytes(state)

    def __repr__(self) -> str:
        return f"StateSealer({self._journey.vm}, epoch {self._journey.epoch})"
