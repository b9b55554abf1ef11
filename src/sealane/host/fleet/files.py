"""Small files that must be whole or not there, in directories for their owner alone."""

import os
from pathlib import Path

from sealane.errors import HostError


def write_whole(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write durably, in place of what was there; raises HostError `host.permission`."""
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except OSError as error:
        raise HostError("host.permission", f"{path}: {error.strerror}") from error


def read_if_there(path: Path) -> bytes:
    """The content; empty where there is no such file. Raises HostError `host.permission`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise HostError("host.permission", f"{path}: {error.strerror}") from error
