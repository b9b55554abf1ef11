"""SGX through Gramine's `/dev/attestation`: report data in, a DCAP quote out. Never met real hardware: see docs/attestation.md.

The quoting process has to run inside the enclave for this: Gramine gives these files to what it runs.
"""

from collections.abc import Sequence
from pathlib import Path

from sealane.errors import HostError
from sealane.quoting.drivers.files import padded, read_file, write_file
from sealane.quoting.interface import Configure


class SgxDriver:
    """Gramine's files; raises HostError `quoting.driver` where they are not there, or attest by something else."""

    words = "SGX (Gramine)"

    def __init__(self, configuration: Configure) -> None:
        self._directory = Path(configuration.root) / "dev/attestation"
        kind = read_file(self._directory / "attestation_type").strip()
        if kind != b"dcap":
            raise HostError("quoting.driver", f"Gramine attests by {kind[:20]!r}, not by dcap")

    def resume_log(self, lines: Sequence[bytes]) -> int:
        """Nothing is extended."""
        return len(lines)

    def extend(self, line: bytes) -> None:
        """SGX has no register for it; the peer gets the log signed by the key that the quote names."""

    def quote(self, user_data: bytes, log: bytes) -> dict[str, bytes]:
        """A quote of version 3."""
        write_file(self._directory / "user_report_data", padded(user_data))
        return {"sgx.quote": read_file(self._directory / "quote")}
