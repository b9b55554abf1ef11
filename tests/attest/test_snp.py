"""SEV-SNP: a simulated chip under a test root, and each check by the one change that it is there for."""

import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from sealane.attest.appraise import Material, appraise
from sealane.attest.reasons import Level
from sealane.attest.reference import Reference
from sealane.attest.verdict import Verdict
from sealane.crypto.chains import LinkBroken, parse_certificates, parse_revocation_list
from sealane.errors import EvidenceError
from tests.attest.dcap_rig import DAY, NOW, USER_DATA, Authority, certify, integer, revocations, tlv

CHIP = bytes(range(64, 128))
OID = "1.3.6.1.4.1.3704.1"


@dataclass
class SnpRig:
    """One chip and one report of it."""

    ark: Authority = field(default_factory=lambda: certify("ARK-Test", None))
    version: int = 3
    policy: int = 1 << 17
    vmpl: int = 0
    flags: int = 0
    user_data: bytes = USER_DATA
    chip: bytes = CHIP
    reported: bytes = bytes([3, 0, 0, 0, 0, 0, 8, 115])
    certified: dict[str, int] = field(default_factory=lambda: {"1": 3, "2": 0, "3": 8, "8": 115})
    certified_chip: bytes | None = CHIP
    product: bytes | None = tlv(0x16, b"Milan-B0")
    signer_name: str = "SEV-VCEK"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    signing_key: ec.EllipticCurvePrivateKey | None = None
    junk_after_signature: bool = False
    revoke_ask: bool = False
    lists: dict[str, Any] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()

    def report(self) -> bytes:
        raw = bytearray(1184)
        struct.pack_into("<IIQ", raw, 0, self.version, 4, self.policy)
        struct.pack_into("<II", raw, 0x30, self.vmpl, 1)
        struct.pack_into("<I", raw, 0x48, self.flags)
        raw[0x50:0x90] = self.user_data
        raw[0x90:0xC0] = b"\x0a" * 48
        raw[0xC0:0xE0] = b"\x0b" * 32
        raw[0xE0:0x110] = b"\x0c" * 48
        raw[0x180:0x188] = self.reported
        raw[0x1A0:0x1E0] = self.chip
        signature = (self.signing_key or self.key).sign(bytes(raw[:0x2A0]), ec.ECDSA(hashes.SHA384()))
        r, s = utils.decode_dss_signature(signature)
        raw[0x2A0 : 0x2A0 + 144] = r.to_bytes(72, "little") + s.to_bytes(72, "little")
        if self.junk_after_signature:
            raw[-1] = 1
        return bytes(raw)

    def files(self) -> dict[str, bytes]:
        ask = certify("SEV-Test", self.ark)
        extensions = {f"{OID}.3.{name}": integer(value) for name, value in self.certified.items()}
        if self.certified_chip is not None:
            extensions[f"{OID}.4"] = self.certified_chip
        if self.product is not None:
            extensions[f"{OID}.2"] = self.product
        vcek = certify(self.signer_name, ask, ca=False, key=self.key, extensions=extensions)
        revoked = (ask.certificate.serial_number,) if self.revoke_ask else ()
        files = {
            "report": self.report(),
            "vcek": vcek.certificate.public_bytes(serialization.Encoding.DER),
            "ask": ask.pem,
            "ark": self.ark.pem,
            "crl": revocations(self.ark, revoked, **self.lists),
        }
        return {name: data for name, data in files.items() if name not in self.leave_out}

    def reference(self, **changes: Any) -> Reference:
        snp = {"measurement": ["0a" * 48], "minimum_tcb": {"snp": 8, "microcode": 115}}
        values: dict[str, Any] = {
            "version": 1, "test_roots": [self.ark.digest], "accept_test_roots": True, "user_data": USER_DATA.hex(),
            "hosts": [f"chip:{CHIP.hex()}"], "snp": {**snp, **changes.pop("snp", {})},
        }  # fmt: skip
        return Reference.model_validate({**values, **changes})

    def verdict(self, reference: Reference | None = None) -> Verdict:
        material = Material()
        for name, data in self.files().items():
            material.add(name, data)
        return appraise(material, reference or self.reference(), now=NOW)


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_whole_chip_reaches_the_highest_level(version: int) -> None:
    rig = SnpRig(version=version)
    verdict = rig.verdict()
    assert codes(verdict) == {"chain.test-root-accepted"}
    assert verdict.level == Level.ISOLATED
    assert verdict.production_level == Level.NOTHING
    assert codes(rig.verdict(rig.reference(accept_test_roots=False))) == {"chain.test-root"}


def test_a_chip_with_fmc_has_another_order_of_versions() -> None:
    certified = {"1": 2, "2": 3, "3": 8, "8": 115, "9": 1}
    chip = bytes(range(1, 9))
    rig = SnpRig(reported=bytes([1, 2, 3, 8, 0, 0, 0, 115]), certified=certified, certified_chip=chip)
    rig.chip = chip.ljust(64, b"\0")
    assert codes(rig.verdict(rig.reference(hosts=[f"chip:{rig.chip.hex()}"]))) == {"chain.test-root-accepted"}


OTHER = ec.generate_private_key(ec.SECP384R1())
CASES: list[tuple[str, dict[str, Any], str, Level]] = [
    ("signed by another key", {"signing_key": OTHER}, "snp.signature", Level.NOTHING),
    ("signed on another curve", {"key": ec.generate_private_key(ec.SECP256R1())}, "snp.signature", Level.NOTHING),
    ("bytes after the signature", {"junk_after_signature": True}, "snp.signature", Level.NOTHING),
    ("VCEK missing", {"leave_out": ("vcek",)}, "chain.missing", Level.NOTHING),
    ("ASK missing", {"leave_out": ("ask",)}, "chain.missing", Level.NOTHING),
    ("ARK missing", {"leave_out": ("ark",)}, "chain.missing", Level.NOTHING),
    ("ASK revoked", {"revoke_ask": True}, "chain.revoked", Level.NOTHING),
    ("list expired", {"lists": {"next_update": NOW - DAY / 2}}, "crl.expired", Level.NOTHING),
    ("no list", {"leave_out": ("crl",)}, "snp.crl-missing", Level.HARDWARE_ROOTED),
    ("debug", {"policy": 1 << 17 | 1 << 19}, "tee.debug", Level.NOTHING),
    ("reserved bit", {"policy": 0}, "snp.policy", Level.NOTHING),
    ("migration agent", {"policy": 3 << 17}, "snp.migration-agent", Level.HARDWARE_ROOTED),
    ("VMPL 2", {"vmpl": 2}, "snp.vmpl", Level.NOTHING),
    ("no key", {"flags": 7 << 2}, "snp.signing-key", Level.NOTHING),
    ("VLEK without its certificate", {"flags": 1 << 2}, "chain.missing", Level.NOTHING),
    ("another TCB", {"reported": bytes([3, 0, 0, 0, 0, 0, 9, 115])}, "snp.tcb-mismatch", Level.NOTHING),
    ("another chip", {"certified_chip": bytes(64)}, "snp.chip-mismatch", Level.NOTHING),
    ("certificate without chip", {"certified_chip": None}, "snp.chip-mismatch", Level.NOTHING),
    ("certificate without product", {"product": None}, "snp.product", Level.NOTHING),
    ("certificate without versions", {"certified": {}}, "snp.product", Level.NOTHING),
    ("empty user data", {"user_data": bytes(64)}, "binding.empty", Level.NOTHING),
    ("other user data", {"user_data": b"\x09" * 64}, "binding.mismatch", Level.NOTHING),
]


@pytest.mark.parametrize(("changes", "code", "level"), [one[1:] for one in CASES], ids=[one[0] for one in CASES])
def test_one_change_gives_its_own_reason(changes: dict[str, Any], code: str, level: Level) -> None:
    verdict = SnpRig(**changes).verdict()
    assert codes(verdict) - {"chain.test-root-accepted"} == {code}
    assert verdict.level == level


EXPECTATIONS: list[tuple[str, dict[str, Any], str, Level]] = [
    ("another guest", {"snp": {"measurement": ["00" * 48]}}, "reference.mismatch", Level.NOTHING),
    ("another host data", {"snp": {"host_data": ["00" * 32]}}, "reference.mismatch", Level.NOTHING),
    ("another id key", {"snp": {"id_key_digest": ["00" * 48]}}, "reference.mismatch", Level.NOTHING),
    ("an old guest", {"snp": {"minimum_guest_svn": 5}}, "reference.mismatch", Level.NOTHING),
    ("an old platform", {"snp": {"minimum_tcb": {"snp": 9}}}, "snp.tcb-out-of-date", Level.NOTHING),
    ("no least TCB", {"snp": {"minimum_tcb": None}}, "snp.tcb-unjudged", Level.HARDWARE_ROOTED),
    ("no guest", {"snp": {"measurement": None}}, "reference.none", Level.IDENTITY),
    ("another host", {"hosts": ["chip:00"]}, "reference.host", Level.NOTHING),
    ("no host", {"hosts": None}, "reference.host-unnamed", Level.MEASURED_SOFTWARE),
    ("no root", {"test_roots": []}, "chain.root-unknown", Level.NOTHING),
]


@pytest.mark.parametrize(("changes", "code", "level"), [e[1:] for e in EXPECTATIONS], ids=[e[0] for e in EXPECTATIONS])
def test_what_is_not_expected_or_not_known(changes: dict[str, Any], code: str, level: Level) -> None:
    rig = SnpRig()
    verdict = rig.verdict(rig.reference(**changes))
    assert codes(verdict) - {"chain.test-root-accepted"} == {code}
    assert verdict.level == level


def test_smt_is_refused_where_it_is_not_allowed() -> None:
    rig = SnpRig(policy=3 << 16)
    assert rig.verdict().accepted
    assert "snp.policy" in codes(rig.verdict(rig.reference(snp={"allow_smt": False})))


def test_a_masked_chip_is_no_named_host() -> None:
    rig = SnpRig(flags=2, chip=bytes(64))
    assert {"snp.chip-masked", "reference.host"} <= codes(rig.verdict())
    unnamed = rig.verdict(rig.reference(hosts=None))
    assert "snp.chip-masked" in codes(unnamed)
    assert unnamed.level == Level.MEASURED_SOFTWARE


def test_a_providers_key_signs_for_no_chip() -> None:
    verdict = SnpRig(flags=1 << 2, signer_name="SEV-VLEK", certified_chip=None).verdict()
    assert codes(verdict) == {"chain.test-root-accepted"}


def test_every_byte_of_report_and_signature_counts() -> None:
    rig = SnpRig()
    files = rig.files()
    report = files.pop("report")
    material = Material()
    for name, data in files.items():
        material.add(name, data)
    passed = []
    for at in range(0x2A0 + 144):
        changed = report[:at] + bytes([report[at] ^ 1]) + report[at + 1 :]
        one = Material(collateral=material.collateral)
        try:
            one.add("report", changed)
        except EvidenceError:
            continue  # version or algorithm: not understood
        if appraise(one, rig.reference(), now=NOW).accepted:
            passed.append(at)
    assert passed == []


def codes(verdict: Verdict) -> set[str]:
    return {reason.code for reason in verdict.reasons}


def test_a_list_that_is_signed_with_pss_as_amd_signs() -> None:
    ark = certify("ARK-Test", None, key=rsa.generate_private_key(65537, 2048))
    other = certify("ARK-Test", None, key=rsa.generate_private_key(65537, 2048))
    builder = x509.CertificateRevocationListBuilder().issuer_name(ark.certificate.subject)
    builder = builder.last_update(NOW - DAY).next_update(NOW + DAY)
    form = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    signed = builder.sign(ark.key, hashes.SHA384(), rsa_padding=form)
    found = parse_revocation_list(signed.public_bytes(serialization.Encoding.DER))
    found.verify_issued_by(parse_certificates(ark.pem)[0])
    with pytest.raises(LinkBroken):
        found.verify_issued_by(parse_certificates(other.pem)[0])
