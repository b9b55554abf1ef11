"""A guest under a standard load generator: the usual initramfs, Debian's stress-ng with its libraries, and an init that runs it.

Libraries of stressors that nobody asks for (GPU, IPsec) are 14 MB of memory that a small guest lacks: in their place stand
libraries of the same names, whose functions end the program.

stress-ng's memory stressor works on one buffer, over and over: `write64` writes all of it, `read64` reads it. It may have so
much of the processor as the kernel's own bandwidth control gives it (cgroup v2, cpu.max): a generator that takes whatever is
there would measure the machine's other work too.
"""

import gzip
import os
import re
import shutil
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
_UNUSED: Final = ("libIPSec_MB.so.1", "libEGL.so.1", "libGLESv2.so.2", "libgbm.so.1")
_COMPILE: Final = ("gcc", "-shared", "-fPIC", "-nostdlib", "-s", "-x", "c", "-")


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
    program = root / _PROGRAM
    libraries = directory / "libraries"
    libraries.mkdir()
    for name in _UNUSED:
        real = next(root / place / name for place in _LIBRARIES if (root / place / name).exists())
        _make_stand_in(libraries / name, sorted(_symbols(program, "-u") & _symbols(real, "--defined-only")))
    files = scripts | {"bin/stress-ng": program.read_bytes()}
    files |= {name: path.read_bytes() for name, path in _needed(root, libraries).items()}
    shutil.rmtree(libraries)
    parents = sorted({str(parent) for name in files for parent in Path(name).parents if parent != Path()})
    entries = [newc_entry(name, mode=stat.S_IFDIR | 0o755) for name in parents]
    entries += [newc_entry(name, mode=stat.S_IFREG | 0o755, data=data) for name, data in files.items()]
    archive = gzip.compress(b"".join((*entries, newc_entry("TRAILER!!!", mode=0))), compresslevel=1, mtime=0)
    first = usual.read_bytes()
    (directory / "initrd").write_bytes(first + bytes(-len(first) % 4) + archive)


def _symbols(path: Path, which: str) -> set[str]:
    """A program's or a library's dynamic symbols without a version: those wanted, or those defined."""
    told = _run("nm", "-D", which, path)
    return set(re.findall(r"\s[A-Za-z] ([A-Za-z_]\w*)$", told, re.MULTILINE))


def _make_stand_in(path: Path, names: list[str]) -> None:
    source = "\n".join(f"void {name}(void) {{ __builtin_trap(); }}" for name in names)
    _run(*_COMPILE, f"-Wl,-soname,{path.name}", "-o", path, stdin=source)


def _needed(root: Path, first: Path) -> dict[str, Path]:
    """Where the guest looks for each library that the program needs, and the file; the loader itself says which."""
    path = ":".join(map(str, (first, *(root / name for name in _LIBRARIES))))
    loader = root / _LIBRARIES[0] / _LOADER
    told = _run(loader, "--library-path", path, "--list", root / _PROGRAM)
    found = dict(re.findall(r"^\s+(\S+) => (\S+) \(", told, re.MULTILINE))
    outside = [
        name for name, file in found.items() if not Path(file).is_relative_to(root) and Path(file).parent != first
    ]
    if "not found" in told or not found or outside:
        raise RigError(f"stress-ng lacks libraries, or found others than the package's: {told}")
    return {f"lib64/{_LOADER}": loader} | {
        f"lib/x86_64-linux-gnu/{name}": Path(file) for name, file in found.items() if "/" not in name
    }


def _run(*argv: str | Path, stdin: str = "") -> str:
    done = subprocess.run([str(word) for word in argv], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RigError(f"{argv[0]}: {done.stdout}{done.stderr}")
    return done.stdout
