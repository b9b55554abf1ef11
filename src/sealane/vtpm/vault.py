"""One VM's TPM from its files to a running swtpm, and to its end.

Every launch has a key and a directory of its own, so that no file of an earlier launch can take the place of a present one:

    made or adopted   the state of a new TPM, or of one that was kept in clear, under a first key
    opened            record, counter, key and digest are verified; the state goes under the next key into the next directory
    incoming          an empty directory under a new key; QEMU brings the state, which the enclave opens, and meanwhile the key
                      is wrapped: nothing of it counts before both are on the disk
    destroyed         the key first, then the files

Nothing but QEMU's lane ever carries state between hosts, so shared storage needs no lock between them, and no key travels.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sealane.crypto.aead import KEY_BYTES
from sealane.errors import SealaneError, make_error
from sealane.vtpm.control import BlobType
from sealane.vtpm.record import KeyReference, Record, Records, digest_of, sync_directory
from sealane.vtpm.roots import FileRoot, Root, TpmRoot
from sealane.vtpm.swtpm import STATE_FILE, Swtpm, manufacture, read_state

_STATE_FILE_MAX: Final = 1 << 20
# The first byte of swtpm's files (src/swtpm/swtpm_nvstore.c, blobheader): from version 2 on they have an HMAC.
_AUTHENTICATED: Final = b"\x02"


@dataclass
class Launched:
    """A running swtpm, its record and its key."""

    swtpm: Swtpm
    record: Record
    key: bytes

    def __repr__(self) -> str:
        return f"Launched({self.record.vm}, epoch {self.record.epoch})"


class Vault:
    """One VM's TPM on this host; the caller holds `Records.locked`."""

    def __init__(
        self,
        records: Records,
        vm: str,
        *,
        storage: Path,
        scratch: Path,
        tcti: str | None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`tcti` leads to the host's TPM, None: it has none. `scratch` is private and not on a disk."""
        self.records, self.vm, self._storage, self._scratch = records, vm, storage, scratch
        self._tcti, self._random = tcti, random

    def root_of(self, reference: KeyReference | None) -> Root:
        """What keeps this key; for a new one what this host has."""
        if (self._tcti is not None) if reference is None else reference.root == "tpm":
            return TpmRoot(self._tcti or "", self._scratch)
        return FileRoot(self.records.directory, self.vm)

    # ---- to a running swtpm

    def create(self, epoch: int, *, adopt: bool) -> Launched:
        """A new TPM, or with `adopt` the one whose state lies in clear in the storage; raises `vtpm.exists`, `vtpm.adopt`."""
        if (record := self.records.find(self.vm)) is not None and record.status != "gone":
            raise make_error("vtpm.exists", f"{self.vm} has a TPM here")
        plain = self._storage / STATE_FILE
        if plain.exists() and not adopt:
            raise make_error("vtpm.adopt", f"{plain} is there, in clear")
        with self._private() as scratch:
            try:
                content = _read(plain) if adopt else manufacture(scratch)
            except OSError as error:
                raise make_error("vtpm.adopt", f"{plain}: {error.strerror}") from error
        state, ek = self._look_into(content, None)
        launched = self._launch(state, record, epoch=epoch, ek=ek)
        if adopt:
            plain.unlink()
        return launched

    def open(self, epoch: int, *, after_crash: bool = False) -> Launched:
        """The TPM as it was left, under its next key; raises what `verify` does, but with `after_crash` not `vtpm.ahead`."""
        record, _key, state = self._verified(after_crash=after_crash)
        return self._launch(state, record, epoch=epoch, ek=record.ek_sha256)

    def receive(self, epoch: int, migration: str, *, version: int, ek_sha256: str) -> Launched:
        """An swtpm without state that waits for the one which a migration brings; raises `vtpm.exists`."""
        before = self.records.find(self.vm)
        if before is not None and before.status == "here":
            raise make_error("vtpm.exists", f"{self.vm} has a TPM here, which would be lost")
        if before is not None and before.status == "incoming":  # of a migration that came to nothing
            self.destroy()
            before = self.records.find(self.vm)
        key = self._random(KEY_BYTES)
        record = self._blank(before, epoch, self._promised(before))
        record = replace(record, status="incoming", migration=migration, version=version, ek_sha256=ek_sha256)
        swtpm = Swtpm(record.path, key)
        record = record.authenticated(key)
        self.records.save(record, durably=False)  # it only says what there is to clear away
        return Launched(swtpm, record, key)

    def keep(self, launched: Launched) -> Record:
        """Wrap the key of a TPM that comes; the record that counts on it is on the disk on return. Touches nothing else."""
        root = self.root_of(None)
        reference = root.prepare(launched.record.key)
        bare = replace(launched.record, key=reference).authenticated(launched.key)
        self.records.save(bare, durably=False)  # a new counter is not lost
        record = replace(bare, key=root.wrap(launched.key, reference)).authenticated(launched.key)
        self.records.save(record)
        root.advance(record.key)
        return record

    def relaunch(self, launched: Launched, states: dict[BlobType, bytes]) -> Launched:
        """The same TPM in a new swtpm under the next key, with these states, not yet started."""
        key, record = self._next(launched.record, launched.record.epoch)
        swtpm = Swtpm(record.path, key)
        for blob_type, state in states.items():
            if state:
                swtpm.control.tpm_state_write(blob_type, state)
        return Launched(swtpm, record, key)

    def _launch(self, state: bytes, before: Record | None, *, epoch: int, ek: str) -> Launched:
        key, record = self._next(before, epoch)
        record = replace(record, ek_sha256=ek)
        swtpm = Swtpm(record.path, key)
        try:
            swtpm.control.tpm_state_write(BlobType.PERMANENT, state)
            swtpm.control.start()
            launched = Launched(swtpm, record, key)
            self.commit(launched, before)
        except BaseException:
            swtpm.stop()
            self._discard(record)
            raise
        return launched

    def _discard(self, record: Record) -> None:
        """Undo what `_next` made, unless the record on the disk counts on it already."""
        found = self.records.find(self.vm)
        if found is None or found.directory != record.directory:
            self._forget_files(record)
            self.root_of(record.key).discard(record.key)

    def commit(self, launched: Launched, before: Record | None) -> None:
        """From here on these files are the present ones, and those of `before` nothing."""
        launched.record = launched.record.written(self.digest_now(launched.record)).authenticated(launched.key)
        self.records.save(launched.record)
        self.root_of(launched.record.key).advance(launched.record.key)
        if before is not None:
            self.root_of(before.key).discard(before.key)
            self._forget_files(before)

    def _next(self, before: Record | None, epoch: int) -> tuple[bytes, Record]:
        """A key, wrapped for the counter's next value, and a record with an empty directory for it."""
        key, root = self._random(KEY_BYTES), self.root_of(None)
        return key, self._blank(before, epoch, root.wrap(key, root.prepare(self._promised(before))))

    def _promised(self, before: Record | None) -> KeyReference:
        """A reference to the VM's counter in what keeps this host's keys, and to no key."""
        kind = "file" if self._tcti is None else "tpm"
        if before is None or before.key.root != kind:
            return KeyReference(root=kind, counter=0)
        return replace(before.key, public="", private="")

    def _blank(self, before: Record | None, epoch: int, key: KeyReference) -> Record:
        name = f"{self.vm}.{epoch}.{self._random(4).hex()}"
        record = Record(
            vm=self.vm, status="here", epoch=epoch, key=key, storage=str(self._storage), directory=name, running=True
        )
        if before is not None:
            record = replace(record, version=before.version, ek_sha256=before.ek_sha256, past=before.remembered())
        record.path.mkdir(parents=True, mode=0o700)
        return record

    # ---- looking

    def verify(self) -> Record:
        """Look at record, counter, key and files. Raises `vtpm.missing`, `vtpm.gone`, `vtpm.old-record`, `vtpm.key-gone`,
        `vtpm.stale`, `vtpm.foreign`, `vtpm.ahead`, `vtpm.altered`."""
        return self._verified()[0]

    def _verified(self, *, after_crash: bool = False) -> tuple[Record, bytes, bytes]:
        record = self.records.find(self.vm)
        if record is None:
            raise make_error("vtpm.missing", f"{self.vm} has no TPM here")
        if record.status != "here":
            raise make_error("vtpm.gone", f"the TPM of {self.vm} is {record.status} here")
        root = self.root_of(record.key)
        counter = root.counter(record.key)
        if counter is not None and counter > record.key.counter:
            raise make_error("vtpm.old-record", f"the record is of launch {record.key.counter}, the TPM has {counter}")
        root.advance(record.key)  # an agent that died between writing the record and counting
        key = root.unwrap(record.key)
        record.verify(key)
        content = self.content(record)
        try:
            self.judge(record, content)
        except SealaneError as error:
            if error.code != "vtpm.altered" or not self._is_this_launchs(record, content, key):
                raise
            if not after_crash:
                raise make_error("vtpm.ahead", f"the files of {self.vm}'s TPM are not those that were noted") from None
        state, ek = self._look_into(content, key)
        if record.ek_sha256 and ek != record.ek_sha256:
            raise make_error("vtpm.altered", f"the endorsement key is not {self.vm}'s")
        return record, key, state

    def _is_this_launchs(self, record: Record, content: bytes, key: bytes) -> bool:
        """Whether a launch that did not end as it should has written this: no other has its key, which authenticates them."""
        if not record.running or content[:1] != _AUTHENTICATED:
            return False
        try:
            return self._look_into(content, key)[1] == record.ek_sha256
        except SealaneError:
            return False

    def content(self, record: Record) -> bytes:
        """What the files hold; raises `vtpm.altered` where they are not there."""
        try:
            return _read(record.path / STATE_FILE)
        except OSError as error:
            raise make_error("vtpm.altered", f"{record.path / STATE_FILE}: {error.strerror}") from error

    def judge(self, record: Record, content: bytes) -> None:
        """Raises what is wrong with a state file of these bytes: `vtpm.stale`, `vtpm.foreign`, `vtpm.altered`."""
        digest = digest_of(content)
        if digest == record.digest:
            return
        if digest in record.past:
            raise make_error("vtpm.stale", f"the files of {self.vm}'s TPM are an older copy")
        if owner := self.records.owner_of(digest, but=self.vm):
            raise make_error("vtpm.foreign", f"the files are those of {owner}'s TPM")
        raise make_error("vtpm.altered", f"the files of {self.vm}'s TPM are not those that were written")

    def digest_now(self, record: Record) -> str:
        """What the files have now, on the disk before it is said; raises `vtpm.swtpm`."""
        path = record.path / STATE_FILE
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
                content = os.read(descriptor, _STATE_FILE_MAX)
            finally:
                os.close(descriptor)
            sync_directory(record.path)
        except OSError as error:
            raise make_error("vtpm.swtpm", f"swtpm did not write {path}: {error.strerror}") from error
        return digest_of(content)

    def _look_into(self, content: bytes, key: bytes | None) -> tuple[bytes, str]:
        with self._private() as scratch:
            state, ek = read_state(content, key, scratch)
        return state, "" if ek is None else digest_of(ek)

    def take(self, epoch: int) -> None:
        """What came with a migration is this host's: for one whose keeper ended before it was told. Raises as `verify`."""
        record = self.records.find(self.vm)
        if record is None or record.status != "incoming":
            raise make_error("vtpm.missing", f"no TPM of {self.vm} has come")
        root = self.root_of(record.key)
        root.advance(record.key)
        key = root.unwrap(record.key)
        record.verify(key)
        self.records.save(replace(record, status="here", epoch=epoch).authenticated(key))

    # ---- the end

    def destroy(self) -> None:
        """The key, then the files; what stays is a record that says so."""
        record = self.records.find(self.vm)
        if record is None or record.status == "gone":
            return
        self.root_of(record.key).destroy(record.key)
        self._forget_files(record)
        bare = replace(record.key, public="", private="")
        self.records.save(replace(record, status="gone", key=bare, running=False, mac=""))

    def _forget_files(self, record: Record) -> None:
        if record.directory:
            shutil.rmtree(record.path, ignore_errors=True)

    @contextlib.contextmanager
    def _private(self) -> Iterator[Path]:
        self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            yield Path(name)


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_STATE_FILE_MAX)


def describe_error(error: BaseException) -> tuple[str, str]:
    """Code and words for who started us."""
    if isinstance(error, SealaneError):
        return error.code, error.detail
    return "internal.error", f"{type(error).__name__}: {error}"
