"""The files that a destination makes for disks that are copied to it, and removes when the VM does not stay.

Sealane makes them itself, so that nothing which is there already is ever written over by what a peer sends:

* only below `storage_directories`, and so for the backing file of an incremental copy, which must be there;
* a file without a name first (O_TMPFILE of open(2)), which vanishes by itself; its device and inode are journalled, and only then
  it gets its name, which fails where that name is taken (linkat(2));
* what is removed is what the journal names, by path, device and inode: no file that somebody put in its place.
"""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import structlog

from sealane.errors import HostError, make_error
from sealane.host.migration.messages import DiskWish
from sealane.host.models import MadeVolume
from sealane.libvirt.machine import qemu_owner
from sealane.limits import IMAGE_TIMEOUT_S

_MODE: Final = 0o600
_log = structlog.get_logger()

# Journals what is going to be there, durably; given all of it each time.
Note = Callable[[list[MadeVolume]], object]


async def make_volumes(wishes: Sequence[DiskWish], directories: Sequence[str], note: Note) -> None:
    """Make a file for each; raises `check.volume`, or `host.permission` where this host cannot. What was made stays."""
    check_room(wishes, directories)
    made: list[MadeVolume] = []
    for wish in wishes:
        with _nameless(wish, directories) as (directory, file):
            await asyncio.to_thread(_fill, wish, file)
            status = os.fstat(file)
            made.append(MadeVolume(path=wish.path, device=status.st_dev, inode=status.st_ino))
            note(list(made))
            _name(wish, directory, file)


def check_room(wishes: Sequence[DiskWish], directories: Sequence[str]) -> None:
    """Raise `check.volume` where a file may not be made, is there already, or would not fit beside the others."""
    needed: dict[int, int] = {}
    for wish in wishes:
        directory = _directory_of(wish.path, directories)
        if os.path.lexists(wish.path):
            raise make_error("check.volume", f"{wish.path} is there already, and is not written over")
        if wish.backing is not None:
            _directory_of(wish.backing, directories)
            if not Path(wish.backing).is_file():
                raise make_error("check.volume", f"{wish.backing}, the backing file of {wish.target}, is not there")
        device, free = directory.stat().st_dev, os.statvfs(directory)
        needed[device] = needed.get(device, 0) + min(wish.allocation_bytes, wish.capacity_bytes)
        if needed[device] > free.f_bavail * free.f_frsize:
            raise make_error("check.volume", f"{directory} has too little room for {wish.target}")


def remove_volumes(volumes: Sequence[MadeVolume]) -> None:
    """Remove what was made here; a file that is another one by now stays, and the log says so. Raises `host.permission`."""
    for volume in volumes:
        try:
            status = os.lstat(volume.path)
            if (status.st_dev, status.st_ino) == (volume.device, volume.inode):
                os.unlink(volume.path)
            else:
                _log.warning("not removed: it is another file than was made here", path=volume.path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise HostError("host.permission", f"{volume.path}: {error.strerror}") from error


def _directory_of(path: str, directories: Sequence[str]) -> Path:
    """The real directory of a path, where files may be made."""
    if os.path.normpath(path) != path:
        raise make_error("check.volume", f"{path} is no plain path")
    directory = Path(path).parent.resolve()
    if not any(directory.is_relative_to(Path(each).resolve()) for each in directories):
        raise make_error("check.volume", f"{path} is in none of this host's `storage_directories`")
    if not directory.is_dir():
        raise make_error("check.volume", f"{directory} is not there")
    return directory


@contextlib.contextmanager
def _nameless(wish: DiskWish, directories: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The directory and a new file in it, which has no name yet."""
    with contextlib.ExitStack() as stack:
        try:
            directory = os.open(_directory_of(wish.path, directories), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, directory)
            file = os.open(".", os.O_TMPFILE | os.O_RDWR, _MODE, dir_fd=directory)
            stack.callback(os.close, file)
        except OSError as error:
            raise HostError("host.permission", f"no file for {wish.path}: {error.strerror}") from error
        yield directory, file


def _fill(wish: DiskWish, file: int) -> None:
    try:
        if wish.format == "raw":
            os.ftruncate(file, wish.capacity_bytes)
        else:
            _make_qcow2(wish, file)
        if (owner := qemu_owner()) is not None:
            os.chown(file, *owner)
    except OSError as error:
        raise HostError("host.permission", f"no file for {wish.path}: {error.strerror}") from error


def _make_qcow2(wish: DiskWish, file: int) -> None:
    below = [] if wish.backing is None else ["-b", wish.backing, "-F", wish.backing_format or "raw"]
    words = ["qemu-img", "create", "-q", "-f", "qcow2", *below, f"/proc/self/fd/{file}", str(wish.capacity_bytes)]
    try:
        done = subprocess.run(words, pass_fds=(file,), capture_output=True, timeout=IMAGE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise make_error(
            "check.volume", f"qemu-img: {type(error).__name__}", mend="is Debian's qemu-utils there?"
        ) from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-200:]
        raise make_error("check.volume", f"qemu-img does not make {wish.path}: {said}")


def _name(wish: DiskWish, directory: int, file: int) -> None:
    try:
        # with a directory's descriptor this is linkat(2), which follows the link below /proc
        os.link(
            f"/proc/self/fd/{file}",
            Path(wish.path).name,
            src_dir_fd=directory,
            dst_dir_fd=directory,
            follow_symlinks=True,
        )
    except FileExistsError:
        raise make_error("check.volume", f"{wish.path} is there already, and is not written over") from None
    except OSError as error:
        raise HostError("host.permission", f"{wish.path}: {error.strerror}") from error
