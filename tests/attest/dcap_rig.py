"""A simulated Intel platform under a test root: byte-exact DCAP quotes and collateral, with a knob for each thing.

Every knob is an attribute; a test turns one and asks for `files()`.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from sealane.attest.appraise import Material, appraise
from sealane.attest.quotes import INTEL_QE_VENDOR
from sealane.attest.reference import Reference
from sealane.attest.verdict import Verdict

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
FMSPC = "00906ed50000"
PPID = bytes(range(16))
USER_DATA = bytes(range(1, 65))
SGX_OID = "1.2.840.113741.1.13.1"
Key = Any  # an EC private key, or RSA where a test wants to sign as AMD does


def tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    head = bytes([size]) if size < 128 else bytes([0x81, size]) if size < 256 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + head + content


def oid(*last: int) -> bytes:
    return tlv(6, bytes.fromhex("2a864886f84d010d01") + bytes(last))


def integer(value: int) -> bytes:
    return tlv(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def raw_sign(key: Key, message: bytes) -> bytes:
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def point(key: Key) -> bytes:
    numbers: ec.EllipticCurvePublicNumbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


@dataclass
class Authority:
    name: str
    key: Key
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def digest(self) -> str:
        public = self.key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(public).hexdigest()


def certify(
    name: str,
    issuer: Authority | None,
    *,
    ca: bool = True,
    extension: bytes | None = None,
    not_before: datetime = NOW - 300 * DAY,
    not_after: datetime = NOW + 300 * DAY,
    path_length: int | None = None,
    critical: bool = False,
    key: Key | None = None,
    extensions: dict[str, bytes] | None = None,
) -> Authority:
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), critical=True)
    )
    if extension is not None:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_OID), extension), critical=critical
        )
    for name_, value in (extensions or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(name_), value), critical=False)
    signer = issuer.key if issuer else key
    return Authority(name, key, builder.sign(signer, hashes.SHA256()))


def revocations(
    issuer: Authority,
    revoked: tuple[int, ...] = (),
    *,
    key: Key | None = None,
    this_update: datetime = NOW - DAY,
    next_update: datetime = NOW + 30 * DAY,
    partial: bool = False,
) -> bytes:
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.certificate.subject)
    builder = builder.last_update(this_update).next_update(next_update)
    if partial:
        point_ = x509.IssuingDistributionPoint(None, None, True, False, None, False, False)
        builder = builder.add_extension(point_, critical=True)
    for serial in revoked:
        one = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW - DAY).build()
        builder = builder.add_revoked_certificate(one)
    return builder.sign(key or issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@dataclass
class DcapRig:
    """One platform and one quote on it."""

    version: int = 4
    of_sgx: bool = False  # of a TD else, where the version leaves the choice
    td_15: bool = True
    vendor: bytes = INTEL_QE_VENDOR
    root: Authority = field(default_factory=lambda: certify("Test SGX Root CA", None))
    ca_name: str = "Intel SGX PCK Platform CA"
    pck_name: str = "Intel SGX PCK Certificate"
    signer_name: str = "Intel SGX TCB Signing"
    pck_arguments: dict[str, Any] = field(default_factory=dict)
    ca_arguments: dict[str, Any] = field(default_factory=dict)
    components: tuple[int, ...] = (5,) * 16
    pce_svn: int = 11
    with_extension: bool = True
    # the body
    user_data: bytes = USER_DATA
    td_attributes: int = 1 << 28
    tee_tcb_svn: bytes = bytes([3, 1, 5]) + bytes(13)
    mr_signer_seam: bytes = bytes(48)
    seam_attributes: bytes = bytes(8)
    mr_service_td: bytes = bytes(48)
    sgx_attributes: bytes = bytes([5]) + bytes(15)
    # the quoting enclave
    qe_attributes: bytes = bytes([0x11]) + bytes(15)
    qe_signer: bytes = b"\xdc" * 32
    qe_prod_id: int = 2
    qe_svn: int = 4
    qe_miscselect: int = 0
    auth_data: bytes = b"auth" * 8
    bound: bool = True
    # collateral
    tcb: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    level: dict[str, Any] = field(default_factory=dict)
    revoke_pck: bool = False
    revoke_ca: bool = False
    revoke_signer: bool = False
    lists: dict[str, Any] = field(default_factory=dict)
    list_key: Key | None = None
    leave_out: tuple[str, ...] = ()
    spoil: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.attestation_key = ec.generate_private_key(ec.SECP256R1())

    @property
    def sgx(self) -> bool:
        return self.version == 3 or self.of_sgx

    def certificates(self) -> None:
        if hasattr(self, "pck"):
            return
        self.ca = certify(self.ca_name, self.root, **self.ca_arguments)
        extension = self.extension() if self.with_extension else None
        self.pck = certify(self.pck_name, self.ca, ca=False, extension=extension, **self.pck_arguments)
        self.signer = certify(self.signer_name, self.root, ca=False)

    def extension(self) -> bytes:
        values = [*self.components, self.pce_svn]
        tcb = b"".join(tlv(0x30, oid(2, index) + integer(value)) for index, value in enumerate(values, 1))
        tcb += tlv(0x30, oid(2, 18) + tlv(4, bytes(16)))
        return tlv(
            0x30,
            tlv(0x30, oid(1) + tlv(4, PPID))
            + tlv(0x30, oid(2) + tlv(0x30, tcb))
            + tlv(0x30, oid(3) + tlv(4, bytes(2)))
            + tlv(0x30, oid(4) + tlv(4, bytes.fromhex(FMSPC)))
            + tlv(0x30, oid(5) + tlv(10, b"\0")),
        )

    def body(self) -> bytes:
        if self.sgx:
            return enclave_report(self.sgx_attributes, b"\x0a" * 32, b"\x0b" * 32, 7, 3, self.user_data)
        report = self.tee_tcb_svn + b"\x01" * 48 + self.mr_signer_seam + self.seam_attributes
        report += struct.pack("<Q", self.td_attributes) + bytes(8) + b"\x02" * 48 + bytes(144)
        report += b"".join(bytes([3 + index]) * 48 for index in range(4)) + self.user_data
        return report + (bytes(16) + self.mr_service_td if self.version == 5 and self.td_15 else b"")

    def quote(self) -> bytes:
        self.certificates()
        header = struct.pack("<HHI4x16s20x", self.version, 2, 0 if self.sgx else 0x81, self.vendor)
        body = self.body()
        if self.version == 5:
            body = struct.pack("<HI", 1 if self.sgx else 3 if self.td_15 else 2, len(body)) + body
        signed = header + body
        key = point(self.attestation_key)
        digest = hashlib.sha256(key + (self.auth_data if self.bound else b"other")).digest()
        qe = enclave_report(
            self.qe_attributes, bytes(32), self.qe_signer, self.qe_prod_id, self.qe_svn, digest + bytes(32),
            self.qe_miscselect,
        )  # fmt: skip
        signature = self.spoiled("quote", raw_sign(self.attestation_key, signed))
        chain = self.pck.pem + self.ca.pem + self.root.pem
        inner = qe + self.spoiled("qe", raw_sign(self.pck.key, qe)) + struct.pack("<H", len(self.auth_data))
        inner += self.auth_data + struct.pack("<HI", 5, len(chain)) + chain
        data = signature + key
        data += inner if self.version == 3 else struct.pack("<HI", 6, len(inner)) + inner
        return signed + struct.pack("<I", len(data)) + data

    def tcb_info(self) -> str:
        components: dict[str, Any] = {"sgxtcbcomponents": [{"svn": 5}] * 16, "pcesvn": 11}
        if not self.sgx:
            components["tdxtcbcomponents"] = [{"svn": 0}] * 2 + [{"svn": 5}] + [{"svn": 0}] * 13
        level = {"tcb": components, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": "UpToDate", **self.level}
        value: dict[str, Any] = {
            "id": "SGX" if self.sgx else "TDX", "version": 3, "issueDate": stamp(NOW - DAY),
            "nextUpdate": stamp(NOW + 30 * DAY), "fmspc": FMSPC, "pceId": "0000", "tcbLevels": [level],
        }  # fmt: skip
        if not self.sgx:
            module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "ff" * 8}
            value["tdxModule"] = module
            levels = [{"tcb": {"isvsvn": 3}, "tcbStatus": "UpToDate"}, {"tcb": {"isvsvn": 2}, "tcbStatus": "OutOfDate"}]
            value["tdxModuleIdentities"] = [{"id": "TDX_01", **module, "tcbLevels": levels}]
        return json.dumps({**value, **self.tcb})

    def qe_identity(self) -> str:
        value = {
            "id": "QE" if self.sgx else "TD_QE", "version": 2, "issueDate": stamp(NOW - DAY),
            "nextUpdate": stamp(NOW + 30 * DAY), "miscselect": "00000000", "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15, "attributesMask": "FB" + "FF" * 7 + "00" * 8, "mrsigner": "DC" * 32,
            "isvprodid": 2, "tcbLevels": [{"tcb": {"isvsvn": 4}, "tcbStatus": "UpToDate"},
                                          {"tcb": {"isvsvn": 3}, "tcbStatus": "OutOfDate"}],
        }  # fmt: skip
        return json.dumps({**value, **self.identity})

    def files(self) -> dict[str, bytes]:
        """Every file by its name, without those of `leave_out`."""
        files = {"quote": self.quote()}
        for name, key, text in (
            ("tcb", "tcbInfo", self.tcb_info()),
            ("identity", "enclaveIdentity", self.qe_identity()),
        ):
            signature = self.spoiled(name, raw_sign(self.signer.key, text.encode()))
            files[name] = b'{"%s": %s, "signature": "%s"}' % (key.encode(), text.encode(), signature.hex().encode())
        files["signer"] = self.signer.pem + self.root.pem
        below_root = [one.certificate.serial_number for one in (self.ca,) if self.revoke_ca]
        below_root += [self.signer.certificate.serial_number] if self.revoke_signer else []
        files["root_crl"] = revocations(self.root, tuple(below_root))
        revoked = (self.pck.certificate.serial_number,) if self.revoke_pck else ()
        files["pck_crl"] = revocations(self.ca, revoked, key=self.list_key, **self.lists)
        return {name: data for name, data in files.items() if name not in self.leave_out}

    def reference(self, **changes: Any) -> Reference:
        values: dict[str, Any] = {
            "version": 1, "test_roots": [self.root.digest], "accept_test_roots": True, "user_data": USER_DATA.hex(),
            "hosts": [f"ppid:{PPID.hex()}"], "sgx": {"mrenclave": ["0a" * 32], "mrsigner": ["0b" * 32]},
            "tdx": {"mrtd": ["02" * 48], "rtmr0": ["03" * 48], "rtmr1": ["04" * 48], "rtmr2": ["05" * 48]},
        }  # fmt: skip
        return Reference.model_validate({**values, **changes})

    def verdict(self, *, now: datetime = NOW, reference: Reference | None = None) -> Verdict:
        material = Material()
        for name, data in self.files().items():
            material.add(name, data)
        return appraise(material, reference or self.reference(), now=now)

    def spoiled(self, name: str, signature: bytes) -> bytes:
        return bytes([signature[0] ^ 1]) + signature[1:] if name in self.spoil else signature


def enclave_report(
    attributes: bytes, mrenclave: bytes, mrsigner: bytes, prod_id: int, svn: int, data: bytes, miscselect: int = 0
) -> bytes:
    report = bytes(16) + struct.pack("<I", miscselect) + bytes(28) + attributes + mrenclave + bytes(32) + mrsigner
    return report + bytes(96) + struct.pack("<HH", prod_id, svn) + bytes(60) + data


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
