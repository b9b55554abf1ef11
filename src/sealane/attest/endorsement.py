"""The endorsement of a TPM by its maker: an EK certificate and the chain to a root that this host was told of (TCG EK Credential
Profile for TPM 2.0, 3.2).

The roots are the operator's to name (`attestation.tpm_roots`). A certificate of a software TPM never makes hardware of it, whatever
signed it.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sealane.attest.tpm import parse_tpm_public
from sealane.crypto.chains import Certificate, CertificateMalformed, LinkBroken, parse_certificates
from sealane.errors import AttestationRejected, EvidenceError

_DEPTH_MAX: Final = 6
# TCG's attributes in the alternative name: swtpm gives itself this model.
_SOFTWARE: Final = b"swtpm"


def verify_endorsement(certificate: bytes, endorsement_key: bytes, roots: Sequence[bytes], *, now: datetime) -> str:
    """The root's name, where the EK certificate (DER) is over this key (TPM2B_PUBLIC) and leads to one of the roots (PEM or DER).

    Raises AttestationRejected `attest.endorsement`.
    """
    try:
        (leaf,) = parse_certificates(certificate)
        known = [one for root in roots for one in parse_certificates(root)]
        key = parse_tpm_public(endorsement_key).key
    except (CertificateMalformed, EvidenceError) as error:
        raise _refused(f"it cannot be read: {error}") from None
    if leaf.public_key != key:
        raise _refused("it is over another key than the TPM's endorsement key")
    if leaf.is_authority:
        raise _refused("it is a CA's certificate")
    if _SOFTWARE in certificate.lower():
        raise _refused("it is a software TPM's")
    return _root_of(leaf, known, now)


def _root_of(leaf: Certificate, known: Sequence[Certificate], now: datetime) -> str:
    current = leaf
    for _ in range(_DEPTH_MAX):
        if not current.not_before <= now <= current.not_after:
            raise _refused(f"{current.name} is not valid now")
        issuer = next((one for one in known if _issued(current, one)), None)
        if issuer is None:
            raise _refused(f"no root that is trusted here has signed {current.name}")
        if issuer.self_issued:
            return issuer.name
        current = issuer
    raise _refused("its chain is too long")


def _issued(certificate: Certificate, issuer: Certificate) -> bool:
    try:
        certificate.verify_issued_by(issuer)
    except LinkBroken:
        return False
    return True


def _refused(why: str) -> AttestationRejected:
    return AttestationRejected("attest.endorsement", f"the TPM's certificate does not count: {why}")
