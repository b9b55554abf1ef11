"""EK certificates: read from the NV of a real swtpm, whose maker is a CA of its own here; and what a chain has to be to count."""

import base64
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key

from sealane.attest.endorsement import verify_endorsement
from sealane.attest.tpm import parse_tpm_public
from sealane.crypto.dsse import parse_certificate
from sealane.crypto.identity import create_identity
from sealane.errors import AttestationRejected, EvidenceError, PeerError
from sealane.host.proving import TpmProving, check_secret, known_host_of
from sealane.quoting.drivers.tpm2 import Tpm2Driver
from sealane.quoting.enrolment import challenge
from sealane.quoting.interface import Configure
from sealane.session.pairing import Offer
from sealane.testing.hosts import make_hosts

DAY = timedelta(days=1)
NOW = datetime.now(UTC)  # swtpm's certificates begin now
NAMES = ("signkey.pem", "issuercert.pem", "certserial")


@dataclass
class Tpm:
    driver: Tpm2Driver
    maker: bytes

    @property
    def ek(self) -> bytes:
        return self.driver.endorsement_key()


@pytest.fixture(scope="module")
def tpm() -> Iterator[Tpm]:
    """A swtpm with an EK certificate of a CA that was made for it."""
    with make_hosts(["host-a"], network="loopback") as (host,):
        state, ca = host.scratch / "tpm", host.scratch / "ca"
        state.mkdir()
        ca.mkdir()
        signing, issuer, serial = (ca / name for name in NAMES)
        local, setup = ca / "local.conf", ca / "setup.conf"
        local.write_text(f"statedir={ca}\nsigningkey={signing}\nissuercert={issuer}\ncertserial={serial}\n")
        setup.write_text(
            "create_certs_tool=/usr/bin/swtpm_localca\n"
            f"create_certs_tool_config={local}\ncreate_certs_tool_options=/etc/swtpm-localca.options\n"
        )
        words = [
            "swtpm_setup",
            "--tpm2",
            "--tpmstate",
            str(state),
            "--createek",
            "--create-ek-cert",
            "--config",
            str(setup),
        ]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        socket = state / "s"
        process = host.start(
            "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "startup-clear",
            "--server", f"type=unixio,path={socket}", "--ctrl", f"type=unixio,path={socket}.ctrl",
        )  # fmt: skip
        process.wait_until(lambda: socket.exists() and Path(f"{socket}.ctrl").exists(), "its sockets")
        run = str(host.scratch)
        facts = Configure(
            drivers=["tpm2"], identity_key="", started_ns=0, state=run, run=run, tcti=f"swtpm:path={socket}"
        )
        roots = issuer.read_bytes() + (ca / "swtpm-localca-rootca-cert.pem").read_bytes()
        yield Tpm(Tpm2Driver(facts), roots)


Made = tuple[bytes, x509.Name, EllipticCurvePrivateKey]


def authority(name: str, *, by: tuple[x509.Name, EllipticCurvePrivateKey] | None = None) -> Made:
    key = generate_private_key(SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer, signing = by or (subject, key)
    pem = _sign(subject, issuer, key.public_key(), signing, ca=True)
    return pem, subject, key


def _sign(subject, issuer, public, signing, *, ca: bool, until=NOW + 30 * DAY) -> bytes:  # type: ignore[no-untyped-def]
    made = (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), NOW - 30 * DAY, until)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(signing, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def endorse(ek: bytes, name: x509.Name, key: EllipticCurvePrivateKey, *, until: datetime = NOW + 30 * DAY) -> bytes:
    """What a maker of TPMs would issue for this key (DER)."""
    public = serialization.load_der_public_key(parse_tpm_public(ek).key.spki)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "TPM 4711")])
    pem = _sign(subject, name, public, key, ca=False, until=until)
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)


def refused(words: str):  # type: ignore[no-untyped-def]
    return pytest.raises(AttestationRejected, match=words)


def test_swtpm_s_certificate_is_read_and_never_counts(tpm: Tpm) -> None:
    certificate = tpm.driver.ek_certificate()
    found = x509.load_der_x509_certificate(certificate)
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert found.public_key().public_bytes(*form) == parse_tpm_public(tpm.ek).key.spki
    with refused("software TPM"):
        verify_endorsement(certificate, tpm.ek, [tpm.maker], now=NOW + DAY)


def test_a_maker_s_chain(tpm: Tpm) -> None:
    root, root_name, root_key = authority("Maker's root")
    middle, middle_name, middle_key = authority("Maker's CA", by=(root_name, root_key))
    good = endorse(tpm.ek, middle_name, middle_key)
    assert verify_endorsement(good, tpm.ek, [middle, root], now=NOW) == "Maker's root"
    assert verify_endorsement(good, tpm.ek, [middle + root], now=NOW) == "Maker's root"
    with refused("no root"):
        verify_endorsement(good, tpm.ek, [root], now=NOW)
    with refused("no root"):
        verify_endorsement(good, tpm.ek, [middle], now=NOW)
    with refused("no root"):
        verify_endorsement(good, tpm.ek, [authority("Maker's root")[0], authority("Maker's CA")[0]], now=NOW)
    with refused("not valid"):
        verify_endorsement(endorse(tpm.ek, root_name, root_key, until=NOW - DAY), tpm.ek, [root], now=NOW)
    with refused("another key"):
        verify_endorsement(good, tpm.driver.public, [middle, root], now=NOW)
    with refused("cannot be read"):
        verify_endorsement(good[:-9], tpm.ek, [middle, root], now=NOW)
    changed = bytearray(good)
    changed[-1] ^= 1
    with refused("no root|cannot be read"):
        verify_endorsement(bytes(changed), tpm.ek, [middle, root], now=NOW)


# ---- in an offer


def offer(tpm: Tpm, **changes: bytes) -> Offer:
    digest = parse_tpm_public(tpm.driver.public).key.digest
    values = {"version": 1, "hosts": [f"ak:{digest}"], "tpm": {"keys": [{"digest": digest, "root": "hardware"}]}}
    reference = json.dumps(values).encode()
    parts = {"ek": tpm.ek, "ak": tpm.driver.public, "reference": reference, **changes}
    shown = {name: base64.b64encode(part).decode() for name, part in parts.items() if part}
    identity = create_identity("host-a", now=NOW)
    return Offer(parse_certificate(identity.certificate_pem), 48217, shown)


def test_only_a_maker_s_word_makes_hardware_of_it(tpm: Tpm, tmp_path: Path) -> None:
    root, name, key = authority("Maker's root")
    (tmp_path / "root.pem").write_bytes(root)
    certificate = endorse(tpm.ek, name, key)
    digest = parse_tpm_public(tpm.driver.public).key.digest
    for shown, roots, root_words in (
        (offer(tpm), [str(tmp_path / "root.pem")], "software"),
        (offer(tpm, **{"ek-certificate": certificate}), [], "software"),
        (offer(tpm, **{"ek-certificate": tpm.driver.ek_certificate()}), [str(tmp_path / "root.pem")], "software"),
        (offer(tpm, **{"ek-certificate": certificate}), [str(tmp_path / "root.pem")], "hardware"),
    ):
        known = known_host_of(shown, roots, NOW)
        assert known is not None
        assert known.hardware_keys == ([digest] if root_words == "hardware" else [])
        tpm_values = known.parsed().tpm
        assert tpm_values is not None
        assert [one.root for one in tpm_values.keys] == [root_words]


def test_hardware_is_named_only_with_its_keys(tpm: Tpm) -> None:
    for changes in ({"ek": b"", "ak": b""}, {"ak": tpm.ek}):
        with pytest.raises(PeerError, match=r"pairing\.tpm|peer\.message"):
            known_host_of(offer(tpm, **changes), [], NOW)
    with pytest.raises(PeerError, match=r"peer\.message"):
        known_host_of(offer(tpm, ek=b""), [], NOW)
    with pytest.raises(PeerError, match=r"peer\.message"):
        known_host_of(offer(tpm, reference=b"nonsense"), [], NOW)


async def test_the_other_side_s_challenge(tpm: Tpm) -> None:
    """What this TPM finds is what the other side put in; what anybody else guesses is not."""
    proving = TpmProving(lambda: pytest.fail("no line is needed to make a challenge"))
    credential, secret = await proving.challenge(offer(tpm))
    check_secret(secret, tpm.driver.activate(credential))
    for wrong in (b"", bytes(32)):
        with pytest.raises(PeerError, match=r"pairing\.tpm"):
            check_secret(secret, wrong)
    assert await proving.activate(b"") == b""
    with pytest.raises((AttestationRejected, EvidenceError)):  # a key that may sign anything is no attestation key
        challenge(tpm.ek, tpm.ek)
