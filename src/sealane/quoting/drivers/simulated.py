"""A simulated TEE: byte-exact DCAP quotes under a test root, for tests and demonstrations. It isolates nothing.

`attestation.simulated_root` names a directory with what a platform would have:

    key.pem          the attestation key (P-256)
    body             header and body of a quote; the last 64 bytes of an SGX or a TDX 1.0 body are the report data
    certification    what follows signature and key in the quote: QE report, its signature, the PCK chain
    collateral.*     collateral under the same test root, sent along

Verifiers treat it as any quote: they refuse it unless their reference file and their settings name its root.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

from sealane.crypto.signatures import KeyMalformed, sign_p256
from sealane.errors import HostError
from sealane.quoting.drivers.files import REPORT_DATA_BYTES, padded, read_file
from sealane.quoting.interface import Configure


class SimulatedDriver:
    """Signs quotes with a key in a file."""

    words = "simulated TEE (test root, isolates nothing)"

    def __init__(self, configuration: Configure) -> None:
        if not configuration.simulated_root:
            raise HostError("quoting.driver", "`attestation.simulated_root` is not set")
        directory = Path(configuration.simulated_root)
        self._key, self._body = read_file(directory / "key.pem"), read_file(directory / "body")
        self._certification = read_file(directory / "certification")
        self._collateral = {_piece(path): read_file(path) for path in sorted(directory.glob("collateral.*"))}
        if len(self._body) < REPORT_DATA_BYTES:
            raise HostError("quoting.driver", f"{directory / 'body'} is no quote's header and body")

    def resume_log(self, lines: Sequence[bytes]) -> int:
        """Nothing is extended."""
        return len(lines)

    def extend(self, line: bytes) -> None:
        """The peer gets the log signed by the key that the quote names."""

    def quote(self, user_data: bytes, log: bytes) -> dict[str, bytes]:
        """A quote over these user data, and its collateral."""
        signed = self._body[:-REPORT_DATA_BYTES] + padded(user_data)
        try:
            signature, point = sign_p256(self._key, signed)
        except KeyMalformed as error:
            raise HostError("quoting.driver", f"the simulated key: {error}") from error
        data = signature + point + self._certification
        return {"simulated.quote": signed + struct.pack("<I", len(data)) + data, **self._collateral}


def _piece(path: Path) -> str:
    """A name that a bundle takes."""
    return f"simulated.{path.name.lower().replace('_', '-')}"
