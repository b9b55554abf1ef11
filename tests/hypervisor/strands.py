"""A source QEMU whose switch to postcopy fails, or comes to nothing; the test itself is what it sends to."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from sealane.hypervisor.driver import MigrationParameters, MigrationSettings
from sealane.hypervisor.qmp import QmpMachine
from sealane.hypervisor.qmp_connection import as_dict
from tests.hypervisor.machines import command, running

_PATIENCE_S = 60
# A copy that is not over when it is told to switch.
_TOO_SLOW = 200_000


@contextlib.asynccontextmanager
async def _told_to_switch(
    qemu: str, directory: Path, parameters: MigrationParameters, *arguments: str
) -> AsyncIterator[tuple[QmpMachine, MigrationSettings, Callable[[], Awaitable[None]]]]:
    """The QEMU, which waits before its switch; what it was set to before; and what ends its stream, when all that came is read."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "m"))
        listener.listen()
        listener.setblocking(False)
        async with running(command(qemu, directory / "s", *arguments), directory / "s") as source:
            before = await source.migration_settings()
            await source.configure_migration(parameters, incoming=False)
            await source.migrate(f"unix:{directory / 'm'}")
            connection, _ = await loop.sock_accept(listener)
            with connection:
                reading = asyncio.create_task(_read_all(connection))

                async def end_stream() -> None:
                    connection.shutdown(socket.SHUT_RDWR)
                    await reading

                await source.start_postcopy()
                await source.wait_migration({"pre-switchover"}, _PATIENCE_S)
                yield source, before, end_stream


@contextlib.asynccontextmanager
async def failed_switch(
    qemu: str, directory: Path, *arguments: str
) -> AsyncIterator[tuple[QmpMachine, MigrationSettings]]:
    """The QEMU, its monitor at `directory`/s, and what it was set to before.

    It is told to switch when its stream is cut. QEMU 10.0 sees that before or after it has begun: its migration has failed, or it
    is stranded. Its thread is gone in either case.
    """
    parameters = MigrationParameters(postcopy=True)
    async with _told_to_switch(qemu, directory, parameters, *arguments) as (source, before, end_stream):
        await end_stream()
        await source.migrate_continue()
        async with asyncio.timeout(_PATIENCE_S):
            while "'migration'" in str(await source.execute("query-yank")):
                await asyncio.sleep(0.01)
        yield source, before


@contextlib.asynccontextmanager
async def unshared_switch(qemu: str, directory: Path, *arguments: str) -> AsyncIterator[QmpMachine]:
    """The QEMU, its monitor at `directory`/s, that has sent all which a destination needs to run the VM, and believes in postcopy.

    What it sent is thrown away, and the stream closed then: nobody ran the VM.
    """
    slowly = MigrationParameters(postcopy=True, max_bandwidth_bytes_per_s=_TOO_SLOW)
    async with _told_to_switch(qemu, directory, slowly, *arguments) as (source, _, end_stream):
        await source.migrate_continue()
        await _wait_switched(source)
        await end_stream()
        yield source


async def _wait_switched(source: QmpMachine) -> None:
    """QEMU 7.2 says that it is in postcopy before it has sent anything."""
    async with asyncio.timeout(_PATIENCE_S):
        while not as_dict(as_dict(await source.execute("query-migrate")).get("ram")).get("postcopy-bytes"):
            await asyncio.sleep(0.01)


async def _read_all(connection: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(connection, 1 << 20):
        pass
