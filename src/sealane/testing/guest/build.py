"""Makes the guest's initramfs: busybox, the worker and an init script, in a newc archive, the same bytes every time."""

import gzip
import os
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

from sealane.testing.cache import build_once
from sealane.testing.problems import RigError

READY_MARKER = b"SEALANE-GUEST READY"
_HERE = Path(__file__).parent
_COMPILE = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s")


@cache
def guest_initrd() -> Path:
    """The initramfs, built where its ingredients have changed."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise RigError("no busybox here: install the Debian package busybox-static")
    ingredients = [_HERE / "worker.c", _HERE / "init", Path(__file__), Path(busybox)]
    digest = sha256(b"".join(sha256(path.read_bytes()).digest() for path in ingredients)).hexdigest()
    return build_once(f"guest-{digest[:20]}", lambda made: _build(made, Path(busybox))) / "initrd.gz"


def _build(directory: Path, busybox: Path) -> None:
    archive = b"".join(
        (
            *(newc_entry(name, mode=stat.S_IFDIR | 0o755) for name in ("bin", "dev", "proc", "sys", "tmp")),
            # the kernel opens it before devtmpfs is there; without it the init script could not print
            newc_entry("dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1)),
            newc_entry("init", mode=stat.S_IFREG | 0o755, data=(_HERE / "init").read_bytes()),
            newc_entry("bin/busybox", mode=stat.S_IFREG | 0o755, data=busybox.read_bytes()),
            newc_entry("bin/worker", mode=stat.S_IFREG | 0o755, data=compile_static(_HERE / "worker.c")),
            newc_entry("TRAILER!!!", mode=0),
        )
    )
    (directory / "initrd.gz").write_bytes(gzip.compress(archive, compresslevel=1, mtime=0))


def compile_static(source: Path) -> bytes:
    """A guest's program from one C file, without shared libraries; RigError with the compiler's words where it does not compile."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / source.stem
        try:
            subprocess.run(
                [*_COMPILE, "-o", output, source],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"LC_ALL": "C.UTF-8"},
            )
        except FileNotFoundError as error:
            raise RigError("no C compiler here: install the Debian packages gcc and libc6-dev") from error
        except subprocess.CalledProcessError as error:
            raise RigError(f"the guest's {source.name} does not compile: {error.stderr}") from error
        return output.read_bytes()


def newc_entry(name: str, *, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One member of a newc archive (cpio(5)): thirteen fields of eight hex digits, name and data padded to four bytes.

    Inode numbers, times and owners are all zero, so that equal content gives equal archives.
    """
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return padded(header + encoded) + padded(data)


def padded(data: bytes) -> bytes:
    """Filled with zeros to a multiple of four bytes."""
    return data + bytes(-len(data) % 4)
