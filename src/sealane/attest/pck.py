"""What Intel says of a platform in its PCK certificate (Intel SGX PCK certificate profile, 1.3.5)."""

from dataclasses import dataclass
from typing import Final

from sealane.attest import der
from sealane.crypto.chains import Certificate
from sealane.errors import EvidenceError

SGX_EXTENSION: Final = "1.2.840.113741.1.13.1"
_BASE: Final = bytes.fromhex("2a864886f84d010d01")  # the same OID as DER content
_PPID, _TCB, _PCE_ID, _FMSPC = _BASE + b"\x01", _BASE + b"\x02", _BASE + b"\x03", _BASE + b"\x04"
_PCE_SVN = 17
_WHAT: Final = "PCK extension"


@dataclass(frozen=True)
class PckPlatform:
    """The platform: its name, family, and the security versions of its components."""

    ppid: bytes
    fmspc: bytes
    pce_id: bytes
    components: tuple[int, ...]
    pce_svn: int


def parse_pck_platform(certificate: Certificate) -> PckPlatform:
    """Read the extension; raises EvidenceError `attest.malformed` where it is missing or odd."""
    raw = certificate.extension(SGX_EXTENSION)
    if raw is None:
        raise EvidenceError("attest.malformed", f"{certificate.name} has no SGX extension")
    members = _members(der.read_one(raw, der.SEQUENCE, _WHAT))
    tcb = _members(_member(members, _TCB, der.SEQUENCE))
    numbers = [der.read_integer(_member(tcb, _TCB + bytes([index]), der.INTEGER), _WHAT) for index in range(1, 18)]
    return PckPlatform(
        ppid=_member(members, _PPID, der.OCTET_STRING),
        fmspc=_member(members, _FMSPC, der.OCTET_STRING),
        pce_id=_member(members, _PCE_ID, der.OCTET_STRING),
        components=tuple(numbers[:16]),
        pce_svn=numbers[_PCE_SVN - 1],
    )


def _members(content: bytes) -> dict[bytes, tuple[int, bytes]]:
    found: dict[bytes, tuple[int, bytes]] = {}
    for tag, member in der.read_elements(content, _WHAT):
        parts = der.read_elements(member, _WHAT) if tag == der.SEQUENCE else []
        if len(parts) != 2 or parts[0][0] != der.OBJECT_IDENTIFIER or parts[0][1] in found:
            raise EvidenceError("attest.malformed", f"{_WHAT}: not pairs of identifier and value")
        found[parts[0][1]] = parts[1]
    return found


def _member(members: dict[bytes, tuple[int, bytes]], oid: bytes, tag: int) -> bytes:
    if oid not in members or members[oid][0] != tag:
        raise EvidenceError("attest.malformed", f"{_WHAT}: a value is missing or of another type")
    return members[oid][1]
