"""A QEMU that does not know that its migration has ended runs its VM all the same, and only where that is safe."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from sealane.errors import SealaneError
from sealane.hypervisor.qmp_connection import QmpConnection
from sealane.hypervisor.stranded import is_stranded, let_run
from tests.hypervisor.machines import skip_without_qemu
from tests.hypervisor.strands import failed_switch

QEMU = skip_without_qemu()[-1]
ATTEMPTS = 16


@pytest.mark.e2e
async def test_a_qemu_that_is_stranded_runs_its_vm_again(tmp_path: Path) -> None:
    for number in range(ATTEMPTS):
        directory = tmp_path / str(number)
        directory.mkdir()
        async with failed_switch(QEMU, directory) as (source, _):
            if not await is_stranded(source):
                continue
            await source.cancel_migration()
            assert await source.run_state() == "finish-migrate"
            with pytest.raises(SealaneError, match="not finalized"):
                await source.execute("cont")
            await source.resume()
            assert await source.run_state() == "running"
            assert not await is_stranded(source)
            assert "s.gdb" not in [path.name for path in directory.iterdir()]
            return
    pytest.skip("this QEMU knew each time that its migration had failed")


class Monitor:
    """A QEMU that is stranded, unless the test says otherwise; what it was told by its human command line."""

    def __init__(self, **answers: Any) -> None:
        self.told: list[str] = []
        self.answers: dict[str, Any] = {
            "query_status": {"status": "finish-migrate"},
            "query_migrate": {"status": "device"},
            "query_yank": [{"type": "chardev", "id": "x"}],
            "query_named_block_nodes": [{"active": True}, {"active": True}],
        } | answers

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        if command == "human-monitor-command":
            assert arguments is not None
            self.told.append(str(arguments["command-line"]))
            return ""
        return self.answers[command.replace("-", "_")]


def played(**answers: Any) -> tuple[Monitor, QmpConnection]:
    monitor = Monitor(**answers)
    return monitor, cast(QmpConnection, monitor)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, True),
        ({"query_migrate": {"status": "cancelling"}}, True),
        ({"query_yank": [{"type": "migration"}]}, False),  # its thread is there, and may still send
        ({"query_yank": {}}, False),
        ({"query_status": {"status": "running"}}, False),
        ({"query_status": {"status": "postmigrate"}}, False),
        ({"query_migrate": {"status": "postcopy-paused"}}, False),
        ({"query_migrate": {}}, False),
    ],
)
async def test_what_is_stranded(answers: dict[str, Any], expected: bool) -> None:
    assert await is_stranded(played(**answers)[1]) is expected


@pytest.mark.parametrize("nodes", [[{"active": True}, {"active": False}], [{}], {}])
async def test_disks_that_are_not_its_own_are_left_alone(tmp_path: Path, nodes: object) -> None:
    monitor, connection = played(query_named_block_nodes=nodes)
    with pytest.raises(SealaneError, match="has given up its disks") as raised:
        await let_run(connection, str(tmp_path / "g"), 5)
    assert raised.value.code == "vm.qmp"
    assert monitor.told == []


@pytest.mark.parametrize("path", ["/a b", "/a,b", "/a\nquit", '/"', "relative", "", "/ä"])
async def test_a_path_that_would_be_read_as_something_else_is_refused(path: str) -> None:
    monitor, connection = played()
    with pytest.raises(SealaneError, match=r"cannot be opened.*vm\.qmp"):
        await let_run(connection, path, 5)
    assert monitor.told == []


async def stub(path: Path, answer: bytes | None) -> tuple[asyncio.Server, list[bytes]]:
    """Answers every packet so; None: never."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(64))
        if answer is not None:
            writer.write(answer)
            await writer.drain()
            writer.close()
        await reader.read()
        writer.close()

    return await asyncio.start_unix_server(serve, path), heard


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (b"+$OK#9a", "running", ""),
        (b"+$OK#9a", "finish-migrate", "and is finish-migrate"),
        (b"+$E01#a6", "running", "it answered"),
        (b"x" * 1000, "running", "it answered"),
        (b"", "running", "it answered b''"),
        (None, "running", "no answer"),
    ],
)
async def test_one_packet_is_said_and_the_stub_is_closed(
    tmp_path: Path, answer: bytes | None, state: str, words: str
) -> None:
    monitor, connection = played(query_status={"status": state})
    server, heard = await stub(tmp_path / "g", answer)
    async with server:
        if words:
            with pytest.raises(SealaneError, match=words) as raised:
                await let_run(connection, str(tmp_path / "g"), 0.2)
            assert raised.value.code == "vm.qmp"
        else:
            await let_run(connection, str(tmp_path / "g"), 20)
        server.close()
    assert heard == [b"$D#44"]
    assert monitor.told == [f"gdbserver unix:{tmp_path / 'g'},server=on,wait=off", "gdbserver none"]
    assert not (tmp_path / "g").exists()


async def test_a_stub_that_does_not_open_is_told(tmp_path: Path) -> None:
    _, connection = played()
    with pytest.raises(SealaneError, match=r"stub for debuggers.*vm\.qmp"):
        await let_run(connection, str(tmp_path / "g"), 5)
