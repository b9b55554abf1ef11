"""What the agent keeps of one VM's TPM: the manifest of its files, outside the storage that they lie on.

One JSON file below the agent's state directory, replaced as a whole and on the disk before anybody goes on. It says which
files are the present ones, by the digest of the last that were written; the key of those files authenticates it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from sealane.crypto.kdf import authenticate, expand, same
from sealane.errors import make_error

T = TypeVar("T")
RECORD_MAX: Final = 64 * 1024
# Enough to tell the copies of a day's backups from files that were never ours.
PAST_MAX: Final = 64
_DIGEST: Final = re.compile(r"([0-9a-f]{64})?")
_COUNTER_MAX: Final = 1 << 63
# What every field but `key` and `past` may be; no library for this, since a keeper starts while a migration waits.
_STATUSES: Final = frozenset({"incoming", "here", "gone"})


@dataclass(frozen=True)
class KeyReference:
    """Where a key is kept ("file", "tpm"), and for which value of the counter; `public` and `private` are a TPM's sealed object."""

    root: str
    counter: int
    index: int = 0
    public: str = ""
    private: str = ""

    def why_not(self) -> str:
        """What does not fit; empty where all does."""
        if self.root not in {"file", "tpm"}:
            return "key.root"
        if not (0 <= self.counter < _COUNTER_MAX and 0 <= self.index < 1 << 32):
            return "key.counter"
        return ""


@dataclass(frozen=True)
class Record:
    """One VM's TPM on this host.

    `status`: "incoming" while its migration is under way, "here", or "gone" once it left. `version` counts the writes of its
    lasting state over all hosts, `past` has the digests of earlier ones. `directory` is below the VM's vTPM directory. While it
    is `running`, files may be on the disk that the record has yet to know.
    """

    vm: str
    status: str
    epoch: int
    key: KeyReference
    storage: str
    directory: str
    version: int = 0
    digest: str = ""
    past: tuple[str, ...] = ()
    ek_sha256: str = ""
    migration: str = ""
    running: bool = False
    mac: str = ""

    @property
    def path(self) -> Path:
        """Where its files are."""
        return Path(self.storage) / self.directory

    def authenticated(self, key: bytes) -> "Record":
        """The record with its proof under the key of the files."""
        return replace(self, mac=self._mac(key))

    def verify(self, key: bytes) -> None:
        """Raises `vtpm.altered` where the record is not what it was when it was written."""
        if not same(self.mac.encode(), self._mac(key).encode()):
            raise make_error("vtpm.altered", f"the record of {self.vm}'s TPM was changed")

    def _mac(self, key: bytes) -> str:
        return authenticate(expand(key, b"sealane v1 vtpm record", 32), replace(self, mac="").encode()).hex()

    def encode(self) -> bytes:
        """As it lies in its file."""
        return json.dumps(asdict(self)).encode()

    def written(self, digest: str) -> "Record":
        """The record once the files have this content."""
        if digest == self.digest:
            return self
        return replace(self, digest=digest, past=self.remembered(), version=self.version + 1)

    def remembered(self) -> tuple[str, ...]:
        """The digests of earlier content, once the present one is among them."""
        return (*self.past, self.digest)[-PAST_MAX:] if self.digest else self.past

    def why_not(self) -> str:
        """What does not fit; empty where all does."""
        numbers, digests = (self.epoch, self.version), (self.digest, self.ek_sha256, *self.past)
        if self.status not in _STATUSES:
            return "status"
        if not all(0 <= number < _COUNTER_MAX for number in numbers):
            return "epoch or version"
        if len(self.past) > PAST_MAX or not all(_DIGEST.fullmatch(each) for each in digests):
            return "digest"
        return self.key.why_not()


def parse_record(data: bytes) -> Record:
    """Read one; raises `vtpm.record`."""
    try:
        said = json.loads(data)
        key = _typed(KeyReference, said.pop("key"))
        past = said.pop("past")
        if type(past) is not list or not all(type(each) is str for each in past):
            raise ValueError("past")
        record = replace(_typed(Record, {**said, "key": key}), past=tuple(past))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise make_error("vtpm.record", f"a record that does not fit: {type(error).__name__}") from None
    if why := record.why_not():
        raise make_error("vtpm.record", f"a record whose {why} does not fit")
    return record


def _typed(cls: type[T], said: dict[str, Any]) -> T:
    """The dataclass with exactly these fields (`past` apart), each of its own type."""
    names = {each.name: each.type for each in fields(cls) if each.name != "past"}  # type: ignore[arg-type]
    if set(said) != set(names) or not all(type(said[name]) is kind for name, kind in names.items()):
        raise ValueError("fields")
    return cls(**said)


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

    def save(self, record: Record, *, durably: bool = True) -> None:
        """Write it; on the disk on return, unless nothing would be lost with it. Raises `vtpm.record`."""
        try:
            write_whole(self._path(record.vm), record.encode(), durably=durably)
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
    def locked(self, vm: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the VM's TPM alone, as its keeper does for life; raises `vtpm.busy`, or waits for the keeper's end."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.directory / f"{vm}.lock", "a", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise make_error("vtpm.busy", f"the TPM of {vm} is running") from None
            yield


def write_whole(path: Path, data: bytes, *, durably: bool = True) -> None:
    """Replace a private file; `durably`: the new content is on the disk, under its name, on return."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = path.with_name(f".{path.name}.new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        if durably:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(scratch, path)
    if durably:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """What was renamed in it is on the disk on return."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
