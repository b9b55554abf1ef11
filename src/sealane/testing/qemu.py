"""Which QEMU binaries are here, and which one tests should take."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sealane.testing import packages
from sealane.testing.accel import choose_accel
from sealane.testing.problems import RigError

QEMU_VARIABLE = "SEALANE_QEMU"
# QEMU before 9.0 loses dirty pages under TCG (fixed by 03bfc2188f): a guest that writes may arrive with wrong memory.
TCG_TRUSTWORTHY = (9, 0, 0)


@dataclass(frozen=True)
class QemuBinary:
    """One `qemu-system-x86_64`; `source` says where it came from."""

    path: Path
    version: tuple[int, int, int]
    source: Literal["environment", "private", "system"]

    def __str__(self) -> str:
        return f"QEMU {'.'.join(map(str, self.version))} ({self.source})"

    @property
    def tracks_dirty_pages_under_tcg(self) -> bool:
        """Whether guest memory may be checked after a live migration under TCG."""
        return self.version >= TCG_TRUSTWORTHY


def probe(path: Path, source: Literal["environment", "private", "system"]) -> QemuBinary:
    """The binary at `path`, asked for its version."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RigError(f"{path} does not run: {getattr(error, 'stderr', None) or error}") from error
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", done.stdout)
    if match is None:
        raise RigError(f"{path} --version says no version")
    return QemuBinary(path, (int(match[1]), int(match[2]), int(match[3])), source)


@cache
def find_qemu() -> QemuBinary:
    """The QEMU to take: SEALANE_QEMU; else one whose migrations can be trusted here.

    That is the system's where it is 9.0 or later or KVM works, and otherwise the private one; where that cannot be
    had, the system's after all.
    """
    named = os.environ.get(QEMU_VARIABLE)
    if named:
        return probe(Path(named), "environment")
    system = _system_qemu()
    if system and (system.tracks_dirty_pages_under_tcg or choose_accel("auto", system).name == "kvm"):
        return system
    try:
        return probe(packages.private_qemu(), "private")
    except RigError:
        if system is None:
            raise
        return system


@cache
def all_qemus() -> tuple[QemuBinary, ...]:
    """Every distinct version that is here, oldest first; with SEALANE_QEMU only that one."""
    if os.environ.get(QEMU_VARIABLE):
        return (find_qemu(),)
    found = {qemu.version: qemu for qemu in (_system_qemu(), find_qemu()) if qemu}
    return tuple(found[version] for version in sorted(found))


def _system_qemu() -> QemuBinary | None:
    path = shutil.which("qemu-system-x86_64")
    return probe(Path(path), "system") if path else None
