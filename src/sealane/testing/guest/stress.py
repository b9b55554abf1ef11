"""A guest under a standard load generator: the usual initramfs, Debian's stress-ng with its libraries, and an init that runs it.

stress-ng's memory stressor works on one buffer, over and over: `write64` writes all of it, `read64` reads it. It may have so
much of the processor as the kernel's own bandwidth control gives it (cgroup v2, cpu.max): a generator that takes whatever is
there would measure the machine's other work too.
"""

import gzip
import os
import re
import stat
import subprocess
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal, TypeAlias

from sealane.testing import packages
from sealane.testing.cache import build_once, forget_unused
from sealane.testing.guest.build import guest_initrd, newc_entry
from sealane.testing.machine import Workload
from sealane.testing.problems import RigError

Load: TypeAlias = Literal["write", "read"]
READY: Final = "LOAD READY"
_METHODS: Final[dict[Load, str]] = {"write": "write64", "read": "read64"}
_HERE: Final = Path(__file__).parent
_PROGRAM: Final = "usr/bin/stress-ng"
_LIBRARIES: Final = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_LOADER: Final = "ld-linux-x86-64.so.2"


@dataclass(frozen=True)
class StressWorkload(Workload):
    """The usual guest, and beside it stress-ng on `load_mib` of memory with `load_percent` of one processor."""

    load: Load = "write"
    load_mib: int = 16
    load_percent: int = 40

    @property
    def initrd(self) -> Path:
        """The guest's initramfs."""
        return stress_initrd()

    def command_line(self) -> str:
        """The kernel's command line that asks for it."""
        words = f"load.method={_METHODS[self.load]} load.mib={self.load_mib} load.percent={self.load_percent}"
        return f"{super().command_line()} {words}"


def stress_version() -> str:
    """Which stress-ng it is, as Debian numbers it."""
    text = (_unpacked() / "usr/share/doc/stress-ng/changelog.Debian.gz").read_bytes()
    found = re.match(r"stress-ng \(([^)]+)\)", gzip.decompress(text).decode(errors="replace"))
    return found[1] if found else "of an unknown version"


def _unpacked() -> Path:
    return packages.unpacked("stress-ng", ["stress-ng"])


@cache
def stress_initrd() -> Path:
    """The initramfs, built where its ingredients have changed; removed when long unused."""
    usual, root = guest_initrd(), _unpacked()
    init, load = (_HERE / "init").read_bytes(), (_HERE / "load").read_bytes()
    init = init.replace(b"/bin/worker\n", b"/bin/load &\n/bin/worker\n")
    program = (root / _PROGRAM).read_bytes()
    parts = (str(usual).encode(), init, load, Path(__file__).read_bytes(), program)
    key = sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest()[:20]
    forget_unused("guest-load-", days=14)
    directory = build_once(
        f"guest-load-{key}", lambda made: _build(made, usual, root, {"init": init, "bin/load": load})
    )
    os.utime(directory)
    return directory / "initrd"


def _build(directory: Path, usual: Path, root: Path, scripts: dict[str, bytes]) -> None:
    files = scripts | {"bin/stress-ng": (root / _PROGRAM).read_bytes()}
    files |= {name: path.read_bytes() for name, path in _needed(root).items()}
    parents = sorted({str(parent) for name in files for parent in Path(name).parents if parent != Path()})
    entries = [newc_entry(name, mode=stat.S_IFDIR | 0o755) for name in parents]
    entries += [newc_entry(name, mode=stat.S_IFREG | 0o755, data=data) for name, data in files.items()]
    archive = gzip.compress(b"".join((*entries, newc_entry("TRAILER!!!", mode=0))), compresslevel=1, mtime=0)
    first = usual.read_bytes()
    (directory / "initrd").write_bytes(first + bytes(-len(first) % 4) + archive)


def _needed(root: Path) -> dict[str, Path]:
    """Where the guest looks for each library that the program needs, and the file; the loader itself says which."""
    path = ":".join(str(root / name) for name in _LIBRARIES)
    loader = root / _LIBRARIES[0] / _LOADER
    done = subprocess.run(
        [loader, "--library-path", path, "--list", root / _PROGRAM], capture_output=True, text=True, check=False
    )
    found = dict(re.findall(r"^\s+(\S+) => (\S+) \(", done.stdout, re.MULTILINE))
    if done.returncode or "not found" in done.stdout or not found:
        raise RigError(f"stress-ng lacks libraries: {done.stdout}{done.stderr}")
    outside = [file for file in found.values() if not Path(file).resolve().is_relative_to(root.resolve())]
    if outside:
        raise RigError(f"libraries of this machine, not of the package: {outside}")
    return {f"lib64/{_LOADER}": loader} | {
        f"lib/x86_64-linux-gnu/{name}": Path(file) for name, file in found.items() if "/" not in name
    }
