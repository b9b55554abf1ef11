"""A QEMU that a guest has taken over answers its monitor with what it likes: figures, typed errors, and bounded memory."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.hypervisor.driver import Closed, QmpEvent
from sealane.hypervisor.qmp import QmpMachine
from sealane.hypervisor.qmp_connection import EVENT_BYTES_MAX

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""}, "capabilities": ["oob"]}}


@contextlib.asynccontextmanager
async def answering(directory: Path, *lines: bytes) -> AsyncIterator[QmpMachine]:
    """A machine that negotiates, and answers each command with these lines; `@ID` is the command's."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        decoder, text = json.JSONDecoder(), ""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                text += data.decode()
                while text.strip():
                    said, end = decoder.raw_decode(text.lstrip())
                    text = text.lstrip()[end:]
                    about = {"id": said["id"]} if "id" in said else {}
                    answers = [json.dumps({"return": {}, **about}).encode()]
                    if said.get("execute") != "qmp_capabilities":
                        answers = [line.replace(b"@ID", json.dumps(said.get("id")).encode()) for line in lines]
                    writer.writelines(line + b"\n" for line in answers)
                    await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, directory / "q")
    async with server, QmpMachine.connect(str(directory / "q"), 20) as machine:
        yield machine


def status(ram: str) -> bytes:
    return b'{"return": {"status": "active", "ram": %s}, "id": @ID}' % ram.encode()


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1e999", '"much"', "[]", "9" * 400], ids=lambda value: value[:8])
async def test_figures_that_are_none(tmp_path: Path, value: str) -> None:
    names = ("total", "remaining", "transferred", "mbps", "page-size", "dirty-pages-rate", "dirty-sync-count")
    ram = ", ".join(f'"{name}": {value}' for name in names)
    async with answering(tmp_path, status(f"{{{ram}}}")) as machine:
        told = await machine.migration_status()
        assert (told.status, told.ram_total, told.iteration, told.rate_bytes_per_s) == ("active", 0, 0, 0.0)


async def test_figures(tmp_path: Path) -> None:
    async with answering(tmp_path, status('{"total": 18446744073709551615, "remaining": 5.0, "mbps": 8}')) as machine:
        told = await machine.migration_status()
        assert (told.ram_total, told.ram_remaining, told.rate_bytes_per_s) == (2**64 - 1, 5, 1e6)


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"x" * (11 << 20), b'{"return": {}, "id": ["x"]}',
     b'{"error": {"class": "GenericError", "desc": "\\ud800\\u001b[2J"}, "id": @ID}'],
    ids=["deep", "deeper", "no text", "long", "an odd id", "half a character"],
)  # fmt: skip
async def test_what_is_no_answer_is_a_typed_error(tmp_path: Path, line: bytes) -> None:
    lost: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
    async with answering(tmp_path, line) as machine:
        with pytest.raises(SealaneError, match=r"vm\.(unreachable|qmp)") as error:
            await machine.migration_status()
        assert error.value.detail.isprintable()
    del machine
    assert lost == []


async def test_events_that_nobody_reads_take_bounded_memory(tmp_path: Path) -> None:
    long = json.dumps({"event": "E" * 9999, "data": {"x": [[]] * 9999}, "timestamp": {"seconds": 1e308}}).encode()
    short = b'{"event": "MIGRATION", "data": {"status": "active"}, "timestamp": {"seconds": 1, "microseconds": 0}}'
    async with answering(tmp_path, long, short, status("{}")) as machine:
        stream = machine.events()
        await machine.migration_status()
        await machine.aclose()
        first, second, last = stream.taken()
    assert isinstance(first, QmpEvent)
    assert (len(first.name), first.data, first.timestamp_s) == (EVENT_BYTES_MAX, {}, 0.0)
    assert isinstance(second, QmpEvent)
    assert (second.name, second.data) == ("MIGRATION", {"status": "active"})
    assert isinstance(last, Closed)
