"""A host's identity: made, kept, renewed, and never mixed up."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from sealane.crypto.identity import create_identity, load_identity, load_identity_pem, save_identity
from sealane.crypto.tls import PREFERRED_GROUP, offered_group
from sealane.errors import ControlError, HostError
from sealane.paths import Paths

NOW = datetime(2025, 6, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(state=tmp_path / "state", run=tmp_path / "run", config=tmp_path / "config")


def test_what_a_certificate_says() -> None:
    identity = create_identity("host-a", now=NOW, lifetime_days=10)
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
    assert identity.fingerprint == "SHA256:" + certificate.fingerprint(hashes.SHA256()).hex()
    assert (identity.not_before, identity.not_after) == (NOW - timedelta(hours=1), NOW + timedelta(days=10))
    assert identity.name == "host-a"
    assert certificate.issuer == certificate.subject
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    certificate.verify_directly_issued_by(certificate)


def test_saved_and_loaded_with_closed_permissions(paths: Paths) -> None:
    identity = create_identity("host-a", now=NOW)
    save_identity(paths, identity)
    assert load_identity(paths) == identity
    assert stat.S_IMODE(paths.identity_key.stat().st_mode) == 0o600
    assert stat.S_IMODE(paths.state.stat().st_mode) == 0o700
    assert sorted(path.name for path in paths.state.iterdir()) == ["identity.crt", "identity.key"]


def test_an_identity_is_replaced_only_on_purpose(paths: Paths) -> None:
    first = create_identity("host-a", now=NOW)
    save_identity(paths, first)
    renewed = create_identity("host-a", now=NOW + timedelta(days=1), key_pem=first.key_pem)
    with pytest.raises(ControlError, match=r"identity\.exists"):
        save_identity(paths, renewed)
    assert load_identity(paths) == first
    save_identity(paths, renewed, replace=True)
    assert load_identity(paths) == renewed
    assert renewed.key_pem == first.key_pem
    assert renewed.fingerprint != first.fingerprint


def test_what_cannot_be_read(paths: Paths) -> None:
    with pytest.raises(HostError, match=r"host\.identity-missing"):
        load_identity(paths)
    one, other = create_identity("a", now=NOW), create_identity("b", now=NOW)
    save_identity(paths, one)
    paths.identity_certificate.write_bytes(other.certificate_pem)
    with pytest.raises(HostError, match="do not belong together"):
        load_identity(paths)
    paths.identity_key.write_bytes(b"no key")
    with pytest.raises(HostError, match=r"host\.identity-missing"):
        load_identity(paths)


def test_a_key_of_another_kind_is_refused() -> None:
    key = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(ValueError, match="not an Ed25519 key"):
        load_identity_pem(key, create_identity("a", now=NOW).certificate_pem)


def test_a_repr_shows_no_key() -> None:
    identity = create_identity("host-a", now=NOW)
    assert "PRIVATE" not in repr(identity)
    assert "BEGIN" not in repr(identity)


def test_this_library_offers_the_hybrid_group() -> None:
    assert offered_group(create_identity("a", now=NOW)) == PREFERRED_GROUP
