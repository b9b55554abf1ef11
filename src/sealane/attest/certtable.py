"""The certificate table of an extended SEV-SNP report (GHCB specification 56421, 4.1.8.1), as configfs-tsm's `auxblob`:

+----------+--------+--------+  … one for each certificate, then one of zeros, then the certificates (DER)
| GUID 16  | offset | length |
+----------+--------+--------+
"""

import struct
from typing import Final
from uuid import UUID

from sealane.crypto.chains import Certificate, CertificateMalformed, parse_certificates
from sealane.errors import EvidenceError

_ENTRY: Final = struct.Struct("<16sII")
_ENTRIES_MAX: Final = 16
GUIDS: Final = {
    UUID(text).bytes_le: name
    for text, name in {
        "63da758d-e664-4564-adc5-f4b93be8accd": "VCEK",
        "a8074bc2-a25a-483e-aae6-39c045a0b8a1": "VLEK",
        "4ab7b379-bbac-4fe4-a02f-05aef327c782": "ASK",
        "c0b406a4-a803-4952-9743-3fb6014cd0ae": "ARK",
        "92f81bc3-5811-4d3d-97ff-d19f88dc67ea": "CRL",
    }.items()
}


def looks_like_table(data: bytes) -> bool:
    """Whether the first entry has a GUID of the specification."""
    return data[:16] in GUIDS or UUID(bytes=data[:16].ljust(16, b"\0")).bytes_le in GUIDS


def parse_table(data: bytes) -> tuple[Certificate, ...]:
    """The certificates of the table; raises EvidenceError `attest.malformed`. Unknown entries are left out."""
    found: list[Certificate] = []
    for index in range(_ENTRIES_MAX):
        if len(data) < (index + 1) * _ENTRY.size:
            raise EvidenceError("attest.malformed", "certificate table: it does not end")
        guid, offset, length = _ENTRY.unpack_from(data, index * _ENTRY.size)
        if not any(guid):
            return tuple(found)
        if offset + length > len(data) or not length:
            raise EvidenceError("attest.malformed", "certificate table: an entry points past its end")
        known = GUIDS.get(guid) or GUIDS.get(UUID(bytes=guid).bytes_le)
        if known is None or known == "CRL":
            continue
        try:
            found += parse_certificates(data[offset : offset + length])
        except CertificateMalformed as error:
            raise EvidenceError("attest.malformed", f"certificate table, {known}: {error}") from error
    raise EvidenceError("attest.malformed", f"certificate table: more than {_ENTRIES_MAX} entries")
