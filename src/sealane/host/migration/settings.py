"""A QEMU that Sealane sets for a migration, and sets back: whoever migrates it by hand later finds it as it was."""

import structlog

from sealane.errors import SealaneError
from sealane.host.job import Job
from sealane.hypervisor.driver import MigrationParameters, MigrationSettings
from sealane.hypervisor.qmp import QmpMachine

_log = structlog.get_logger()


async def configure(job: Job, qemu: QmpMachine, parameters: MigrationParameters, *, incoming: bool) -> None:
    """Set the QEMU for this job's migration, once the journal has what it was set to."""
    job.journal(qemu_before=await qemu.migration_settings())
    await qemu.configure_migration(parameters, incoming=incoming)


async def restore(qemu: QmpMachine, before: MigrationSettings | None) -> None:
    """Put back what the QEMU was set to; None where nothing was changed. Never raises: the VM matters more than this does."""
    if before is None:
        return
    try:
        await qemu.restore_migration(before)
    except SealaneError as error:
        _log.warning("QEMU keeps the settings of a migration", code=error.code, detail=error.detail)


async def restore_after(job: Job, qemu: QmpMachine) -> None:
    """`restore`, with what the journal has of this job or of the one that an earlier agent ran."""
    try:
        known = job.store.find(job.id)
    except SealaneError as error:
        job.log.warning("QEMU keeps the settings of a migration", code=error.code, detail=error.detail)
        return
    await restore(qemu, known[0].qemu_before if known else None)
