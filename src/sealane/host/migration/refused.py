"""A source whose switch to postcopy went out, and that runs its VM again because the destination refused it.

Its QEMU believes that the VM's other half is elsewhere. That it is not, and never will be, the destination alone can say: its QEMU
never came through the switch, and is destroyed. So the VM is let run here only where the journal has that word, be it the
refusal (`handover.refused`), or the promise to an operator who asked.
"""

import structlog

from sealane.errors import make_error
from sealane.host.models import Migration
from sealane.host.store import Store
from sealane.hypervisor.qmp import QmpMachine

_log = structlog.get_logger()


def is_refused(journalled: Migration) -> bool:
    """Whether the destination said that it never ran this VM, and the source has nothing left to do but to run it."""
    if (journalled.role, journalled.state, journalled.ended_at) != ("source", "aborted", None) or not journalled.epoch:
        return False
    if journalled.resolution is not None:
        return (journalled.resolution.decision, journalled.resolution.answer) == ("own-here", "promise")
    return journalled.problem is not None and journalled.problem.code == "handover.refused"


async def run_where_refused(qemu: QmpMachine, store: Store, migration_id: str) -> bool:
    """Let the VM run of a QEMU that believes in postcopy; whether that was needed, and it runs.

    Raises `vm.qmp` where the journal has no refusal, what `QmpMachine.run_unshared` does, and the store's errors: it then stays as
    it was.
    """
    # no domain of libvirt goes by postcopy
    if not isinstance(qemu, QmpMachine) or not await qemu.believes_in_postcopy():
        return False
    if not any(is_refused(entry.migration) for entry in store.find(migration_id)):
        lacks = "no word is journalled that the destination never had the VM"
        raise make_error("vm.qmp", f"QEMU believes in postcopy, and {lacks}")
    await qemu.run_unshared()
    _log.warning("a VM whose switch to postcopy was cut runs here again", migration=migration_id[:8])
    return True
