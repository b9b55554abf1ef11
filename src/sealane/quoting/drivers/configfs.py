"""The kernel's one interface for TEE reports, configfs-tsm (Documentation/ABI/testing/configfs-tsm-report): a directory a
request, report data into `inblob`, the evidence out of `outblob`, certificates out of `auxblob`.
"""

from pathlib import Path
from typing import Final

from sealane.errors import HostError
from sealane.quoting.drivers.files import padded, read_file, write_file
from sealane.quoting.interface import Configure

REPORTS: Final = "sys/kernel/config/tsm/report"
_NAME: Final = "sealane"


class ConfigfsReport:
    """One request's directory, kept for all quotes of this process. Raises HostError `quoting.driver`."""

    def __init__(self, configuration: Configure, provider: str) -> None:
        self._directory = Path(configuration.root) / REPORTS / _NAME
        try:
            self._directory.mkdir(exist_ok=True)
        except OSError as error:
            raise HostError("quoting.driver", f"{self._directory}: {error.strerror}") from error
        found = read_file(self._directory / "provider").strip().decode(errors="replace")
        if found != provider:
            raise HostError("quoting.driver", f"the kernel's TEE is {found[:40]}, not {provider}")

    def report(self, user_data: bytes) -> tuple[bytes, bytes]:
        """(outblob, auxblob); another process that used the same directory meanwhile shows in `generation`."""
        before = self._generation()
        write_file(self._directory / "inblob", padded(user_data))
        out = read_file(self._directory / "outblob")
        aux = read_file(self._directory / "auxblob", required=False)
        if before is not None and self._generation() != before + 1:
            raise HostError("quoting.driver", "somebody else asked for a report in the same directory")
        return out, aux

    def _generation(self) -> int | None:
        text = read_file(self._directory / "generation", required=False).strip()
        return int(text) if text.isdigit() else None
