"""What a migration does with the VM's TPM. What happens once its end is decided does not change that end: what fails then is
logged, and done later from the journal (`Vtpms.settle`). A VM without a TPM is passed over."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from sealane.errors import SealaneError
from sealane.host.job import Job
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.enclave_process import uninterrupted
from sealane.host.migration.messages import Prepare, Ticket
from sealane.host.models import VmDefinition
from sealane.hypervisor.process import LaunchedMachine


async def launch_with_tpm(
    job: Job,
    context: MigrationContext,
    vm: VmDefinition,
    prepare: Prepare,
    launch: Callable[[], Coroutine[Any, Any, LaunchedMachine]],
) -> None:
    """Destination: launch the VM's QEMU, and meanwhile its TPM, which QEMU waits for. Raises what either does.

    Where one fails the other is undone, or left to `vtpm_abandoned`, before this returns.
    """
    if vm.vtpm is None and prepare.vtpm is None:
        await launch()
        return
    listener = await context.vtpms.expect(vm, prepare.vtpm)
    if listener is None or prepare.vtpm is None:  # it raises where only one of them is
        return
    tpm = asyncio.ensure_future(context.vtpms.receive(vm, job.id, prepare.epoch, prepare.vtpm, listener))
    qemu = asyncio.ensure_future(launch())
    try:
        await asyncio.wait({tpm, qemu}, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        qemu.cancel()  # nothing, where it is done
        await uninterrupted(_ended(tpm, qemu))
    tpm.result()
    qemu.result()


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    await asyncio.wait(tasks)


async def ticket_for_whole_tpm(
    context: MigrationContext, vm: VmDefinition, ticket: Coroutine[Any, Any, Ticket]
) -> Ticket:
    """Destination, when QEMU has loaded everything: the ticket, and meanwhile the TPM's state reaches the disk.

    Raises what either does: for a TPM that is not whole the ticket is refused, since the source gives its own up for it.
    """
    if vm.vtpm is None:
        return await ticket
    waiting, whole = asyncio.ensure_future(ticket), asyncio.ensure_future(context.vtpms.loaded(vm))
    try:
        await asyncio.wait({waiting, whole}, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        waiting.cancel()  # nothing, where it is done
        await uninterrupted(_ended(waiting, whole))
    whole.result()
    return waiting.result()


async def vtpm_left(job: Job, context: MigrationContext, vm: VmDefinition) -> None:
    """Source, after the receipt and the end of its QEMU: destroy the key, then the files."""
    if vm.vtpm is None:
        return
    try:
        await context.vtpms.drop(vm)
    except SealaneError as error:
        job.log.error("the TPM that left is still here", code=error.code, detail=error.detail)


async def vtpm_stays(job: Job, context: MigrationContext, vm: VmDefinition) -> None:
    """Source, when nothing came of it: the TPM goes on as it was."""
    if vm.vtpm is None:
        return
    try:
        await context.vtpms.stays(vm)
    except SealaneError as error:
        job.log.warning("the TPM does not answer", code=error.code, detail=error.detail)


async def vtpm_taken(job: Job, context: MigrationContext, vm: VmDefinition, ticket: Ticket) -> None:
    """Destination, when the VM runs: the TPM is this host's."""
    if vm.vtpm is None:
        return
    try:
        job.update(vtpm=await context.vtpms.taken(vm, ticket.epoch, ticket.vtpm))
    except SealaneError as error:
        job.log.error("the TPM that came was not noted as this host's", code=error.code, detail=error.detail)


async def vtpm_abandoned(job: Job, context: MigrationContext, vm: VmDefinition) -> None:
    """Destination, when its copy is destroyed: so is the TPM that was to come."""
    if vm.vtpm is None:
        return
    try:
        await context.vtpms.abandon(vm, job.id)
    except SealaneError as error:
        job.log.error("a TPM that did not come is still here", code=error.code, detail=error.detail)
