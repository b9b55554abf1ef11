"""The agent's side of a real launcher: its start, its death, requests that fail or that nobody waits for any more."""

import asyncio
import os
import pwd
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sealane.enclave.sandbox import MEASURES
from sealane.errors import HostError, SealaneError
from sealane.host.migration import enclave_launcher
from sealane.host.migration.enclave_launcher import ChildProcess, EnclaveLauncher, enclave_ids, try_sandbox
from sealane.host.migration.enclave_process import EnclaveProcess
from tests.enclave.rig import open_descriptors


@pytest.fixture
async def launcher() -> AsyncIterator[EnclaveLauncher]:
    before = open_descriptors()
    made = EnclaveLauncher()
    yield made
    await made.stop()
    assert open_descriptors() == before
    assert enclaves() == []


def enclaves() -> list[int]:
    """Children of this process that are enclaves or launchers, or were and are not reaped."""
    children = {
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }
    return [pid for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("sealane-")]


async def end(*started: EnclaveProcess) -> None:
    for each in started:
        each.kill()
        await each.reap()


async def test_many_at_once(launcher: EnclaveLauncher) -> None:
    started = await asyncio.gather(*(launcher.start_enclave() for _ in range(5)))
    assert {each.pid for each in started} <= set(enclaves())
    await end(*started)


async def test_a_dead_launcher_is_replaced_and_its_enclaves_go_on(launcher: EnclaveLauncher) -> None:
    first = await launcher.start_enclave()
    died = launcher.pid
    assert died is not None
    os.kill(died, signal.SIGKILL)
    second = await launcher.start_enclave()
    assert launcher.pid != died
    assert {first.pid, second.pid} <= set(enclaves())
    await end(first, second)


async def test_a_launcher_that_dies_under_a_request_is_replaced(launcher: EnclaveLauncher) -> None:
    launcher.start()
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGSTOP)
    request = asyncio.create_task(launcher.start_enclave())
    await asyncio.wait([request], timeout=0)
    os.kill(launcher.pid, signal.SIGKILL)
    await end(await request)


async def test_a_launcher_that_cannot_be_started(launcher: EnclaveLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(HostError, match=r"could not be started.*enclave\.died"):
        await launcher.start_enclave()


async def test_a_launcher_that_always_ends(launcher: EnclaveLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(HostError, match=r"ends as soon as it is started.*enclave\.died"):
        await launcher.start_enclave()


async def test_a_launcher_that_says_nothing(launcher: EnclaveLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.start()
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGSTOP)
    monkeypatch.setattr(enclave_launcher, "ENCLAVE_START_TIMEOUT_S", 0.05)
    with pytest.raises(HostError, match=r"enclave\.slow"):
        await launcher.start_enclave()
    assert launcher.pid is None


async def test_an_enclave_that_nobody_waits_for_any_more_is_ended(launcher: EnclaveLauncher) -> None:
    launcher.start()
    abandoned = asyncio.create_task(launcher.start_enclave())
    await asyncio.wait([abandoned], timeout=0)
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    await end(await launcher.start_enclave())  # answers come in order: the abandoned one was told by now
    async with asyncio.timeout(20):
        while enclaves() != [launcher.pid]:
            await asyncio.sleep(0.01)


async def test_why_a_fork_failed_is_told(launcher: EnclaveLauncher) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher.start()
    await asyncio.wait([asyncio.create_task(asyncio.sleep(0))])
    control, launcher._control = launcher._control, ours
    assert control is not None
    asyncio.get_running_loop().remove_reader(control)
    ours.setblocking(False)
    asyncio.get_running_loop().add_reader(ours, launcher._on_readable)
    theirs.send(b"failed no memory")
    with pytest.raises(HostError, match=r"no memory \[enclave\.died\]"):
        await launcher.start_enclave()
    asyncio.get_running_loop().remove_reader(ours)
    launcher._control = control
    ours.close()
    theirs.close()


async def test_exit_statuses_are_kept() -> None:
    for words, status in ((["-c", "exit 3"], 3), (["-c", "kill -9 $$"], -9)):
        pid = os.posix_spawn("/bin/sh", ["sh", *words], {})
        child = ChildProcess(pid, os.pidfd_open(pid))
        assert await child.exited == status
        child.kill()  # harmless


# ---- the sandbox


async def test_an_enclave_that_lacks_what_is_required_gets_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent hears what does not hold before it says Begin, and ends the enclave."""
    monkeypatch.setattr(enclave_launcher, "why_not", lambda measures, policy: [f"calls: not under {policy}"])
    before = open_descriptors()
    launcher = EnclaveLauncher(sandbox="strict")
    with pytest.raises(HostError, match=r"calls: not under strict \[enclave\.unconfined\]"):
        await launcher.start_enclave()
    await launcher.stop()
    assert open_descriptors() == before
    assert enclaves() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root chooses who its enclaves are")
async def test_who_enclaves_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert enclave_ids("nobody") == (pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)
    for unfit in ("no-such-user", "root"):
        with pytest.raises(SealaneError, match=r"enclave_user.*usage\.configuration"):
            enclave_ids(unfit)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert enclave_ids("no-such-user") == ()


async def test_an_enclave_that_a_signal_ended_costs_the_launcher_its_layout(launcher: EnclaveLauncher) -> None:
    enclave = await launcher.start_enclave()
    before = launcher.pid
    os.kill(enclave.pid, signal.SIGSEGV)
    await enclave.reap()
    await end(await launcher.start_enclave())
    assert launcher.pid != before


async def test_what_doctor_asks() -> None:
    assert set(await try_sandbox("sealane-enclave")) == set(MEASURES)
