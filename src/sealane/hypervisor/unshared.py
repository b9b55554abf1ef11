"""A source that believes in a postcopy which never began anywhere else, and runs its VM again.

Where the lanes break once the devices' state has left the source's QEMU and before the destination's has all of it, the one goes
to "postcopy-active" and on to "postcopy-paused", where its migration's thread sleeps until it is told of new lanes
(migration/migration.c, postcopy_pause), and the other ends. All of the VM's memory is at the source still (`release-ram` is off).
`cont` is refused ("Migration is not finalized yet"), `migrate_cancel` too, or by QEMU 7.2 taken, and the migration is then in
"cancelling" for ever.

From here the VM looks as one whose other half runs elsewhere. **Only the destination knows that it does not**: nothing here may be
called but on its word (`host/migration/refused.py`).

The disks, which QEMU gave up with the switch, are taken back (`blockdev-set-active`, QEMU from 10.0), and a debugger lets go of the
VM (`stranded.py`). The thread sleeps on: nothing wakes it but `migrate` with `resume`. QEMU can migrate that VM no more until it is
restarted, takes no other devices, and goes on noting what the VM writes.
"""

from typing import Final

from sealane.errors import make_error
from sealane.hypervisor.qmp_connection import QmpConnection, as_dict
from sealane.hypervisor.stranded import let_run

IN_POSTCOPY: Final = frozenset({"postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"})


async def believes_in_postcopy(monitor: QmpConnection) -> bool:
    """Whether this QEMU takes its VM to be in two halves."""
    return as_dict(await monitor.execute("query-migrate")).get("status") in IN_POSTCOPY


async def run_unshared(monitor: QmpConnection, path: str, timeout_s: float) -> None:
    """Let the VM run of a QEMU whose postcopy is paused, through a debugger's stub at `path`.

    Raises `vm.qmp` where its migration's thread may not sleep yet, its disks cannot be taken back, or it does not run then.
    """
    status = as_dict(await monitor.execute("query-migrate")).get("status")
    if status != "postcopy-paused":
        raise make_error("vm.qmp", f"QEMU says of its postcopy: {status}")
    await _take_disks(monitor)
    await let_run(monitor, path, timeout_s)


async def _take_disks(monitor: QmpConnection) -> None:
    """What came of it `let_run` looks at, node by node."""
    nodes = await monitor.execute("query-named-block-nodes")
    if not isinstance(nodes, list) or not all("active" in as_dict(node) for node in nodes):
        raise make_error("vm.qmp", "QEMU has given up its disks, and before 10.0 has no command that takes them back")
    if not all(as_dict(node).get("active") for node in nodes):
        await monitor.execute("blockdev-set-active", {"active": True})
