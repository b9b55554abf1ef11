"""No root of trust: the identity's plain key signs. It says which host speaks, and nothing of what runs there: level 1."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sealane.attest.software import ROOT, encode_statement, signed_bytes
from sealane.crypto.identity import public_key, sign
from sealane.errors import HostError
from sealane.quoting.interface import Configure


class SoftwareDriver:
    """Signs statements with the host's identity key."""

    words = ROOT

    def __init__(self, configuration: Configure) -> None:
        try:
            self._key_pem = Path(configuration.identity_key).read_bytes()
            self._public = public_key(self._key_pem)
        except (OSError, ValueError) as error:
            raise HostError("quoting.driver", f"the identity key cannot be read: {error}") from error

    def resume_log(self, lines: Sequence[bytes]) -> int:
        """Nothing is extended."""
        return len(lines)

    def extend(self, line: bytes) -> None:
        """There is no register; the whole log is signed each time."""

    def quote(self, user_data: bytes, log: bytes) -> dict[str, bytes]:
        """A statement over both."""
        digest = hashlib.sha256(log).digest()
        signature = sign(self._key_pem, signed_bytes(user_data, digest))
        return {"software.statement": encode_statement(self._public, user_data, digest, signature)}
