"""What of the platform is measured besides the enclave: kernel, command line, modules, IOMMU, SMT, libvirt.

All of it is what the kernel says through `/proc` and `/sys`; below `root`, which is `/` but in tests.
"""

import contextlib
import platform
from pathlib import Path
from typing import Final

from sealane.attest.platformlog import Measured, digest_of
from sealane.quoting.manifest import digest_file

_LIBVIRT: Final = ("usr/sbin/libvirtd", "usr/sbin/virtqemud", "usr/lib/x86_64-linux-gnu/libvirt.so.0")
_NO_BUILD_ID: Final = b"no build id"


def measure_platform(root: Path) -> list[Measured]:
    """Every entry but those of enclaves and QEMU."""
    entries = [
        _text("kernel", f"{_read(root / 'proc/sys/kernel/osrelease') or platform.release()}"),
        _text("command-line", _read(root / "proc/cmdline")),
        _text("iommu", _iommu(root)),
        _text("smt", _read(root / "sys/devices/system/cpu/smt/control") or "unknown"),
    ]
    entries += [_module(path) for path in sorted((root / "sys/module").glob("*")) if (path / "initstate").exists()]
    present = [path for path in _LIBVIRT if (root / path).is_file()]
    return entries + [Measured("libvirt", f"/{path}", digest_file(root / path)) for path in present]


def measure_binary(path: str) -> Measured:
    """A QEMU's binary; `/proc/PID/exe` is what runs, even where the file was replaced since. Raises HostError."""
    name = path
    with contextlib.suppress(OSError):
        name = str(Path(path).readlink()) if path.startswith("/proc/") else str(Path(path).resolve())
    return Measured("qemu", name, digest_file(path))


def _module(path: Path) -> Measured:
    """A module that was loaded (built-in ones have no initstate), by the build id in its notes (ELF, NT_GNU_BUILD_ID)."""
    note = _NO_BUILD_ID
    with contextlib.suppress(OSError):
        note = (path / "notes/.note.gnu.build-id").read_bytes()
    return Measured("module", path.name, digest_of(note))


def _iommu(root: Path) -> str:
    """The kinds of the IOMMU groups' default domains; `none` where there are no groups."""
    kinds = {_read(path) for path in (root / "sys/kernel/iommu_groups").glob("*/type")}
    return ",".join(sorted(kinds)) or "none"


def _text(what: str, text: str) -> Measured:
    return Measured(what, text[:4000], digest_of(text[:4000].encode()))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
