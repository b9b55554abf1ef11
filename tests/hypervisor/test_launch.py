"""Launching a QEMU that waits, and ending exactly that one."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.hypervisor.launch import destroy, incoming_argv, launch_incoming, trim_log
from sealane.hypervisor.process import LaunchedMachine, start_time_ticks
from sealane.hypervisor.qmp import QmpMachine
from tests.hypervisor.machines import command, qemu_binaries

QEMUS = qemu_binaries()
needs_qemu = pytest.mark.skipif(not QEMUS, reason="no qemu-system-x86_64")


def test_waits_unless_told_otherwise() -> None:
    assert incoming_argv(["q", "-m", "1"]) == ["q", "-m", "1", "-incoming", "defer", "-S"]
    assert incoming_argv(["q", "-incoming", "defer"]) == ["q", "-incoming", "defer"]


@needs_qemu
@pytest.mark.e2e
@pytest.mark.parametrize("qemu", QEMUS)
@pytest.mark.parametrize("daemonize", [False, True])
async def test_launches_and_destroys(qemu: str, tmp_path: Path, daemonize: bool) -> None:
    path, told = tmp_path / "q", list[LaunchedMachine]()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    argv = command(qemu, path, *(["-daemonize"] if daemonize else []))
    machine = await launch_incoming(argv, str(path), tmp_path / "log" / "qemu.log", 30, on_started=told.append)
    assert told[-1] == machine
    assert len(told) == 1 + daemonize
    assert start_time_ticks(machine.pid) == machine.start_time_ticks
    assert os.getsid(machine.pid) != os.getsid(0)
    async with QmpMachine.connect(str(path), 10) as qmp:
        assert (await qmp.describe()).run_state == "inmigrate"
    with pytest.raises(SealaneError, match="another process listens"):
        await launch_incoming(argv, str(path), tmp_path / "log2", 30)
    assert not await destroy(machine.pid, machine.start_time_ticks + 1)
    assert start_time_ticks(machine.pid) == machine.start_time_ticks
    assert await destroy(machine.pid, machine.start_time_ticks, qmp_path=str(path))
    assert start_time_ticks(machine.pid) is None
    assert not path.exists()
    assert not await destroy(machine.pid, machine.start_time_ticks)


@needs_qemu
@pytest.mark.e2e
async def test_last_words(tmp_path: Path) -> None:
    argv = command(QEMUS[0], tmp_path / "q", "-device", "no-such-thing")
    with pytest.raises(SealaneError, match="no-such-thing") as raised:
        await launch_incoming(argv, str(tmp_path / "q"), tmp_path / "log", 30)
    assert raised.value.code == "launch.failed"


async def test_a_command_that_never_answers_is_ended(tmp_path: Path) -> None:
    told = list[LaunchedMachine]()
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL); print('here', flush=True); signal.pause()"
    with pytest.raises(SealaneError) as raised:
        await launch_incoming(
            [sys.executable, "-c", stubborn, "-incoming", "x"], str(tmp_path / "q"), tmp_path / "log", 0.5,
            on_started=told.append,
        )  # fmt: skip
    assert raised.value.code == "launch.slow"
    assert start_time_ticks(told[0].pid) is None


@pytest.mark.parametrize("argv", [[], ["/no/such/program"], ["/dev/null"], ["false"]])
async def test_what_cannot_start(argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(SealaneError) as raised:
        await launch_incoming(argv, str(tmp_path / "q"), tmp_path / "log", 5)
    assert raised.value.code == "launch.failed"


async def test_destroy_kills_what_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealane.hypervisor.launch.TERM_GRACE_S", 0.1)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        ticks = start_time_ticks(process.pid)
        assert ticks is not None
        assert await destroy(process.pid, ticks)
        assert process.wait() == -9


@needs_qemu
@pytest.mark.e2e
async def test_destroy_is_not_content_while_somebody_serves_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "q"
    machine = await launch_incoming(command(QEMUS[0], path), str(path), tmp_path / "log", 30)
    with subprocess.Popen(["sleep", "60"]) as another:
        ticks = start_time_ticks(another.pid)
        assert ticks is not None
        with pytest.raises(SealaneError, match=r"another one serves .*host\.permission"):
            await destroy(another.pid, ticks, qmp_path=str(path))
        another.wait()
    assert await destroy(machine.pid, machine.start_time_ticks, qmp_path=str(path))


async def test_a_process_that_may_not_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("signal.pidfd_send_signal", refused)
    with subprocess.Popen(["sleep", "60"]) as process:
        ticks = start_time_ticks(process.pid)
        assert ticks is not None
        with pytest.raises(SealaneError, match=r"cannot end process .*host\.permission"):
            await destroy(process.pid, ticks)
        process.kill()


@pytest.mark.parametrize("late", [False, True])
async def test_a_daemon_does_not_outlive_a_launch_that_was_cancelled(tmp_path: Path, late: bool) -> None:
    """The command has forked and perhaps ended; nothing was heard of its child yet."""
    said = tmp_path / "said"
    program = (
        "import os, signal, sys, time\n"
        "if os.fork():\n"
        f"    {'os._exit(0)' if late else 'signal.pause()'}\n"
        "os.setsid()\n"
        "if os.fork():\n    os._exit(0)\n"
        f"open({str(said)!r}, 'w').write(str(os.getpid()) + '\\n')\n"
        "signal.pause()\n"
    )
    argv = [sys.executable, "-c", program, "-incoming", "x"]
    launching = asyncio.create_task(launch_incoming(argv, str(tmp_path / "q"), tmp_path / "log", 60))
    async with asyncio.timeout(20):
        while not said.exists() or not said.read_text().endswith("\n"):
            await asyncio.sleep(0.01)
    daemon = int(said.read_text())
    assert start_time_ticks(daemon) is not None
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    assert start_time_ticks(daemon) is None


def test_a_log_keeps_its_end_and_stays_open_for_what_comes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with open(path, "ab", buffering=0) as log:
        log.write(b"".join(b"%07d\n" % number for number in range(1000)))
        trim_log(path, 8000)
        assert path.stat().st_size == 8000
        trim_log(path, 7999)
        assert path.read_bytes().endswith(b"0000999\n")
        assert path.stat().st_size == 7999 // 2
        log.write(b"later\n")
    assert path.read_bytes().endswith(b"0000999\nlater\n")
    trim_log(tmp_path / "none")
