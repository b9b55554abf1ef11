"""SEV-SNP through configfs-tsm: the report and the host's certificate table. Never met real hardware: see docs/attestation.md."""

from collections.abc import Sequence

from sealane.quoting.drivers.configfs import ConfigfsReport
from sealane.quoting.interface import Configure


class SevSnpDriver:
    """The kernel's `sev_guest`."""

    words = "SEV-SNP"

    def __init__(self, configuration: Configure) -> None:
        self._report = ConfigfsReport(configuration, "sev_guest")

    def resume_log(self, lines: Sequence[bytes]) -> int:
        """Nothing is extended."""
        return len(lines)

    def extend(self, line: bytes) -> None:
        """SEV-SNP has no register for it; the peer gets the log signed by the key that the report names."""

    def quote(self, user_data: bytes, log: bytes) -> dict[str, bytes]:
        """A report of 1184 bytes; the table is empty where the host was given no certificates."""
        report, table = self._report.report(user_data)
        return {"snp.report": report, **({"snp.certificates": table} if table else {})}
