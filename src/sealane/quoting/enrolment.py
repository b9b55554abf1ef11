"""Credential activation: how one host has another's TPM prove that an attestation key lives beside an endorsement key.

    verifier    credential, secret = challenge(endorsement key, attestation key)
    attester    Tpm2Driver.activate(credential)            only the TPM that has both keys gives the secret
    verifier    the secret came back: the attestation key goes into the reference values

TPM 2.0 Library, part 1, 24. Who the endorsement key is, its certificate or a person who compared its digest has to say.
"""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from sealane.attest.tpm import parse_tpm_public
from sealane.errors import AttestationRejected, HostError

_SECRET_BYTES: Final = 32
_NAME_SHA256: Final = b"\x00\x0b"
_TIMEOUT_S: Final = 30.0


def name_of(public: bytes) -> bytes:
    """The name of a key: its name algorithm and the digest of its public area (part 1, 16); from a TPM2B_PUBLIC."""
    return _NAME_SHA256 + hashlib.sha256(public[2:]).digest()


def challenge(endorsement_key: bytes, attestation_key: bytes) -> tuple[bytes, bytes]:
    """(credential, secret) for two public areas (TPM2B_PUBLIC); no TPM is needed.

    Raises AttestationRejected `attest.refused` for a key that could sign what its TPM did not make, EvidenceError for bytes that
    are no key, HostError `quoting.driver`.
    """
    if parse_tpm_public(attestation_key).is_attestation_key is not True:
        raise AttestationRejected("attest.refused", "the key is not restricted to what its TPM made")
    secret = os.urandom(_SECRET_BYTES)
    with tempfile.TemporaryDirectory() as directory:
        key, given, credential = (Path(directory) / name for name in ("ek", "secret", "credential"))
        key.write_bytes(endorsement_key)
        given.write_bytes(secret)
        words = ["tpm2_makecredential", "-T", "none", "-u", key, "-s", given, "-n", name_of(attestation_key).hex()]
        try:
            subprocess.run([*map(str, words), "-o", credential], capture_output=True, timeout=_TIMEOUT_S, check=True)
            return credential.read_bytes(), secret
        except (OSError, subprocess.SubprocessError) as error:
            raise HostError("quoting.driver", f"tpm2_makecredential: {type(error).__name__}") from error
