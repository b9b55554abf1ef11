"""SGX quotes (version 3) and quotes of either TEE (versions 4 and 5), little-endian (Intel's ECDSA quote formats).

    0        48                     body                                     signature data
    +--------+--------+-------------------------------------------+--------+------------------------+
    | header | v5:    | v3: enclave report 384                    | u32    | signature 64, key 64,  |
    | 48     | type 2 | v4: by TEE type 384 (SGX) or 584 (TDX)    | length | (v4+: type 6, u32)     |
    |        | size 4 | v5: by type 384 (1), 584 (2), 648 (3)     |        | QE report 384, sig 64, |
    +--------+--------+-------------------------------------------+--------+ auth data, type 5 PEM  |
    |<----------------- signed by the attestation key ----------->|        +------------------------+

Bytes past the signature data are not looked at: the length fields decide.
"""

from dataclasses import dataclass, field
from typing import Final

from sealane.attest.reading import Reader, describe
from sealane.errors import EvidenceError

INTEL_QE_VENDOR: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
ECDSA_P256: Final = 2
TEE_SGX: Final = 0
TEE_TDX: Final = 0x81
HEADER_BYTES: Final = 48
ENCLAVE_REPORT_BYTES: Final = 384
TD_REPORT_10_BYTES: Final = 584
TD_REPORT_15_BYTES: Final = 648
_CERTIFIED_BY_PCK_CHAIN: Final = 5
_CERTIFIED_BY_QE_REPORT: Final = 6
# What a quote holds besides its body: some 600 bytes and a chain of three certificates, 4 KiB.
SIGNATURE_DATA_MAX: Final = 64 * 1024


@dataclass(frozen=True)
class EnclaveReport:
    """REPORTBODY of an enclave (Intel SDM 3D, 38.15)."""

    raw: bytes = field(repr=False)
    cpu_svn: bytes
    miscselect: int
    attributes: bytes
    mrenclave: bytes
    mrsigner: bytes
    prod_id: int
    svn: int
    report_data: bytes

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG: whoever runs the host reads the enclave's memory."""
        return bool(self.attributes[0] & 0x02)

    @property
    def initialised(self) -> bool:
        """ATTRIBUTES.INIT."""
        return bool(self.attributes[0] & 0x01)


@dataclass(frozen=True)
class TdReport:
    """TD report 1.0 or 1.5 as a quote carries it."""

    raw: bytes = field(repr=False)
    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: int
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    mr_service_td: bytes | None = None

    @property
    def debug(self) -> bool:
        """TD attributes, TUD.DEBUG."""
        return bool(self.td_attributes & 1)


@dataclass(frozen=True)
class DcapQuote:
    """A quote: what is signed, and what signs it."""

    version: int
    tee: int
    qe_vendor: bytes
    body: EnclaveReport | TdReport
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    attestation_key: bytes = field(repr=False)
    qe_report: EnclaveReport
    qe_signature: bytes = field(repr=False)
    qe_auth_data: bytes = field(repr=False)
    pck_chain_pem: bytes = field(repr=False)
    length: int

    def __repr__(self) -> str:
        return f"DcapQuote(version={self.version}, tee={self.tee:#x}, {describe(self.signed)})"

    @property
    def kind(self) -> str:
        """For people."""
        return f"{'TDX' if self.tee == TEE_TDX else 'SGX'} quote v{self.version}"


def looks_like_quote(data: bytes) -> bool:
    """Whether the header is that of a DCAP quote (its QE vendor is for the appraisal to judge)."""
    if len(data) < HEADER_BYTES:
        return False
    version, key_type = int.from_bytes(data[:2], "little"), int.from_bytes(data[2:4], "little")
    return version in {3, 4, 5} and key_type in {2, 3} and int.from_bytes(data[4:8], "little") in {TEE_SGX, TEE_TDX}


def parse_quote(data: bytes) -> DcapQuote:
    """Read untrusted bytes; raises EvidenceError `attest.malformed`."""
    reader = Reader(data, "quote")
    version, key_type, tee = reader.number(2), reader.number(2), reader.number(4)
    reader.take(4)  # v3: QE and PCE SVN; v4 and v5: reserved. The signed QE report tells the SVN that counts.
    vendor = reader.take(16)
    reader.take(20)
    if version not in {3, 4, 5} or tee not in {TEE_SGX, TEE_TDX}:
        raise reader.malformed(f"version {version} for the TEE type {tee:#x}")
    if key_type != ECDSA_P256:
        raise reader.malformed(f"attestation keys of the type {key_type} are not known; 2 is ECDSA on P-256")
    body = _read_body(reader, version, tee)
    signed = data[: reader.offset]
    signature_data = Reader(reader.counted(4, SIGNATURE_DATA_MAX), "quote signature data")
    parts = _read_signature_data(signature_data, version)
    return DcapQuote(version, tee, vendor, body, signed, *parts, length=reader.offset)


def parse_enclave_report(raw: bytes) -> EnclaveReport:
    """384 bytes; raises EvidenceError for another length."""
    if len(raw) != ENCLAVE_REPORT_BYTES:
        raise EvidenceError("attest.malformed", f"an enclave report of {len(raw)} bytes")
    return EnclaveReport(
        raw=raw,
        cpu_svn=raw[:16],
        miscselect=int.from_bytes(raw[16:20], "little"),
        attributes=raw[48:64],
        mrenclave=raw[64:96],
        mrsigner=raw[128:160],
        prod_id=int.from_bytes(raw[256:258], "little"),
        svn=int.from_bytes(raw[258:260], "little"),
        report_data=raw[320:384],
    )


def _read_body(reader: Reader, version: int, tee: int) -> EnclaveReport | TdReport:
    if version == 5:
        kind, size = reader.number(2), reader.number(4)
        sizes = {1: ENCLAVE_REPORT_BYTES, 2: TD_REPORT_10_BYTES, 3: TD_REPORT_15_BYTES}
        if sizes.get(kind) != size:
            raise reader.malformed(f"a body of the type {kind} and {size} bytes")
    else:
        kind, size = (1, ENCLAVE_REPORT_BYTES) if version == 3 or tee == TEE_SGX else (2, TD_REPORT_10_BYTES)
    if (kind == 1) != (tee == TEE_SGX):
        raise reader.malformed(f"a body of the type {kind} for the TEE type {tee:#x} in version {version}")
    raw = reader.take(size)
    return parse_enclave_report(raw) if kind == 1 else _td_report(raw)


def _td_report(raw: bytes) -> TdReport:
    return TdReport(
        raw=raw,
        tee_tcb_svn=raw[:16],
        mr_seam=raw[16:64],
        mr_signer_seam=raw[64:112],
        seam_attributes=raw[112:120],
        td_attributes=int.from_bytes(raw[120:128], "little"),
        xfam=raw[128:136],
        mr_td=raw[136:184],
        mr_config_id=raw[184:232],
        mr_owner=raw[232:280],
        mr_owner_config=raw[280:328],
        rtmr=(raw[328:376], raw[376:424], raw[424:472], raw[472:520]),
        report_data=raw[520:584],
        mr_service_td=raw[600:648] if len(raw) == TD_REPORT_15_BYTES else None,
    )


def _read_signature_data(reader: Reader, version: int) -> tuple[bytes, bytes, EnclaveReport, bytes, bytes, bytes]:
    signature, key = reader.take(64), reader.take(64)
    if version >= 4:
        if reader.number(2) != _CERTIFIED_BY_QE_REPORT:
            raise reader.malformed("the certification data is not a QE report")
        inner = Reader(reader.counted(4, SIGNATURE_DATA_MAX), "QE certification data")
        if reader.left:
            raise reader.malformed("bytes follow the certification data")
        reader = inner
    report, report_signature = parse_enclave_report(reader.take(ENCLAVE_REPORT_BYTES)), reader.take(64)
    auth_data = reader.counted(2, 4096)
    kind = reader.number(2)
    if kind != _CERTIFIED_BY_PCK_CHAIN:
        raise reader.malformed(f"certification data of the type {kind} are not known; 5 is a PCK chain")
    chain = reader.counted(4, SIGNATURE_DATA_MAX)
    if reader.left:
        raise reader.malformed("bytes follow the PCK chain")
    return signature, key, report, report_signature, auth_data, chain
