"""TPM 2.0 structures (Library, part 2), big-endian: what a TPM signed, the signature, and the key's public area.

    TPMS_ATTEST     magic ff TCG | type 8018 | signer | qualifying data | clock, resets, restarts, safe | firmware |
                    PCR selection | PCR digest
    TPMT_SIGNATURE  algorithm | hash | RSA: signature; ECDSA: r, s
    TPMT_PUBLIC     type | name algorithm | attributes | policy | parameters | unique

TPM2B forms (a 16-bit size in front) are read too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sealane.attest.reading import Reader, decode_text, describe, parse_hex, parse_json
from sealane.crypto.signatures import KeyMalformed, PublicKey, SignatureInvalid, key_from_modulus, key_from_point
from sealane.errors import EvidenceError

MAGIC: Final = b"\xffTCG"
ATTEST_QUOTE: Final = 0x8018
HASHES: Final = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
RSASSA, RSAPSS, ECDSA = 0x0014, 0x0016, 0x0018
_RSA, _ECC, _NULL = 0x0001, 0x0023, 0x0010
_CURVES: Final = {0x0003: "P-256", 0x0004: "P-384"}
# TPMA_OBJECT: fixedTPM, fixedParent, sensitiveDataOrigin, restricted, sign; and not decrypt.
_AK_SET: Final = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 18
_AK_CLEAR: Final = 1 << 17
_BANKS_MAX: Final = 16
_INDEXES: Final = frozenset(map(str, range(24)))


@dataclass(frozen=True)
class TpmQuote:
    """What a TPM says of its PCRs."""

    qualifying_data: bytes
    clock: int
    resets: int
    restarts: int
    clock_safe: bool
    firmware: int
    selection: tuple[tuple[str, tuple[int, ...]], ...]
    pcr_digest: bytes
    signed: bytes = field(repr=False)

    def __repr__(self) -> str:
        return f"TpmQuote({describe(self.signed)})"


@dataclass(frozen=True)
class TpmSignature:
    """The signature, with RSA's bytes or ECDSA's r and s."""

    algorithm: int
    hash_name: str
    parts: tuple[bytes, ...] = field(repr=False)

    def verify(self, key: PublicKey, message: bytes) -> None:
        """Raises SignatureInvalid, also for hashes below SHA-256."""
        if self.algorithm == ECDSA:
            size = {"P-256": 32, "P-384": 48}.get(key.kind, 0)
            numbers = [int.from_bytes(part, "big") for part in self.parts]
            if not size or any(number >> 8 * size for number in numbers):
                raise SignatureInvalid
            raw = b"".join(number.to_bytes(size, "big") for number in numbers)
            key.verify_ecdsa(raw, message, hash_name=self.hash_name)
        else:
            key.verify_rsa(self.parts[0], message, hash_name=self.hash_name, pss=self.algorithm == RSAPSS)


@dataclass(frozen=True)
class TpmKey:
    """A public key; `is_attestation_key` is None where only the bare key is known, without its attributes."""

    key: PublicKey
    is_attestation_key: bool | None


@dataclass(frozen=True)
class PcrValues:
    """PCR values that somebody read; they count only as far as a quote signs them."""

    banks: Mapping[str, Mapping[int, bytes]]


def looks_like_quote(data: bytes) -> bool:
    """Whether the bytes begin as a TPMS_ATTEST or TPM2B_ATTEST."""
    return data.startswith(MAGIC) or data[2:6] == MAGIC


def parse_tpm_quote(data: bytes) -> TpmQuote:
    """Read untrusted bytes; raises EvidenceError `attest.malformed`."""
    reader = Reader(_without_size(data, MAGIC), "TPM quote", "big")
    magic, kind = reader.take(4), reader.number(2)
    if magic != MAGIC or kind != ATTEST_QUOTE:
        raise reader.malformed(f"not a quote that a TPM made (type {kind:#06x})")
    reader.counted(2, 128)
    qualifying = reader.counted(2, 128)
    clock, resets, restarts, safe = reader.number(8), reader.number(4), reader.number(4), reader.number(1)
    firmware = reader.number(8)
    selection = _selection(reader)
    digest = reader.counted(2, 64)
    if reader.left:
        raise reader.malformed("bytes follow the quote")
    return TpmQuote(qualifying, clock, resets, restarts, safe == 1, firmware, selection, digest, reader.data)


def looks_like_signature(data: bytes) -> bool:
    """Whether algorithm and hash are those of a TPMT_SIGNATURE."""
    return (
        len(data) >= 8
        and int.from_bytes(data[:2], "big") in {RSASSA, RSAPSS, ECDSA}
        and int.from_bytes(data[2:4], "big") in HASHES
    )


def parse_tpm_signature(data: bytes) -> TpmSignature:
    """Read a TPMT_SIGNATURE; raises EvidenceError `attest.malformed`."""
    reader = Reader(data, "TPM signature", "big")
    algorithm, hash_id = reader.number(2), reader.number(2)
    if algorithm not in {RSASSA, RSAPSS, ECDSA} or hash_id not in HASHES:
        raise reader.malformed(f"the scheme {algorithm:#06x} with the hash {hash_id:#06x} is not known")
    parts = tuple(reader.counted(2, 1024) for _ in range(2 if algorithm == ECDSA else 1))
    if reader.left:
        raise reader.malformed("bytes follow the signature")
    return TpmSignature(algorithm, HASHES[hash_id], parts)


def looks_like_public(data: bytes) -> bool:
    """Whether the bytes begin as a TPMT_PUBLIC or TPM2B_PUBLIC."""
    sized = len(data) >= 12 and int.from_bytes(data[:2], "big") == len(data) - 2
    inner = data[2:] if sized else data
    return (
        len(inner) >= 10
        and int.from_bytes(inner[:2], "big") in {_RSA, _ECC}
        and int.from_bytes(inner[2:4], "big") in HASHES
    )


def parse_tpm_public(data: bytes) -> TpmKey:
    """Read a TPMT_PUBLIC; raises EvidenceError `attest.malformed`."""
    sized = len(data) >= 2 and int.from_bytes(data[:2], "big") == len(data) - 2
    reader = Reader(data[2:] if sized else data, "TPM public area", "big")
    kind, _, attributes = reader.number(2), reader.number(2), reader.number(4)
    reader.counted(2, 64)
    if kind not in {_RSA, _ECC}:
        raise reader.malformed(f"a key of the type {kind:#06x}")
    if reader.number(2) != _NULL:  # symmetric algorithm: keys that sign have none
        reader.take(4)
    if reader.number(2) != _NULL:  # scheme and its hash
        reader.take(2)
    try:
        key = _rsa_key(reader) if kind == _RSA else _ecc_key(reader)
    except KeyMalformed as error:
        raise reader.malformed(str(error)) from error
    if reader.left:
        raise reader.malformed("bytes follow the public area")
    return TpmKey(key, attributes & _AK_SET == _AK_SET and not attributes & _AK_CLEAR)


def parse_pcr_values(data: bytes) -> PcrValues | None:
    """JSON `{"pcrs": {"sha256": {"0": "…"}}}`; None where it is other JSON. Raises EvidenceError."""
    value = parse_json(decode_text(data, "PCR values"), "PCR values")
    if not isinstance(value, dict) or not isinstance(value.get("pcrs"), dict):
        return None
    banks: dict[str, dict[int, bytes]] = {}
    for bank, values in value["pcrs"].items():
        if bank not in HASHES.values() or not isinstance(values, dict):
            raise EvidenceError("attest.malformed", f"PCR values: no bank {bank[:20]!r}")
        if set(values) - _INDEXES:
            raise EvidenceError("attest.malformed", "PCR values: an index that is not 0 to 23")
        banks[bank] = {int(index): parse_hex(text, f"PCR {index}") for index, text in values.items()}
    return PcrValues(banks)


def _selection(reader: Reader) -> tuple[tuple[str, tuple[int, ...]], ...]:
    count = reader.number(4)
    if count > _BANKS_MAX:
        raise reader.malformed(f"{count} banks")
    banks: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(count):
        algorithm, bits = reader.number(2), reader.counted(1, 8)
        indexes = tuple(8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1)
        name = HASHES.get(algorithm, f"alg-{algorithm:04x}")
        if any(name == known for known, _ in banks):
            raise reader.malformed(f"the bank {name} twice")
        if indexes:
            banks.append((name, indexes))
    return tuple(banks)


def _without_size(data: bytes, start: bytes) -> bytes:
    if data.startswith(start) or int.from_bytes(data[:2], "big") != len(data) - 2:
        return data
    return data[2:]


def _rsa_key(reader: Reader) -> PublicKey:
    bits, exponent = reader.number(2), reader.number(4)
    modulus = reader.counted(2, 1024)
    if 8 * len(modulus) != bits:
        raise reader.malformed("the modulus has another length than it says")
    return key_from_modulus(modulus, exponent or 65537)


def _ecc_key(reader: Reader) -> PublicKey:
    curve = _CURVES.get(reader.number(2))
    if reader.number(2) != _NULL:
        reader.take(2)
    x, y = reader.counted(2, 128), reader.counted(2, 128)
    if curve is None:
        raise reader.malformed("a curve that is not known")
    return key_from_point(curve, x, y)
