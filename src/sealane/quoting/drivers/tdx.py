"""TDX through configfs-tsm: a DCAP quote of the trust domain. Never met real hardware: see docs/attestation.md."""

from collections.abc import Sequence
from pathlib import Path

from sealane.quoting.drivers.configfs import ConfigfsReport
from sealane.quoting.drivers.files import read_file
from sealane.quoting.interface import Configure


class TdxDriver:
    """The kernel's `tdx_guest`."""

    words = "TDX"

    def __init__(self, configuration: Configure) -> None:
        self._report = ConfigfsReport(configuration, "tdx_guest")
        self._log = Path(configuration.root) / "sys/firmware/acpi/tables/data/CCEL"

    def resume_log(self, lines: Sequence[bytes]) -> int:
        """Nothing is extended: RTMR 3 has no stable interface in the kernels at hand."""
        return len(lines)

    def extend(self, line: bytes) -> None:
        """The peer gets the log signed by the key that the quote names."""

    def quote(self, user_data: bytes, log: bytes) -> dict[str, bytes]:
        """A quote of version 4 or 5, and the CC event log where the firmware gives one."""
        quote, _ = self._report.report(user_data)
        events = read_file(self._log, required=False)
        return {"tdx.quote": quote, **({"boot-log": events} if events else {})}
