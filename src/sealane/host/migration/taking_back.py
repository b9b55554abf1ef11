"""A VM that was to leave runs on here: QEMU's migration is ended, the VM resumed, QEMU's settings put back."""

from typing import Final

from sealane.errors import SealaneError
from sealane.host.job import Job
from sealane.host.migration import settings
from sealane.host.migration.refused import run_where_refused
from sealane.host.models import RunsAt
from sealane.host.registry import is_absent
from sealane.hypervisor.qmp import QmpMachine
from sealane.limits import TAKE_BACK_TRIES

_STOPPED_STATES: Final = frozenset({"postmigrate", "finish-migrate", "paused"})


async def take_back(job: Job, qemu: QmpMachine, path: str, timeout_s: float) -> RunsAt | None:
    """Where the VM runs then; None where QEMU does not say, over this connection or new ones to its QMP socket at `path`."""
    try:
        return await _resume_through(job, qemu)
    except SealaneError as error:
        _warn(job, error)
    await qemu.aclose()  # QMP serves one client
    for _ in range(TAKE_BACK_TRIES - 1):
        try:
            async with QmpMachine.connect(path, timeout_s) as again:
                return await _resume_through(job, again)
        except SealaneError as error:
            if is_absent(error):
                return "nowhere"
            _warn(job, error)
    return None


async def _resume_through(job: Job, qemu: QmpMachine) -> RunsAt:
    if await run_where_refused(qemu, job.store, job.id):
        return "source"
    try:
        await qemu.cancel_migration()
    except SealaneError as error:  # a QEMU that hangs in its clean-up may run its guest all the same
        job.log.warning("QEMU did not confirm the end of its migration", code=error.code, detail=error.detail)
    if await qemu.run_state() in _STOPPED_STATES:
        await qemu.resume()
    runs_at: RunsAt = "source" if await qemu.run_state() == "running" else "nowhere"
    await settings.restore_after(job, qemu)
    return runs_at


def _warn(job: Job, error: SealaneError) -> None:
    job.log.warning("the VM could not be taken back yet", code=error.code, detail=error.detail)
