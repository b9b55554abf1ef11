"""What the relying party expects: reference values, named hosts, accepted weaknesses. JSON or TOML, optionally signed.

A signed file is a DSSE envelope (payload type below) with Ed25519 signatures.
"""

import base64
import binascii
import re
import tomllib
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sealane.attest.places import line_of
from sealane.attest.reading import decode_text, parse_json
from sealane.attest.reasons import Level
from sealane.crypto.dsse import pre_authentication_encoding
from sealane.crypto.signatures import KeyMalformed, SignatureInvalid, parse_public_key
from sealane.errors import EvidenceError

PAYLOAD_TYPE: Final = "application/vnd.sealane.reference+json"


def _hexadecimal(text: str) -> str:
    bytes.fromhex(text)
    return text.lower()


_BANKS: Final = frozenset({"sha1", "sha256", "sha384", "sha512"})
_PCRS: Final = frozenset(map(str, range(24)))
_DIGEST: Final = re.compile(r"([a-z0-9-]{1,20}:){1,2}([0-9a-f]{2}){1,64}")
_HARDWARE: Final = re.compile(r"(ppid|chip|ak):([0-9a-f]{2}){1,64}")


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text.lower()):
        raise ValueError("not a digest as in `sha256:9f86…`")
    return text.lower()


def _hardware(text: str) -> str:
    if not _HARDWARE.fullmatch(text.lower()):
        raise ValueError("not hardware as in `ak:9f86…`, `ppid:…` or `chip:…`")
    return text.lower()


def _pcr_values(pcrs: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    for bank, values in pcrs.items():
        if bank not in _BANKS or set(values) - _PCRS:
            raise ValueError("a bank is sha1, sha256, sha384 or sha512, and its PCRs are 0 to 23")
    return pcrs


Hex = Annotated[str, Field(min_length=2, max_length=256), AfterValidator(_hexadecimal)]
Choices = Annotated[list[Hex], Field(min_length=1)]
Digests = list[Annotated[str, AfterValidator(_digest)]]
Hardware = list[Annotated[str, AfterValidator(_hardware)]]


AcceptableStatus = Literal["SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SgxReference(_Strict):
    """Enclaves: every list that is given has to hold the quote's value."""

    mrenclave: Choices | None = None
    mrsigner: Choices | None = None
    prod_id: int | None = None
    minimum_svn: int | None = None


class TdxReference(_Strict):
    """Trust domains."""

    mrtd: Choices | None = None
    rtmr0: Choices | None = None
    rtmr1: Choices | None = None
    rtmr2: Choices | None = None
    rtmr3: Choices | None = None
    mrconfigid: Choices | None = None
    mrowner: Choices | None = None
    mrseam: Choices | None = None


class SnpTcb(_Strict):
    """The least security versions of an SEV-SNP platform."""

    boot_loader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0
    fmc: int = 0


class SnpReference(_Strict):
    """SEV-SNP guests."""

    measurement: Choices | None = None
    host_data: Choices | None = None
    id_key_digest: Choices | None = None
    vmpl: list[int] = [0]
    minimum_tcb: SnpTcb | None = None
    minimum_guest_svn: int | None = None
    allow_smt: bool = True


class TpmKey(_Strict):
    """An attestation key that is known, by the SHA-256 of its SubjectPublicKeyInfo."""

    digest: Hex
    root: Literal["hardware", "software"]
    name: str = ""


class TpmReference(_Strict):
    """TPMs: whose keys are known, and which PCR values are good (bank -> index -> values)."""

    keys: list[TpmKey] = []
    pcrs: Annotated[dict[str, dict[str, Choices]], AfterValidator(_pcr_values)] | None = None


class ImaReference(_Strict):
    """Files that may have been measured: `sha256:…` digests."""

    digests: Digests


class PlatformReference(_Strict):
    """Sealane's own log: each list that is given has to hold every entry of its kind, of which there must be one."""

    enclave_manifest: Digests | None = None
    qemu: Digests | None = None
    libvirt: Digests | None = None
    module: Digests | None = None
    kernel: list[str] | None = None
    command_line: list[str] | None = None
    iommu: list[str] | None = None
    smt: list[str] | None = None


class Reference(_Strict):
    """A reference file. What it leaves out is not expected, and lowers the level.

    `peers` names each peer's hardware (as `hosts` does); `identity_key` is the SHA-256 of the SubjectPublicKeyInfo under
    which a host without a root of trust speaks. A migration sets it, and `user_data`, itself.
    """

    version: Literal[1]
    minimum_level: Annotated[int, Field(ge=0, le=4)] = 1
    user_data: Hex | None = None
    hosts: Hardware | None = None
    test_roots: list[Hex] = []
    accept_test_roots: bool = False
    accept_tcb_statuses: list[AcceptableStatus] = []
    sgx: SgxReference | None = None
    tdx: TdxReference | None = None
    snp: SnpReference | None = None
    tpm: TpmReference | None = None
    ima: ImaReference | None = None
    platform: PlatformReference | None = None
    peers: dict[str, Hardware] | None = None
    identity_key: Hex | None = None

    def for_peer(self, name: str) -> "Reference":
        """With `peers`, only this peer's hardware counts as its own; a peer that is not listed has none."""
        return self if self.peers is None else self.model_copy(update={"hosts": self.peers.get(name, [])})

    def with_own(self, own: "Reference") -> "Reference":
        """For a peer that was introduced, by pairing or by a CA: what it showed then, where this file does not say otherwise.

        That software TPMs among its keys count is then the settings' to say alone (`accepted_test_roots`).
        """
        mine, its = self.tpm or TpmReference(), own.tpm or TpmReference()
        pcrs = its.pcrs if mine.pcrs is None else mine.pcrs
        return self.model_copy(
            update={
                "hosts": own.hosts,
                "tpm": TpmReference(keys=[*mine.keys, *its.keys], pcrs=pcrs),
                "ima": own.ima if self.ima is None else self.ima,
                "platform": own.platform if self.platform is None else self.platform,
                "accept_test_roots": True,
            }
        )

    @property
    def wanted(self) -> Level:
        """`minimum_level` as a level."""
        return Level(self.minimum_level)


NO_REFERENCE: Final = Reference(version=1)


def parse_reference(data: bytes, *, key: bytes | None = None) -> Reference:
    """JSON, TOML or a DSSE envelope; with `key` (an Ed25519 public key) the envelope is required and verified.

    Raises EvidenceError `attest.reference`, with the line, or `attest.reference-signature`.
    """
    text = _text(data)
    value: Any
    if text.lstrip().startswith("{"):
        value = _json(text)
    else:
        try:
            value = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # a number of too many digits is a bare ValueError
            raise EvidenceError("attest.reference", str(error)) from error
    if isinstance(value, dict) and "payloadType" in value:
        if key is None:
            raise EvidenceError("attest.reference-signature", "the file is signed; give the key with --reference-key")
        text = _text(open_envelope(value, key))
        value = _json(text)
    elif key is not None:
        raise EvidenceError("attest.reference-signature", "a key was given and the file is not signed")
    return _validated(value, text)


def parse_introduced(data: bytes, *, hardware_keys: frozenset[str] = frozenset()) -> Reference:
    """What a host showed of itself when it was introduced: its keys, its boot, its software, and nothing else.

    A key counts as a hardware TPM's only where this host has seen that itself (`hardware_keys`, digests). Raises EvidenceError.
    """
    own = parse_reference(data)
    keys = [] if own.tpm is None else own.tpm.keys
    judged = [
        one.model_copy(update={"root": "hardware" if one.digest in hardware_keys else "software"}) for one in keys[:4]
    ]
    return Reference(
        version=1,
        hosts=None if own.hosts is None else own.hosts[:8],
        tpm=None if own.tpm is None else TpmReference(keys=judged, pcrs=own.tpm.pcrs),
        ima=own.ima,
        platform=own.platform,
    )


def open_envelope(envelope: dict[str, Any], key: bytes) -> bytes:
    """The payload of a DSSE envelope that `key` signed; raises EvidenceError `attest.reference-signature`."""
    try:
        kind, signatures = envelope["payloadType"], envelope["signatures"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        public = parse_public_key(key)
        candidates = [base64.b64decode(one["sig"], validate=True) for one in signatures[:16]]
    except (KeyError, TypeError, ValueError, binascii.Error, KeyMalformed) as error:
        raise EvidenceError("attest.reference-signature", f"the envelope or the key cannot be read: {error}") from error
    if kind != PAYLOAD_TYPE:
        raise EvidenceError("attest.reference-signature", f"the envelope's payload type is not {PAYLOAD_TYPE}")
    for signature in candidates:
        try:
            public.verify_ed25519(signature, pre_authentication_encoding(kind, payload))
        except SignatureInvalid:
            continue
        return payload
    raise EvidenceError("attest.reference-signature")


def _validated(value: object, text: str) -> Reference:
    try:
        return Reference.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        where = f"line {line_of(text, first['loc'])}: {place or 'file'}"
        raise EvidenceError("attest.reference", f"{where}: {first['msg']}") from error


def _json(text: str) -> Any:
    try:
        return parse_json(text, "reference values")
    except EvidenceError as error:
        raise EvidenceError("attest.reference", error.detail) from error


def _text(data: bytes) -> str:
    try:
        return decode_text(data, "reference values")
    except EvidenceError as error:
        raise EvidenceError("attest.reference", error.detail) from error
