"""A source QEMU whose switch to postcopy fails; the test itself is what it sends to."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from sealane.hypervisor.driver import MigrationParameters, MigrationSettings
from sealane.hypervisor.qmp import QmpMachine
from tests.hypervisor.machines import command, running

_PATIENCE_S = 60


@contextlib.asynccontextmanager
async def failed_switch(
    qemu: str, directory: Path, *arguments: str
) -> AsyncIterator[tuple[QmpMachine, MigrationSettings]]:
    """The QEMU, its monitor at `directory`/s, and what it was set to before.

    It is told to switch when its stream is cut. QEMU 10.0 sees that before or after it has begun: its migration has failed, or it
    is stranded. Its thread is gone in either case.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "m"))
        listener.listen()
        listener.setblocking(False)
        async with running(command(qemu, directory / "s", *arguments), directory / "s") as source:
            before = await source.migration_settings()
            await source.configure_migration(MigrationParameters(postcopy=True), incoming=False)
            await source.migrate(f"unix:{directory / 'm'}")
            connection, _ = await loop.sock_accept(listener)
            with connection:
                reading = asyncio.create_task(_read_all(connection))
                await source.start_postcopy()
                await source.wait_migration({"pre-switchover"}, _PATIENCE_S)
                connection.shutdown(socket.SHUT_RDWR)
                await reading
                await source.migrate_continue()
                async with asyncio.timeout(_PATIENCE_S):
                    while "'migration'" in str(await source.execute("query-yank")):
                        await asyncio.sleep(0.01)
                yield source, before


async def _read_all(connection: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(connection, 1 << 20):
        pass
