"""Reading and writing the kernel's and the library OS's attestation files, with one error."""

from pathlib import Path
from typing import Final

from sealane.errors import HostError

REPORT_DATA_BYTES: Final = 64
_ANSWER_MAX: Final = 1024 * 1024


def padded(user_data: bytes) -> bytes:
    """Report data as every TEE has it: 64 bytes, zeros behind."""
    if not 1 <= len(user_data) <= REPORT_DATA_BYTES:
        raise HostError("quoting.driver", f"{len(user_data)} bytes of user data")
    return user_data.ljust(REPORT_DATA_BYTES, b"\0")


def write_file(path: Path, content: bytes) -> None:
    """In one write(2), as such files want it; raises HostError `quoting.driver`."""
    try:
        with path.open("wb", buffering=0) as file:
            file.write(content)
    except OSError as error:
        raise HostError("quoting.driver", f"{path}: {error.strerror}") from error


def read_file(path: Path, *, required: bool = True) -> bytes:
    """All of it; raises HostError `quoting.driver` where it is empty, or missing and required."""
    try:
        with path.open("rb") as file:
            content = file.read(_ANSWER_MAX)
    except OSError as error:
        if not required:
            return b""
        raise HostError("quoting.driver", f"{path}: {error.strerror}") from error
    if required and not content:
        raise HostError("quoting.driver", f"{path} is empty")
    return content
