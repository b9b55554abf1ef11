"""Real files for a guest's page cache: programs, libraries and text of the machine that the rig runs on.

They stand in the initramfs, whose files are page cache and nothing else, below /files with numbers for names.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from sealane.testing.cache import build_once, forget_unused
from sealane.testing.guest.build import guest_initrd, newc_entry, padded
from sealane.testing.problems import RigError

_MIB = 1 << 20
_PROGRAMS = (Path("/usr/bin"), Path("/usr/sbin"), Path("/usr/lib"))
_TEXTS = (Path("/usr/share"), Path("/usr/include"), Path("/usr/lib"))
# No single library or table may be most of the mixture.
_FILE_MAX = 8 * _MIB
_FILE_MIN = 4096


@dataclass(frozen=True)
class Files:
    """How much of programs and libraries (ELF), and of text (UTF-8 without zero bytes), to take."""

    programs_mib: int
    text_mib: int


def initrd_with_files(files: Files) -> Path:
    """The guest's initramfs followed by an archive of files, built where either has changed; removed when long unused."""
    chosen = chosen_files(files)
    known = [f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in chosen]
    key = sha256("\0".join([str(guest_initrd()), *known]).encode()).hexdigest()[:20]
    forget_unused("files-", days=14)
    directory = build_once(f"files-{key}", lambda made: _build(made, chosen))
    os.utime(directory)
    return directory / "initrd"


@cache
def chosen_files(files: Files) -> tuple[Path, ...]:
    """The files of this machine that the guest has: programs, then text. RigError where there are too few."""
    programs = _take(_PROGRAMS, files.programs_mib * _MIB, is_program=True)
    return (*programs, *_take(_TEXTS, files.text_mib * _MIB, is_program=False))


def _take(roots: tuple[Path, ...], wanted_bytes: int, *, is_program: bool) -> Iterator[Path]:
    """Files in the order of their names until there are enough; RigError where the machine has too few."""
    left = wanted_bytes
    for root in roots:
        for directory, names, files in os.walk(root):
            names.sort()
            for path in (Path(directory, name) for name in sorted(files)):
                if left <= 0:
                    return
                if _is_kind(path, is_program=is_program):
                    left -= path.stat().st_size
                    yield path
    if left > 0:
        raise RigError(f"this machine has not {wanted_bytes // _MIB} MiB of {'programs' if is_program else 'text'}")


def _is_kind(path: Path, *, is_program: bool) -> bool:
    if path.is_symlink() or not path.is_file() or not _FILE_MIN <= path.stat().st_size <= _FILE_MAX:
        return False
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    if is_program:
        return head.startswith(b"\x7fELF")
    try:
        return b"\0" not in head and bool(head[:4000].decode(errors="strict"))
    except UnicodeDecodeError as error:
        return error.start > 3990


def _build(directory: Path, chosen: tuple[Path, ...]) -> None:
    with (directory / "initrd").open("wb") as initrd:
        initrd.write(padded(guest_initrd().read_bytes()))
        initrd.write(newc_entry("files", mode=stat.S_IFDIR | 0o755))
        for number, path in enumerate(chosen):
            initrd.write(newc_entry(f"files/{number}", mode=stat.S_IFREG | 0o644, data=path.read_bytes()))
        initrd.write(newc_entry("TRAILER!!!", mode=0))
