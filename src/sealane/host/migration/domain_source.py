"""A libvirt domain leaves this host: libvirt's own migration through the lanes, the hand-over as for every VM.

    preparing        the domain described, the peer met, its agent ready; lane 0 carries libvirt's connection to the peer
    copying          libvirt's client works in a thread: begin, prepare, perform; the domain runs
    switching-over   the destination's libvirtd has finished, its domain is paused; the client's last word is held at the gate
    handing-over     `released` is journalled; ticket out, receipt in; only then may libvirt end the source's copy

Every step but the copy is `SourceMigration`'s.
"""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any, Final, cast

from sealane.enclave.interface import SendMessage
from sealane.errors import ControlError, HostError, SealaneError, make_error
from sealane.host.migration import messages
from sealane.host.migration.clockwork import Clockwork
from sealane.host.migration.dialling import dial_vm
from sealane.host.migration.domain_disks import DiskListener, disk_figures, wish_of
from sealane.host.migration.domain_lines import SourceLines
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.migration.hook import ask_hook
from sealane.host.migration.source import PROGRESS_EVERY_S, SourceMigration
from sealane.host.migration.stall import StallLimit
from sealane.host.models import Progress, RunsAt
from sealane.host.registry import is_absent
from sealane.hypervisor.driver import MigrationStatus, VmDescription
from sealane.hypervisor.qmp import QmpMachine
from sealane.libvirt.client import ClientThread, MigrationWishes, start_client
from sealane.libvirt.domains import DomainFacts, parse_address
from sealane.libvirt.gate import Word
from sealane.libvirt.machine import STOPPED, DomainMachine, MigrationDirectory, daemon_socket
from sealane.limits import CHANNEL_ANSWER_TIMEOUT_S, LIBVIRT_TIMEOUT_S, MIB
from sealane.session.handover import Input

_CLIENT_END_S: Final = 10.0
_PAGE_BYTES: Final = 4096
_UNBOUNDED_MIB_PER_S: Final = (2**63 - 1) // MIB
_REASON_WAIT_S: Final = 2.5


class _LeavingDomain:
    """What the hand-over asks of the source's copy: to be gone."""

    def __init__(self, job: "DomainSource") -> None:
        self._job = job

    async def quit(self) -> None:
        """Let libvirt end it."""
        await self._job.end_copy()


class DomainSource(SourceMigration):
    """One domain leaves this host."""

    _machine: DomainMachine | None = None
    _lines: SourceLines | None = None
    _client: ClientThread | None = None
    _disk_listener: DiskListener | None = None
    _is_persistent = False
    _bandwidth_before: int | None = None

    async def run(self) -> None:
        """Carry the migration out; ends in completed, aborted or in-doubt whatever happens."""
        self._times = Clockwork()
        address = parse_address(self._vm.qmp)
        try:
            with MigrationDirectory(self.id, for_qemu=False) as directory:
                async with DomainMachine.connect(address, LIBVIRT_TIMEOUT_S) as self._machine:
                    try:
                        await self._move(self._machine, directory)
                    except BaseException as error:
                        await uninterrupted(self._give_up(error))
                    finally:
                        await uninterrupted(self._end_client())
                        if self._disk_listener is not None:
                            await uninterrupted(self._disk_listener.close())
        finally:
            self._context.rates.leave(self.id)
            if self._enclave is not None:
                await uninterrupted(self._enclave.reap())

    # ---- the way there

    async def _move(self, machine: DomainMachine, directory: Path) -> None:
        vm = await self._look_at_domain(machine)
        disks = [wish_of(each) for each in await machine.copied_disks(self._request.copy_storage)]
        enclave = await self._meet(cast(QmpMachine, machine))  # of which it wants the process
        prepared = await self._prepare_domain(enclave, vm, machine, disks)
        path = MigrationDirectory.vm_socket(self.id)
        channels = prepared.multifd_channels
        await self._open_lanes(enclave, path, 2 + channels + len(disks), attached=len(disks))
        if disks:
            lanes = range(2 + channels, 2 + channels + len(disks))
            self._disk_listener = DiskListener(enclave, MigrationDirectory.disks_socket(self.id), lanes)
        self._lines = SourceLines(directory, daemon_socket(machine.address.uri), await dial_vm(path))  # it is lane 0
        what = "the domain's disks and memory go over" if disks else "the domain's memory goes over"
        self._step(Input.PREPARED, detail=what, multifd_channels=channels)
        self._times.copy_started = time.monotonic()
        if self._request.client == "agent":
            self._start_client(machine, self._lines, channels, has_disks=bool(disks))
        else:
            self.update(detail="the lanes are open for another client of libvirt")
        await self._follow(machine, self._lines)
        self._step(Input.VM_STOPPED, detail="the domain is paused at both ends")
        if self._request.switchover_hook:
            await self._watch(ask_hook(self._request.switchover_hook))
        self._lines.end_lane()
        loaded = await self._wait_loaded(enclave, cast(QmpMachine, machine))
        self._lines.gate.is_released = True
        await self._hand_over(enclave, cast(QmpMachine, _LeavingDomain(self)), loaded)

    def _start_client(self, machine: DomainMachine, lines: SourceLines, channels: int, *, has_disks: bool) -> None:
        self._rate = self._share
        wishes = MigrationWishes(
            migrate_uri=f"unix://{MigrationDirectory.vm_socket(self.id)}",
            channels=channels,
            max_bandwidth_mib_per_s=-(-self._rate // MIB),
            auto_converge=self._request.on_stall == "auto-converge",
            persistent=self._is_persistent,
            undefine_source=self._is_persistent and self._request.undefine_source,
            copy_storage=self._request.copy_storage if has_disks else "none",
            disks_uri=f"unix://{MigrationDirectory.disks_socket(self.id)}" if has_disks else "",
        )
        self._client = start_client(machine.address, lines.local, lines.remote, wishes)

    async def _look_at_domain(self, machine: DomainMachine) -> VmDescription:
        self.update(detail="looking at the domain")
        if self._request.protection != "sealed":
            raise make_error("usage.argument", "domains of libvirt go sealed")
        if self._request.copy_storage != "none" and self._request.client != "agent":
            raise make_error("usage.argument", "disks are copied by `sealane migrate` only")
        if self._request.on_stall == "postcopy":
            raise make_error(
                "check.postcopy", "domains of libvirt do not go by postcopy", mend="choose another --on-stall"
            )
        state = await machine.run_state()
        if state != "running":
            raise ControlError("vm.not-running", f"libvirt says that the domain is {state}")
        facts = await machine.look()
        self._ran_before = True
        self._is_persistent = await machine.is_persistent()
        self.description = description_of(facts, await machine.qemu_version(), machine.pid)
        return self.description

    async def _prepare_domain(
        self, enclave: EnclaveProcess, vm: VmDescription, machine: DomainMachine, disks: list[messages.DiskWish]
    ) -> messages.Prepared:
        prepare = messages.Prepare(
            vm=self._vm.name,
            uuid=vm.uuid,
            qemu_version=vm.qemu_version,
            machine_type=vm.machine_type,
            memory_bytes=vm.memory_bytes,
            cpus=vm.cpus,
            capabilities=[],
            multifd_channels=self._request.multifd_channels,
            epoch=self.store.epoch(self._vm.name),
            vtpm=None,
            postcopy=False,
            domain=messages.DomainWish(
                uri=machine.address.uri,
                least_level=self._vm.least_level,
                labels=dict(self._vm.labels),
                disks=disks,
            ),
        )
        self.update(detail=f"{self._peer.name} prepares")
        enclave.call(SendMessage(prepare.model_dump_json()))
        return await self._watch(enclave.expect(messages.Prepared, CHANNEL_ANSWER_TIMEOUT_S + LIBVIRT_TIMEOUT_S))

    # ---- while libvirt copies

    async def _follow(self, machine: DomainMachine, lines: SourceLines) -> None:
        """Until libvirt's client says its last word, telling the progress; raises where that is not `done`."""
        stall = StallLimit(self._context.settings.limits.stall_timeout_s)
        waiting = asyncio.ensure_future(lines.last_word.wait())
        try:
            while not waiting.done() and self._client_lives(lines):
                await self._watch(asyncio.wait({waiting}, timeout=PROGRESS_EVERY_S))
                if not waiting.done():
                    stall.look(self._wire_bytes())
                    await self._watch(self._keep_domain_to_share(machine))
                    await self._watch(self._tell_job(machine))
        finally:
            waiting.cancel()
            await uninterrupted(self._restore_bandwidth(machine))
        if lines.gate.word is not Word.DONE:
            raise await self._clients_failure()

    async def _keep_domain_to_share(self, machine: DomainMachine) -> None:
        if (share := self._share) == self._rate:
            return
        if self._bandwidth_before is None:
            self._bandwidth_before = await machine.bandwidth()
        await machine.set_bandwidth(-(-share // MIB) or _UNBOUNDED_MIB_PER_S)
        self._rate = share

    async def _restore_bandwidth(self, machine: DomainMachine) -> None:
        """libvirt keeps the bound for the domain's next migration."""
        if self._bandwidth_before is not None:
            with contextlib.suppress(SealaneError):  # a domain that has left
                await machine.set_bandwidth(self._bandwidth_before)

    def _client_lives(self, lines: SourceLines) -> bool:
        return not lines.is_over if self._client is None else self._client.is_alive()

    async def _tell_job(self, machine: DomainMachine) -> None:
        stats = await machine.job_stats()
        self._disk_figures = disk_figures(stats) or self._disk_figures
        if not stats.get("memory_total"):
            if self._disk_figures:  # libvirt copies the disks first
                self.update(progress=Progress(bytes_wire=self._wire_bytes(), **self._disk_figures))
            return
        status = status_of(stats)
        self._convergence.judge(status, lambda outlook: self._tell_outlook(status, outlook))

    async def _clients_failure(self) -> SealaneError:
        await self._join_client(_CLIENT_END_S)
        failure = self._client.failure if self._client is not None else None
        return failure or HostError("libvirt.failed", "libvirt's client gave the migration up")

    # ---- the end of the source's copy, or of the migration

    async def end_copy(self) -> None:
        """The VM runs elsewhere: libvirt ends its copy here; where its client cannot, we do."""
        assert self._lines is not None  # noqa: S101 - set before
        assert self._machine is not None  # noqa: S101
        await self._lines.let_go()
        await self._join_client(_CLIENT_END_S)
        if self._client is None:
            await self._lines.over(_CLIENT_END_S)
        if self._client is None or self._client.is_alive() or self._client.failure is not None:
            await self._end_client()
            await self._machine.destroy(undefine=self._is_persistent and self._request.undefine_source)

    async def _end_client(self) -> None:
        """Close what libvirt's client speaks through, and wait until it has ended."""
        if self._lines is not None:
            await self._lines.close()
            self._lines = None
        await self._join_client(_CLIENT_END_S)

    async def _join_client(self, timeout_s: float) -> None:
        if self._client is not None:
            await asyncio.to_thread(self._client.join, timeout_s)

    async def _take_back(self) -> RunsAt | None:
        """Let the domain run here again: by libvirt's own abort while it copies, by ours once its client was held."""
        machine, lines = self._machine, self._lines
        if machine is None or not self._ran_before:
            return "source" if machine is not None else "nowhere"
        if lines is not None and lines.gate.word is None and not lines.gate.is_released:
            with contextlib.suppress(SealaneError):
                await machine.cancel_migration()
            await self._join_client(_CLIENT_END_S)
        await self._end_client()
        try:
            await machine.cancel_migration()
            if await machine.run_state() in STOPPED:
                await machine.resume()
            return "source" if await machine.run_state() == "running" else "nowhere"
        except SealaneError as error:
            if is_absent(error):
                return "nowhere"
            self.log.warning("the VM could not be taken back yet", code=error.code, detail=error.detail)
            return None

    async def _better_reason(self, reason: SealaneError) -> SealaneError:
        """libvirt only sees its connections closed; the enclave, or the peer through it, knows why."""
        if self._enclave is None or not reason.code.startswith("libvirt."):
            return reason
        await asyncio.wait({self._enclave.failed}, timeout=_REASON_WAIT_S)
        return self._enclave.failed.result() if self._enclave.failed.done() else reason


def description_of(facts: DomainFacts, qemu_version: tuple[int, int, int], pid: int) -> VmDescription:
    """A domain in the words for every VM."""
    return VmDescription(
        name=facts.name,
        uuid=str(facts.address.uuid),
        qemu_version=qemu_version,
        machine_type=facts.machine_type,
        memory_bytes=facts.memory_bytes,
        cpus=facts.cpus,
        run_state="running",
        accelerator="tcg" if facts.is_tcg else "kvm",
        capabilities=frozenset(),
        pid=pid,
        migration_status="none",
    )


def status_of(stats: dict[str, Any]) -> MigrationStatus:
    """libvirt's job statistics (virDomainGetJobStats) as a migration's status."""
    dirty = stats.get("memory_dirty_rate")
    return MigrationStatus(
        status="active",
        ram_total=stats.get("memory_total", 0),
        ram_remaining=stats.get("memory_remaining", 0),
        ram_transferred=stats.get("memory_processed", 0),
        iteration=stats.get("memory_iteration", 0),
        dirty_rate_bytes_per_s=None if dirty is None else float(dirty) * stats.get("memory_page_size", _PAGE_BYTES),
        rate_bytes_per_s=stats.get("memory_bps"),
        throttle_percent=stats.get("auto_converge_throttle"),
    )
