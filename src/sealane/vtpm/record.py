"""What the agent keeps of one VM's TPM: the manifest of its files, outside the storage that they lie on.

One JSON file below the agent's state directory, replaced as a whole and on the disk before anybody goes on. It says which
files are the present ones, by the digest of the last that were written; the key of those files authenticates it.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sealane.crypto.kdf import authenticate, expand, same
from sealane.errors import make_error

RECORD_MAX: Final = 64 * 1024
# Enough to tell the copies of a day's backups from files that were never ours.
PAST_MAX: Final = 64
_Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyReference(_Model):
    """Where a key is kept, and for which value of the counter; `public` and `private` are a TPM's sealed object."""

    root: Literal["file", "tpm"]
    counter: Annotated[int, Field(ge=0, lt=1 << 63)]
    index: int = 0
    public: str = ""
    private: str = ""


class Record(_Model):
    """One VM's TPM on this host.

    `status`: "incoming" while its migration is under way, "here", or "gone" once it left. `version` counts the writes of its
    lasting state over all hosts, `past` has the digests of earlier ones. `directory` is below the VM's vTPM directory.
    """

    vm: str
    status: Literal["incoming", "here", "gone"]
    epoch: int
    version: int = 0
    key: KeyReference
    storage: str
    directory: str
    digest: _Digest = ""
    past: Annotated[list[str], Field(max_length=PAST_MAX)] = []
    ek_sha256: _Digest = ""
    migration: str = ""
    mac: str = ""

    @property
    def path(self) -> Path:
        """Where its files are."""
        return Path(self.storage) / self.directory

    def authenticated(self, key: bytes) -> "Record":
        """The record with its proof under the key of the files."""
        return self.model_copy(update={"mac": self._mac(key)})

    def verify(self, key: bytes) -> None:
        """Raises `vtpm.altered` where the record is not what it was when it was written."""
        if not same(self.mac.encode(), self._mac(key).encode()):
            raise make_error("vtpm.altered", f"the record of {self.vm}'s TPM was changed")

    def _mac(self, key: bytes) -> str:
        text = self.model_copy(update={"mac": ""}).model_dump_json()
        return authenticate(expand(key, b"sealane v1 vtpm record", 32), text.encode()).hex()

    def written(self, digest: str) -> "Record":
        """The record once the files have this content."""
        if digest == self.digest:
            return self
        past = [*self.past, self.digest][-PAST_MAX:] if self.digest else self.past
        return self.model_copy(update={"digest": digest, "past": past, "version": self.version + 1})


def parse_record(data: bytes) -> Record:
    """Read one; raises `vtpm.record`."""
    try:
        return Record.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise make_error("vtpm.record", f"{where}: {first['msg']}") from None


def digest_of(content: bytes) -> str:
    """How records name the content of a file."""
    return hashlib.sha256(content).hexdigest()


class Records:
    """The records of one host, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _path(self, vm: str) -> Path:
        return self.directory / f"{vm}.json"

    def find(self, vm: str) -> Record | None:
        """The record of that VM; raises `vtpm.record`."""
        try:
            with open(self._path(vm), "rb") as file:
                return parse_record(file.read(RECORD_MAX + 1))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise make_error("vtpm.record", f"{self._path(vm)}: {error.strerror}") from error

    def names(self) -> list[str]:
        """The VMs that have one."""
        return sorted(path.stem for path in self.directory.glob("*.json"))

    def save(self, record: Record) -> None:
        """Write it; on the disk on return. Raises `vtpm.record`."""
        try:
            write_durably(self._path(record.vm), record.model_dump_json().encode())
        except OSError as error:
            raise make_error("vtpm.record", f"{self._path(record.vm)}: {error.strerror}") from error

    def owner_of(self, digest: str, *, but: str) -> str | None:
        """Another VM of this host whose files have, or had, this content."""
        for name in self.names():
            with contextlib.suppress(Exception):
                record = self.find(name)
                if name != but and record is not None and digest in {record.digest, *record.past}:
                    return name
        return None

    @contextlib.contextmanager
    def locked(self, vm: str) -> Iterator[None]:
        """Hold the VM's TPM alone, as its keeper does for life; raises `vtpm.busy`."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.directory / f"{vm}.lock", "a", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise make_error("vtpm.busy", f"the TPM of {vm} is running") from None
            yield


def write_durably(path: Path, data: bytes) -> None:
    """Replace a private file: the new content is on the disk, under its name, on return."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = path.with_name(f".{path.name}.new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(scratch, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """What was renamed in it is on the disk on return."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
