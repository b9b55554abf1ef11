"""Things that are dear to make and the same every time: kernels, guest images, saved states.

Each has a name and is a directory that appears whole or not at all. Two suites may want the same thing at once: the
first builds it, the second waits and finds it.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CACHE_VARIABLE = "SEALANE_CACHE_DIR"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,150}")


def cache_dir() -> Path:
    """Where the rig keeps things: SEALANE_CACHE_DIR, or `sealane` below the XDG cache directory. Made if missing."""
    named = os.environ.get(CACHE_VARIABLE)
    path = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sealane"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def build_once(name: str, builder: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache; where it is not there yet, `builder` fills it.

    `builder` gets an empty directory beside the final one and may raise: then nothing appears, and the next caller
    tries again. Under a lock of that name, across processes and threads.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a cache name: {name!r}")
    target = cache_dir() / name
    if not target.is_dir():
        locks = cache_dir() / "locks"
        locks.mkdir(exist_ok=True)
        with (locks / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _build(target, builder)
    return target


def _build(target: Path, builder: Callable[[Path], None]) -> None:
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        builder(staging)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def forget_unused(prefix: str, *, days: float) -> None:
    """Removes the entries named `prefix…` that nobody has touched for so long (`touch` the directory on use)."""
    oldest = time.time() - days * 86_400
    for path in cache_dir().glob(f"{prefix}*"):
        if path.is_dir() and path.stat().st_mtime < oldest:
            shutil.rmtree(path, ignore_errors=True)
