"""A QEMU whose migration has ended without its saying so, and that therefore refuses to run its VM.

Where the lanes break while QEMU 10.0 makes its switch to postcopy, its migration's thread can end in a state that it does not
know how to end in ("Unknown ending state", migration/migration.c, migration_iteration_finish): `query-migrate` says "device", or
"cancelling" once it was cancelled, and the run state "finish-migrate", for ever; `cont` is refused ("Migration is not finalized
yet"). The VM is whole. That the thread is gone, QEMU says elsewhere: `query-yank` has no migration any more, and its disks are
active again.

The stub for debuggers asks neither: a debugger that lets go of the VM lets it run (gdbstub, the packet `D`). It is opened on a
unix socket beside the monitor's for that one packet, and closed again. QEMU can migrate such a VM no more until it is restarted.
"""

import asyncio
import contextlib
import os
import re
from typing import Final

from sealane.errors import SealaneError, make_error
from sealane.hypervisor.qmp_connection import QmpConnection, as_dict

_DETACH: Final = b"$D#44"
_DETACHED: Final = b"$OK#9a"
_ANSWER_MAX: Final = 64
_STRANDED: Final = frozenset({"device", "cancelling"})
# What means itself on QEMU's human command line and among a character device's options.
_PLAIN_PATH: Final = re.compile(r"/[\w./+@:-]*", re.ASCII)


async def is_stranded(monitor: QmpConnection) -> bool:
    """Whether no thread is left that could end the migration which QEMU believes to be under way."""
    if await _run_state(monitor) != "finish-migrate":
        return False
    if as_dict(await monitor.execute("query-migrate")).get("status") not in _STRANDED:
        return False
    instances = await monitor.execute("query-yank")
    return isinstance(instances, list) and {"type": "migration"} not in instances


async def let_run(monitor: QmpConnection, path: str, timeout_s: float) -> None:
    """Let a stranded QEMU run its VM, through a debugger's stub at `path`.

    Raises `vm.qmp` where its disks are not known to be its own again, or it does not run then.
    """
    if not _PLAIN_PATH.fullmatch(path):
        raise make_error("vm.qmp", f"QEMU's stub for debuggers cannot be opened at {path!r}")
    nodes = await monitor.execute("query-named-block-nodes")
    if not isinstance(nodes, list) or not all(as_dict(node).get("active") for node in nodes):
        raise make_error("vm.qmp", "QEMU has given up its disks, or does not say whether it has")
    await _human(monitor, f"gdbserver unix:{path},server=on,wait=off")
    try:
        async with asyncio.timeout(timeout_s):
            await _detach(path)
    except (TimeoutError, OSError) as error:
        raise make_error("vm.qmp", f"QEMU's stub for debuggers: {str(error) or 'no answer'}") from error
    finally:
        with contextlib.suppress(SealaneError):
            await _human(monitor, "gdbserver none")
        with contextlib.suppress(OSError):
            os.unlink(path)
    if (state := await _run_state(monitor)) != "running":
        raise make_error("vm.qmp", f"QEMU was told to run the VM by its stub for debuggers, and is {state}")


async def _run_state(monitor: QmpConnection) -> object:
    return as_dict(await monitor.execute("query-status")).get("status")


async def _human(monitor: QmpConnection, line: str) -> None:
    await monitor.execute("human-monitor-command", {"command-line": line})


async def _detach(path: str) -> None:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(_DETACH)
        answer = b""
        while _DETACHED not in answer:
            more = await reader.read(_ANSWER_MAX)
            if not more or len(answer) > _ANSWER_MAX:
                raise OSError(f"it answered {answer!r}")
            answer += more
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
