"""The agent's part in VMs' TPMs: it starts keepers, tells them what became of a migration, and sees to the end.

It sees no key and no state. A keeper outlives the agent; what an agent that died has left undone, `settle` does from the
journal: a TPM whose VM was given up is destroyed, one that came with a VM that is here is kept.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import structlog

from sealane.errors import SealaneError, make_error
from sealane.host.config import Settings
from sealane.host.migration.enclave_process import uninterrupted
from sealane.host.models import Migration, VmDefinition, VtpmFacts, VtpmView
from sealane.host.store import Store
from sealane.paths import Paths
from sealane.vtpm import swtpm
from sealane.vtpm.keeper import call_keeper, listen_at
from sealane.vtpm.launcher import KeeperLauncher
from sealane.vtpm.order import Order
from sealane.vtpm.record import Record, Records
from sealane.vtpm.vault import Vault

_END_WAIT_S: Final = 10.0
_LOOK_EVERY_S: Final = 0.02
Pause = Callable[[VmDefinition], AbstractAsyncContextManager[None]]
_log = structlog.get_logger()


class Vtpms:
    """The TPMs of this host's VMs. Every operation raises what `sealane.vtpm.vault` and its keeper do."""

    def __init__(self, paths: Paths, settings: Settings, store: Store, find_vm: Callable[[str], VmDefinition]) -> None:
        self._paths, self._store, self._find_vm = paths, store, find_vm
        self._records = Records(paths.state / "vtpm")
        attestation = settings.attestation
        self._tcti = attestation.tcti if "tpm2" in attestation.drivers else None
        self._launcher = KeeperLauncher()

    def prepare(self, vms: Iterable[VmDefinition]) -> None:
        """Have keepers at hand where a VM has a TPM: a migration would wait for them. Raises nothing."""
        if any(vm.vtpm is not None for vm in vms):
            with contextlib.suppress(SealaneError):  # the first that is wanted says it
                self._launcher.start()

    async def close(self) -> None:
        """What goes with the agent; keepers stay."""
        await asyncio.to_thread(self._launcher.stop)

    def control_path(self, vm: str) -> Path:
        """Where QEMU finds the TPM's control channel (`-chardev socket,path=`)."""
        return self._paths.run / "vtpm" / f"{vm}.sock"

    def _admin_path(self, vm: str) -> Path:
        return self._paths.run / "vtpm" / f"{vm}.admin"

    def _order(self, vm: VmDefinition, how: str, epoch: int) -> Order:
        if vm.vtpm is None:
            raise make_error("vtpm.none", f"this host keeps no TPM for {vm.name}")
        return Order(
            vm=vm.name,
            how=how,
            epoch=epoch,
            storage=vm.vtpm,
            records=str(self._records.directory),
            scratch=str(self._paths.run / "vtpm" / "scratch"),
            control_path=str(self.control_path(vm.name)),
            admin_path=str(self._admin_path(vm.name)),
            tcti=self._tcti,
        )

    def _vault(self, vm: VmDefinition) -> Vault:
        return self._order(vm, "", 0).vault()

    # ---- what the operator asks for

    async def start(self, name: str, *, adopt: bool = False, anew: bool = False, after_crash: bool = False) -> VtpmView:
        """Start the VM's TPM, made anew where there was none; QEMU may be started afterwards. `adopt` takes over state that
        lies in its directory in clear, `anew` makes a new one although one of this VM was here and left, `after_crash` takes
        files that its last launch wrote and could not note."""
        vm = self._find_vm(name)
        await self.settle(name)
        record = self._records.find(name)
        how = "adopt" if adopt else "create"
        if record is not None and record.status != "gone":
            how = "reopen" if after_crash else "open"
        elif record is not None and not anew:
            raise make_error("vtpm.gone", f"the TPM of {name} has left this host")
        if how == "reopen":
            _log.warning("files that were not noted are taken", vm=name)
        await self._start_keeper(self._order(vm, how, self._store.epoch(name)))
        return await self.status(name)

    async def stop(self, name: str) -> VtpmView:
        """End the VM's TPM: its VM loses it; meant for a VM that is off."""
        self._order(self._find_vm(name), "", 0)
        await self._end_keeper(name)
        return await self.status(name)

    async def status(self, name: str) -> VtpmView:
        """What is known of the VM's TPM."""
        vm = self._find_vm(name)
        order = self._order(vm, "", 0)
        running: dict[str, Any] = {}
        with contextlib.suppress(SealaneError):
            running = await self._call(name, "status")
        record = self._records.find(name)
        version = await asyncio.to_thread(swtpm.version)
        return VtpmView(
            vm=name,
            storage=order.storage,
            control=order.control_path,
            swtpm=".".join(map(str, version)),
            status=cast(Any, "none" if record is None else record.status),
            running=bool(running),
            in_use=bool(running.get("in_use")),
            migrating=bool(running.get("linked")),
            key="" if record is None else order.vault().root_of(record.key).words,
            facts=None if record is None else facts_of(record),
            epoch=0 if record is None else record.epoch,
        )

    async def verify(self, name: str) -> VtpmView:
        """Look whether files, record and counter are what was written last."""
        vm = self._find_vm(name)
        await self.settle(name)
        try:
            await self._call(name, "verify")
        except SealaneError as error:
            if error.code != "vtpm.not-running":
                raise
            await asyncio.to_thread(self._alone, vm, lambda vault: vault.verify())
        return await self.status(name)

    async def rotate(self, name: str, pause: "Pause") -> VtpmView:
        """Put the TPM's files under a new key; while QEMU uses it, `pause` holds the VM for that moment."""
        vm = self._find_vm(name)
        await self.settle(name)
        running: dict[str, Any] = {}
        with contextlib.suppress(SealaneError):
            running = await self._call(name, "status")
        if not running:
            await self._start_keeper(self._order(vm, "open", self._store.epoch(name)))
            await self._end_keeper(name)
        elif not running["in_use"]:
            await self._call(name, "rotate")
        else:
            async with pause(vm):
                await self._call(name, "rotate")
        return await self.status(name)

    # ---- what migrations ask for

    def facts(self, vm: VmDefinition) -> VtpmFacts | None:
        """What a source says of the VM's TPM; None where it has none. Raises `vtpm.not-running`, `vtpm.gone`."""
        if vm.vtpm is None:
            return None
        record = self._records.find(vm.name)
        if record is None or not self._admin_path(vm.name).exists():
            raise make_error("vtpm.not-running", f"the TPM of {vm.name} is not running")
        if record.status != "here":
            raise make_error("vtpm.gone", f"the TPM of {vm.name} is {record.status} here")
        return facts_of(record)

    async def expect(self, vm: VmDefinition, facts: VtpmFacts | None) -> socket.socket | None:
        """Where QEMU will find the TPM that comes, before its keeper is there; None where none comes.

        Raises `check.vtpm`, and `vtpm.exists` where one is here that would be lost.
        """
        if (facts is None) != (vm.vtpm is None):
            raise make_error(
                "check.vtpm", f"{vm.name} has a TPM at the {'destination' if facts is None else 'source'} only"
            )
        if facts is None:
            return None
        await self.settle(vm.name)
        record = self._records.find(vm.name)
        if record is not None and record.status == "here":
            raise make_error("vtpm.exists", f"{vm.name} has a TPM here, which would be lost")
        try:
            return listen_at(self.control_path(vm.name), socket.SOCK_STREAM)
        except OSError as error:
            raise make_error("vtpm.keeper", f"{self.control_path(vm.name)}: {error.strerror}") from error

    async def receive(
        self, vm: VmDefinition, migration: str, epoch: int, facts: VtpmFacts, listener: socket.socket
    ) -> None:
        """Start a keeper and an swtpm for the TPM that comes with this migration; the listener is theirs afterwards."""
        with listener:
            order = replace(
                self._order(vm, "receive", epoch),
                migration=migration,
                version=facts.version,
                ek_sha256=facts.ek_sha256,
            )
            await uninterrupted(self._start_keeper(order, listener))  # what has begun is known, and can be ended

    async def link(self, vm: VmDefinition) -> socket.socket | None:
        """The enclave's end of a link to the VM's keeper; None where the VM has no TPM. Raises `vtpm.two-migrations`."""
        if vm.vtpm is None:
            return None
        ours, theirs = socket.socketpair()
        try:
            await self._call(vm.name, "link", descriptors=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    async def loaded(self, vm: VmDefinition) -> None:
        """QEMU has loaded the VM: returns when its TPM is whole and on the disk here. Raises `vtpm.not-brought`,
        `vtpm.not-running`, and what keeping its key did."""
        await self._call(vm.name, "loaded")

    async def taken(self, vm: VmDefinition, epoch: int, last: VtpmFacts | None) -> VtpmFacts | None:
        """The VM is this host's, and so is its TPM, whose state was `last` at the source; what a receipt says of it."""
        await self._call(vm.name, "taken", epoch=epoch, version=0 if last is None else last.version)
        record = self._records.find(vm.name)
        return None if record is None else facts_of(record)

    async def stays(self, vm: VmDefinition) -> None:
        """The VM did not leave."""
        await self._call(vm.name, "stay", epoch=self._store.epoch(vm.name))

    async def drop(self, vm: VmDefinition) -> None:
        """Destroy the TPM here: its VM has left, or never came."""
        await self._end_keeper(vm.name)
        await asyncio.to_thread(self._alone, vm, lambda vault: vault.destroy())

    async def abandon(self, vm: VmDefinition, migration: str) -> None:
        """Destroy what was started for this migration, and nothing else."""
        record = self._records.find(vm.name)
        if record is not None and (record.status, record.migration) == ("incoming", migration):
            await self.drop(vm)

    async def settle(self, name: str) -> None:
        """Do what the journal says, where an agent ended before it was done."""
        record = self._records.find(name)
        if record is None or record.status == "gone":
            return
        known = self._store.migrations(vm=name)
        arrived = next((each for each in known if each.id == record.migration and each.ended_at is not None), None)
        try:
            vm = self._find_vm(name)
        except SealaneError:
            return  # a VM that was forgotten since
        if any(_has_left(record, each) for each in known):
            await self.drop(vm)
            _log.info("the TPM of a VM that left was destroyed", vm=name)
        elif record.status == "incoming" and arrived is not None:
            if arrived.state == "completed":
                await self._take_late(vm, arrived.epoch or record.epoch + 1)
            elif arrived.state == "aborted":
                await self.drop(vm)
        elif (epoch := _epoch_of_return(record, known)) is not None:
            await self._stay_late(vm, epoch)

    async def _stay_late(self, vm: VmDefinition, epoch: int) -> None:
        try:
            await self._call(vm.name, "stay", epoch=epoch)
        except SealaneError as error:
            if error.code != "vtpm.not-running":  # else its next launch is under the VM's epoch
                raise

    async def _take_late(self, vm: VmDefinition, epoch: int) -> None:
        try:
            await self._call(vm.name, "taken", epoch=epoch, version=0)
        except SealaneError as error:
            if error.code != "vtpm.not-running":
                raise
            await asyncio.to_thread(self._alone, vm, lambda vault: vault.take(epoch))

    async def settle_all(self) -> None:
        """As `settle`, for every VM with a TPM here; raises nothing."""
        for name in self._records.names():
            try:
                await self.settle(name)
            except SealaneError as error:
                _log.warning("a TPM could not be settled", vm=name, code=error.code, detail=error.detail)

    # ---- keepers

    def _alone(self, vm: VmDefinition, work: Callable[[Vault], Any]) -> None:
        with self._records.locked(vm.name):
            work(self._vault(vm))

    async def _call(self, name: str, call: str, *, descriptors: list[int] | None = None, **said: Any) -> dict[str, Any]:
        path = self._admin_path(name)
        return await asyncio.to_thread(lambda: call_keeper(path, call, descriptors=descriptors, **said))

    async def _start_keeper(self, order: Order, listener: socket.socket | None = None) -> None:
        await asyncio.to_thread(self._run_keeper, order, listener)

    def _run_keeper(self, order: Order, listener: socket.socket | None) -> None:
        log = self._paths.state / "log" / f"{order.vm}-vtpm.log"
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
                self._launcher.launch(order, output, listener)
        except OSError as error:
            raise make_error("vtpm.keeper", f"{log}: {error.strerror}") from error

    async def _end_keeper(self, name: str) -> None:
        with contextlib.suppress(SealaneError):
            await self._call(name, "stop")
        await asyncio.to_thread(self._wait_free, name)

    def _wait_free(self, name: str) -> None:
        deadline = time.monotonic() + _END_WAIT_S
        while True:
            try:
                with self._records.locked(name):
                    return
            except SealaneError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_LOOK_EVERY_S)


def _has_left(record: Record, migration: Migration) -> bool:
    """Whether the journal says that the VM went away after this TPM had come."""
    return (
        record.status == "here"
        and migration.role == "source"
        and migration.state == "completed"
        and migration.ended_at is not None
        and migration.epoch is not None
        and record.epoch < migration.epoch
    )


def _epoch_of_return(record: Record, known: Sequence[Migration]) -> int | None:
    """The VM's epoch, where it was given up and is this host's again: a ticket was refused, or a person ended a doubt.

    `known`: the newest first. Not before that migration has ended: a TPM under its epoch would not be taken for one that left.
    """
    newest = known[0] if known else None
    if newest is None or newest.ended_at is None or newest.epoch is None or record.epoch >= newest.epoch:
        return None
    return newest.epoch if (record.status, newest.role, newest.state) == ("here", "source", "aborted") else None


def facts_of(record: Record) -> VtpmFacts:
    """What the other end and the receipt are told."""
    return VtpmFacts(ek_sha256=record.ek_sha256, version=record.version, counter=record.key.counter)
