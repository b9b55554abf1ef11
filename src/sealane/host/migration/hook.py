"""The operator's own word before a switch-over: a command that may refuse it."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

from sealane.errors import make_error
from sealane.limits import HOOK_TIMEOUT_S


async def ask_hook(command: Sequence[str]) -> None:
    """Run the command, while the VM is paused; raises `migration.hook-failed` where it does not end well in time.

    What it starts and leaves behind is ended with it.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise make_error("migration.hook-failed", f"{command[0]}: {error.strerror}") from error
    try:
        async with asyncio.timeout(HOOK_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise make_error("migration.hook-failed", f"no answer within {HOOK_TIMEOUT_S:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode:
        words = output.decode("utf-8", "replace").strip().splitlines()
        raise make_error("migration.hook-failed", words[-1] if words else f"exit status {process.returncode}")
