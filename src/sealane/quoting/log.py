"""The platform log as it grows: each line is kept in the run directory, which ends with the boot, as the PCR does, and
extended. A line is written before it is extended, so that after a crash the log is ahead by one line at most.
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from sealane.attest.platformlog import Measured, encode_line, manifest_digest, parse_platform_log
from sealane.errors import EvidenceError, HostError
from sealane.quoting.drivers.driver import Driver

_FILE: Final = "platform.log"


class GrowingLog:
    """One host's log and the drivers that extend it."""

    def __init__(self, run: Path, drivers: Sequence[Driver]) -> None:
        self._path, self._drivers = run / _FILE, drivers
        self._lines: list[bytes] = []
        self._known: set[Measured] = set()
        self._resume()

    @property
    def content(self) -> bytes:
        """The log as peers get it."""
        return b"".join(line + b"\n" for line in self._lines)

    def add(self, measured: Iterable[Measured]) -> None:
        """Add what the log does not have yet, as one line. Raises HostError `quoting.driver` or `host.permission`."""
        self._append([one for one in dict.fromkeys(measured) if one not in self._known])

    def add_enclave(self, entries: Sequence[Measured]) -> None:
        """Add what enclaves load with the digest over all of it, in one line, unless the log has that digest."""
        manifest = Measured("enclave-manifest", "-", manifest_digest(entries))
        if manifest not in self._known:
            self._append([*entries, manifest])

    def _append(self, fresh: Sequence[Measured]) -> None:
        if not fresh:
            return
        line = encode_line(fresh)
        self._keep([*self._lines, line])
        self._lines.append(line)
        self._known.update(fresh)
        for driver in self._drivers:
            driver.extend(line)

    def _resume(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                content = self._path.read_bytes()
                log = parse_platform_log(content)
            except EvidenceError as error:
                raise HostError("quoting.failed", f"{self._path}: {error.detail}") from error
            self._lines, self._known = list(log.lines), set(log.entries)
        for driver in self._drivers:
            for line in self._lines[driver.resume_log(self._lines) :]:
                driver.extend(line)

    def _keep(self, lines: Sequence[bytes]) -> None:
        temporary = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))
            temporary.replace(self._path)
        except OSError as error:
            raise HostError("host.permission", f"{self._path}: {error.strerror}") from error
