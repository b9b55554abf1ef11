"""One domain under control, and the domains of one libvirtd. libvirt's calls block, so each runs in a thread of its own."""

import asyncio
import contextlib
import os
import pwd
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from sealane.errors import HostError, SealaneError, make_error
from sealane.libvirt import binding
from sealane.libvirt.disks import CopiedDisk, CopyStorage, read_copied_disks
from sealane.libvirt.domains import DomainAddress, DomainFacts, DomainUri, parse_address, read_domain
from sealane.limits import LIBVIRT_POLL_S, LIBVIRT_TIMEOUT_S

T = TypeVar("T")
_RUN: Final = Path("/run/libvirt")
_QEMU_USER: Final = "libvirt-qemu"
_SOCKETS: Final = ("virtqemud-sock", "libvirt-sock")
# Run states of a domain that waits, and can be resumed.
STOPPED: Final = frozenset({"paused", "postmigrate"})


def _session_directory() -> Path:
    """Where the libvirtd of this user's session keeps its sockets."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(runtime) if runtime else Path.home() / ".cache") / "libvirt"


def daemon_socket(uri: str) -> Path:
    """The socket of the libvirtd (or virtqemud) that serves a URI; raises `libvirt.unreachable`."""
    directory = _RUN if uri.endswith("/system") else _session_directory()
    for name in _SOCKETS:
        if (directory / name).exists():
            return directory / name
    raise HostError("libvirt.unreachable", f"no libvirtd listens in {directory}")


async def in_thread(work: Callable[[], T], timeout_s: float) -> T:
    """What `work` gives; raises what libvirt's errors are here, and `libvirt.unreachable` where it takes too long."""
    libvirt = binding.load()
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.to_thread(work)
    except TimeoutError:
        raise HostError("libvirt.unreachable", f"no answer within {timeout_s:.0f} s") from None
    except libvirt.libvirtError as error:
        failure = binding.failure(error)
        raise failure from failure.__cause__ or error


@dataclass(frozen=True)
class FoundDomain:
    """A domain that libvirt lists."""

    facts: DomainFacts
    state: Literal["running", "paused", "absent"]


async def list_domains(uri: DomainUri, timeout_s: float) -> list[FoundDomain]:
    """All domains of a URI; raises `libvirt.missing`, `libvirt.unreachable`."""
    libvirt = binding.load()

    def state_of(domain: Any) -> Literal["running", "paused", "absent"]:
        if not domain.isActive():
            return "absent"
        return "paused" if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED else "running"

    def work() -> list[FoundDomain]:
        found = []
        connection = libvirt.openReadOnly(uri)
        try:
            for domain in connection.listAllDomains():
                with contextlib.suppress(libvirt.libvirtError, ValueError):  # gone meanwhile, or strange
                    found.append(FoundDomain(read_domain(domain.XMLDesc(), uri), state_of(domain)))
        finally:
            connection.close()
        return found

    return await in_thread(work, timeout_s)


@dataclass(frozen=True)
class SizedDisk:
    """A disk that is copied, its size as the guest sees it, and what it takes up on this host."""

    disk: CopiedDisk
    capacity_bytes: int
    allocation_bytes: int


class DomainMachine:
    """A domain, with the words that the agent has for a VM: `connect` it, and close it."""

    def __init__(self, connection: Any, address: DomainAddress, timeout_s: float) -> None:
        self._connection, self.address, self._timeout_s = connection, address, timeout_s
        self._pid: int | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, address: DomainAddress, timeout_s: float) -> AsyncIterator["DomainMachine"]:
        """A connection to the domain's libvirtd; raises `libvirt.missing`, `libvirt.unreachable`."""
        libvirt = binding.load()
        machine = cls(await in_thread(lambda: libvirt.open(address.uri), timeout_s), address, timeout_s)
        try:
            yield machine
        finally:
            with contextlib.suppress(SealaneError):
                await in_thread(machine._connection.close, timeout_s)

    async def _do(self, work: Callable[[Any], T]) -> T:
        return await in_thread(lambda: work(self._domain()), self._timeout_s)

    def _domain(self) -> Any:
        return self._connection.lookupByUUIDString(str(self.address.uuid))

    @property
    def pid(self) -> int:
        """QEMU's process id once `look` has found it, or 0."""
        return self._pid or 0

    def _pids(self) -> Path:
        return _RUN / "qemu" if self.address.uri.endswith("/system") else _session_directory() / "qemu/run"

    async def look(self) -> DomainFacts:
        """What the domain is; notes its process."""
        xml = await self._do(lambda domain: str(domain.XMLDesc()))
        facts = read_domain(xml, self.address.uri)
        with contextlib.suppress(OSError, ValueError):
            self._pid = int((self._pids() / f"{facts.name}.pid").read_text())
        return facts

    async def copied_disks(self, copy: CopyStorage) -> list[SizedDisk]:
        """The disks that libvirt would copy; raises `check.disks` for one that Sealane does not let it copy."""

        def work(domain: Any) -> list[SizedDisk]:
            found = []
            for disk in read_copied_disks(str(domain.XMLDesc()), copy):
                capacity, allocation, _ = domain.blockInfo(disk.target)
                found.append(SizedDisk(disk, int(capacity), int(allocation)))
            return found

        return [] if copy == "none" else await self._do(work)

    async def qemu_version(self) -> tuple[int, int, int]:
        """The version of the libvirtd's default QEMU."""
        number = int(await in_thread(self._connection.getVersion, self._timeout_s))
        return number // 1_000_000, number // 1000 % 1000, number % 1000

    async def run_state(self) -> str:
        """QEMU's RunState in its own words; raises `vm.unreachable` where the domain is not there or shut off."""
        libvirt = binding.load()
        state, reason = await self._do(lambda domain: tuple(domain.state()))
        if state in {libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_NOSTATE}:
            absent = make_error("vm.unreachable", "the domain is shut off")
            absent.__cause__ = FileNotFoundError()
            raise absent
        if state == libvirt.VIR_DOMAIN_PAUSED:
            return "postmigrate" if reason == libvirt.VIR_DOMAIN_PAUSED_MIGRATION else "paused"
        if state == libvirt.VIR_DOMAIN_SHUTDOWN:  # its guest, or libvirtd, is ending QEMU
            return "shutdown"
        return "suspended" if state == libvirt.VIR_DOMAIN_PMSUSPENDED else "running"

    async def was_started_anew(self) -> bool:
        """Whether the domain runs, and has run since its start: one that was sent away was paused."""
        libvirt = binding.load()
        return await self._do(
            lambda domain: tuple(domain.state()) == (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED)
        )

    async def is_persistent(self) -> bool:
        """Whether the domain stays defined when it is shut off; False where there is none."""
        try:
            return bool(await self._do(lambda domain: domain.isPersistent()))
        except SealaneError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise

    async def resume(self) -> None:
        """Let the guest run."""
        await self._do(lambda domain: domain.resume())

    async def cancel_migration(self) -> None:
        """End the domain's job, if there is one, and wait until libvirt says that there is none."""
        libvirt = binding.load()

        def job(domain: Any) -> bool:
            return bool(domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)

        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        while await self._do(job):
            with contextlib.suppress(SealaneError):
                await self._do(lambda domain: domain.abortJob())
            if loop.time() > deadline:
                raise HostError("libvirt.failed", "the domain's job does not end")
            await asyncio.sleep(LIBVIRT_POLL_S)

    async def bandwidth(self) -> int:
        """The bound of the domain's migrations, in MiB a second, as libvirt keeps it."""
        return int(await self._do(lambda domain: domain.migrateGetMaxSpeed()))

    async def set_bandwidth(self, mib_per_s: int) -> None:
        """Bound the domain's migrations, also one that is under way, in MiB a second."""
        await self._do(lambda domain: domain.migrateSetMaxSpeed(mib_per_s))

    async def job_stats(self) -> dict[str, Any]:
        """libvirt's figures of the domain's job; empty where there is none, or the domain has left."""
        try:
            return dict(await self._do(lambda domain: domain.jobStats()))
        except SealaneError:
            return {}

    async def quit(self) -> None:
        """End the domain's QEMU."""
        await self.destroy()

    async def destroy(self, *, undefine: bool = False) -> None:
        """End the domain's QEMU, and forget the domain where that is wanted; nothing happens where there is none."""
        libvirt = binding.load()

        def work(domain: Any) -> None:
            if domain.isActive():
                try:
                    domain.destroy()
                except libvirt.libvirtError:
                    if domain.isActive():  # else libvirtd ended it in between
                        raise
            if undefine and domain.isPersistent():
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)

        try:
            await self._do(work)
        except SealaneError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise


def open_domain(address: str) -> contextlib.AbstractAsyncContextManager[DomainMachine]:
    """The domain of that address, to be entered; raises as `DomainMachine.connect` does."""
    return DomainMachine.connect(parse_address(address), LIBVIRT_TIMEOUT_S)


async def destroy_incoming_domain(address: str, state: str) -> None:
    """End what an agent that is gone was receiving, when its migration was in `state`: a paused domain that never ran.

    While it was preparing the domain was not here. libvirtd itself destroys what has not come to its Finish.
    """
    if state == "preparing":
        return
    async with open_domain(address) as machine:
        try:
            if await machine.run_state() != "running":
                await machine.destroy()
        except SealaneError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise


def qemu_owner() -> tuple[int, int] | None:
    """Debian's user for QEMU and its group, where it is here and we may give files away."""
    if os.geteuid():
        return None
    try:
        entry = pwd.getpwnam(_QEMU_USER)
    except KeyError:
        return None
    return entry.pw_uid, entry.pw_gid


class MigrationDirectory:
    """Where a migration's sockets lie, at the same path on both hosts; gone afterwards.

    libvirt takes one path for both ends. At the destination the directory is QEMU's user's, at the source root's.
    """

    ROOT: Final = Path("/run/sealane-migrate")

    def __init__(self, migration: str, *, for_qemu: bool) -> None:
        """`for_qemu`: QEMU makes a socket there; else it may only dial those that are there."""
        self._path, self._for_qemu = self.ROOT / migration[:16], for_qemu

    def __enter__(self) -> Path:
        try:
            self.ROOT.mkdir(mode=0o711, exist_ok=True)
            self._path.mkdir(mode=0o700 if self._for_qemu else 0o711)
            if self._for_qemu and (owner := qemu_owner()) is not None:
                os.chown(self._path, *owner)
        except OSError as error:
            mend = f"as root, once: install -d -m 1777 {self.ROOT}" if os.geteuid() else None
            raise HostError("host.permission", f"{self._path}: {error.strerror}", mend=mend) from error
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)

    @classmethod
    def remove(cls, migration: str) -> None:
        """Remove what an agent that was killed has left of a migration."""
        shutil.rmtree(cls.ROOT / migration[:16], ignore_errors=True)

    @classmethod
    def vm_socket(cls, migration: str) -> Path:
        """Where the source's libvirtd or QEMU dials, and the destination's QEMU listens."""
        return cls.ROOT / migration[:16] / "vm.sock"

    @classmethod
    def disks_socket(cls, migration: str) -> Path:
        """Where the source's QEMU dials to copy disks, and the destination's takes them (NBD)."""
        return cls.ROOT / migration[:16] / "disks.sock"
