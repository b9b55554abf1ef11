"""The measured launch: which files enclaves load, their digests, and whether one has changed since.

The list is taken from an interpreter that is started as the launcher is and imports what it imports: every module's file,
and every file that is mapped executable. Names are relative to the directory of `sys.path` that holds the file, so that two
hosts with the same software give the same digest wherever it lies; libraries of the system have their whole path.

Python's caches of compiled modules are not measured: they carry times and paths, so that no two hosts have the same ones. So the
launcher's interpreter reads none (`paths.ISOLATED`), and compiles the measured sources anew at each start of the agent. A compiled
file without its source is a module's file, and measured as such. Nor does it run `.pth` files or `sitecustomize`.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sealane.attest.platformlog import Measured
from sealane.errors import HostError
from sealane.paths import isolated

_LISTING_TIMEOUT_S: Final = 60.0
_LISTING: Final = """
import importlib, json, sys
for name in ("runpy", "sealane.enclave.process", "sealane.enclave.__main__"):
    importlib.import_module(name)
files = {file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
with open("/proc/self/maps") as maps:
    for line in maps:
        parts = line.split(None, 5)
        if len(parts) == 6 and parts[5].startswith("/") and "x" in parts[1]:
            files.add(parts[5].rstrip("\\n"))
print(json.dumps({"files": sorted(files), "path": sys.path}))
"""
Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Manifest:
    """What was measured: the entries of the log, and the stamp of each file at that moment."""

    entries: tuple[Measured, ...]
    stamps: tuple[tuple[str, Stamp | None], ...]

    def changed(self) -> list[str]:
        """Files that are not those that were measured."""
        return [path for path, stamp in self.stamps if stamp_of(path) != stamp]


def stamp_of(path: str) -> Stamp | None:
    """What changes with a file's content (stat(2)): device, inode, size, times of modification and of change."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def digest_file(path: str | Path) -> str:
    """`sha256:` and the digest of a file; raises HostError `quoting.failed`."""
    try:
        with open(path, "rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HostError("quoting.failed", f"{path} cannot be measured: {error.strerror}") from error


def measure_enclave(*, not_after_ns: int) -> Manifest:
    """Measure all that enclaves load. Raises HostError `quoting.failed`, and `enclave.changed` where a file was changed
    after `not_after_ns` (since 1970), when the launcher may have loaded the old one."""
    listed = _list_files()
    stamps = tuple((path, stamp_of(path)) for path in listed["files"])
    late = [path for path, stamp in stamps if stamp is None or stamp[4] > not_after_ns]
    if late:
        raise HostError("enclave.changed", f"{late[0]} was changed while the agent started")
    roots = sorted((os.path.join(root, "") for root in listed["path"] if root), key=len, reverse=True)
    entries = tuple(Measured("enclave", _relative(path, roots), digest_file(path)) for path in listed["files"])
    return Manifest(entries, stamps)


def _list_files() -> dict[str, Any]:
    try:
        done = subprocess.run(
            isolated(_LISTING),
            env={"LANG": "C.UTF-8"},
            capture_output=True,
            timeout=_LISTING_TIMEOUT_S,
            check=True,
        )
        listed: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise HostError("quoting.failed", f"what enclaves load cannot be listed: {type(error).__name__}") from error
    return listed


def _relative(path: str, roots: Sequence[str]) -> str:
    return next((path.removeprefix(root) for root in roots if path.startswith(root)), path)
