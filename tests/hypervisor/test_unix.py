"""Connections to unix sockets whose listeners are busy."""

import asyncio
import socket
from pathlib import Path

import pytest

from sealane.hypervisor.unix import connect_unix


async def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    """A monitor's queue holds one or two: a third is no connection before one of them was taken."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        waiting = [await connect_unix(path)]
        late = asyncio.create_task(connect_unix(path))
        while not (await asyncio.wait({late}, timeout=0.05))[1]:  # it is made: the queue is not full yet
            waiting.append(late.result())
            late = asyncio.create_task(connect_unix(path))
        listener.accept()[0].close()
        async with asyncio.timeout(30):
            waiting.append(await late)
        for each in waiting:
            assert each.getpeername() == path
            each.close()


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await connect_unix(str(tmp_path / "s"))
