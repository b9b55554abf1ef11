"""QEMUs for the driver's tests: started, found ready, and reaped."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from sealane.hypervisor.qmp import QmpMachine
from sealane.testing.problems import RigError
from sealane.testing.qemu import all_qemus

UUID = "3b1e7f5c-6d0c-4a51-9d7e-0d3f1f0c7a11"
MEMORY_MIB = 96


def qemu_binaries() -> list[str]:
    """Every QEMU that is here: SEALANE_QEMU alone where it is set."""
    try:
        return [str(qemu.path) for qemu in all_qemus()]
    except RigError:
        return []


def command(qemu: str, qmp: Path, *extra: str) -> list[str]:
    """A small guest that never boots anything: its firmware alone dirties some memory."""
    return [
        *(qemu, "-nodefaults", "-display", "none", "-accel", "tcg", "-machine", "pc-q35-7.2", "-smp", "2"),
        *("-m", f"{MEMORY_MIB}M", "-name", "probe", "-uuid", UUID, "-qmp", f"unix:{qmp},server=on,wait=off"),
        *extra,
    ]


async def connect_when_up(process: subprocess.Popen[bytes], path: Path) -> QmpMachine:
    """A machine on a QEMU that was just started; asks until it answers or has ended."""
    async with asyncio.timeout(30):
        while process.poll() is None:
            machine = QmpMachine.connect(str(path), 10)
            try:
                return await machine.__aenter__()
            except Exception:
                await asyncio.sleep(0.02)
    raise AssertionError(f"QEMU ended with {process.returncode}")


@contextlib.asynccontextmanager
async def running(argv: Sequence[str], path: Path) -> AsyncIterator[QmpMachine]:
    """A QEMU process and a connection to it; both are gone afterwards."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        machine = await connect_when_up(process, path)
        try:
            yield machine
        finally:
            await machine.aclose()
    finally:
        process.kill()
        process.wait()


def skip_without_qemu() -> list[str]:
    """The binaries, or a skip of the whole module."""
    found = qemu_binaries()
    if not found:
        pytest.skip("no qemu-system-x86_64", allow_module_level=True)
    return found
