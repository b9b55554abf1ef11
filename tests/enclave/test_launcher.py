"""A real launcher: what its forks share and do not, whose children they are, and how all of it ends."""

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealane.enclave.interface import socket_pair
from sealane.enclave.launcher import ENCLAVE_NAME, LAUNCHER_NAME, _words_of
from tests.enclave.rig import PATIENCE_S, Enclave, Launcher, a_launcher, open_descriptors
from tests.session.rig import SOURCE


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    before = open_descriptors()
    with a_launcher() as made:
        yield made
    assert open_descriptors() == before


@contextlib.contextmanager
def an_enclave(launcher: Launcher) -> Iterator[Enclave]:
    made = Enclave(SOURCE, launcher)
    try:
        yield made
    finally:
        made.close()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def named(enclave: Enclave) -> int:
    """Its number, once it is past its first steps."""
    deadline = time.monotonic() + PATIENCE_S
    while status(enclave.pid)["Name"] != ENCLAVE_NAME and time.monotonic() < deadline:
        time.sleep(0.001)
    return enclave.pid


def test_enclaves_are_children_of_the_agent_and_named(launcher: Launcher) -> None:
    with an_enclave(launcher) as one, an_enclave(launcher) as other:
        assert status(launcher.process.pid)["Name"] == LAUNCHER_NAME
        for enclave in (one, other):
            told = status(named(enclave))
            assert told["Name"] == ENCLAVE_NAME
            assert told["PPid"] == str(os.getpid())
            assert told["Threads"] == "1"
        assert one.pid != other.pid


def test_the_launcher_has_one_thread_and_one_socket_and_no_environment(launcher: Launcher) -> None:
    with an_enclave(launcher):
        process = Path(f"/proc/{launcher.process.pid}")
        assert status(launcher.process.pid)["Threads"] == "1"
        if os.geteuid() != 0:
            pytest.skip("only root looks into a process that is not dumpable")
        assert (process / "environ").read_bytes() == b"LANG=C.UTF-8\0OPENBLAS_NUM_THREADS=1\0"
        deadline = time.monotonic() + PATIENCE_S
        while len(os.listdir(process / "fd")) > 4 and time.monotonic() < deadline:
            time.sleep(0.001)  # what belongs to the enclave is closed behind the answer
        kinds = [os.readlink(entry).partition(":")[0] for entry in (process / "fd").iterdir()]
        assert kinds.count("socket") == 1
        assert len(kinds) == 4  # and stdin, stdout, stderr


@pytest.mark.parametrize("order", ["the call socket", "the agent's end of the launcher"])
def test_an_enclave_ends_with_its_calls_and_outlives_its_launcher(launcher: Launcher, order: str) -> None:
    with an_enclave(launcher) as enclave:
        if order == "the call socket":
            enclave.calls.close()
        else:
            launcher.control.close()
            assert launcher.process.wait(PATIENCE_S) == 0
            assert status(enclave.pid)["State"].startswith("S")
            enclave.calls.close()
        assert enclave.ends() == (0, "")


def test_an_enclave_that_is_not_wanted_any_more_ends_without_a_word(launcher: Launcher) -> None:
    mine, theirs = socket_pair()
    with theirs:
        mine.close()
        _, pidfd = launcher.fork(theirs)
    try:
        assert select.select([pidfd], [], [], PATIENCE_S)[0]
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    finally:
        os.close(pidfd)
    assert ended is not None
    assert (ended.si_code, ended.si_status, launcher.words()) == (os.CLD_EXITED, 0, "")


def test_what_ends_an_enclave_is_told_whole() -> None:
    """From inside the sandbox, where the source's lines cannot be read."""
    try:
        os.close(-1)
    except OSError as error:
        told = _words_of(error)
    assert told.startswith("Traceback (most recent call last):\n  File ")
    assert "in test_what_ends_an_enclave_is_told_whole\n" in told
    assert told.endswith(f"OSError: [Errno {errno.EBADF}] Bad file descriptor\n")


def test_a_killed_launcher_leaves_its_enclaves_alone(tmp_path: Path) -> None:
    launcher = Launcher()
    with an_enclave(launcher) as enclave:
        launcher.process.kill()
        launcher.process.wait()
        assert not select.select([enclave._pidfd], [], [], 0.2)[0]
        enclave.calls.close()
        assert enclave.ends()[0] == 0
    launcher.control.close()
    launcher.stderr.close()


_AGENT = """
import os, sys, time
from tests.enclave.rig import Enclave, Launcher
from tests.session.rig import SOURCE
launcher = Launcher()
enclave = Enclave(SOURCE, launcher)
if os.fork() == 0:  # a child keeps every socket open, so that no end-of-file ends what the agent's death must end
    os.setsid()
    time.sleep(60)
    os._exit(0)
print(launcher.process.pid, enclave.pid, flush=True)
time.sleep(60)
"""


def test_launcher_and_enclaves_die_with_the_agent() -> None:
    """By the kernel, not by a closed socket: what a hung enclave would never read."""
    with subprocess.Popen(
        [sys.executable, "-c", _AGENT],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        process_group=0,
    ) as agent:
        assert agent.stdout is not None
        pids = [int(word) for word in agent.stdout.readline().split()]
        assert len(pids) == 2
        ends = [os.pidfd_open(pid) for pid in pids]
        os.kill(agent.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        for end in ends:
            assert select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0]
            os.close(end)


def test_a_request_that_is_none_is_passed_over(launcher: Launcher) -> None:
    here, there = socket.socketpair()
    socket.send_fds(launcher.control, [b"nonsense"], [there.fileno()])
    launcher.control.send(b"start")  # without a descriptor
    there.close()
    here.settimeout(PATIENCE_S)
    assert here.recv(1) == b""  # closed, not leaked
    here.close()
    with an_enclave(launcher) as enclave:
        assert status(named(enclave))["Name"] == ENCLAVE_NAME


_RANDOM = """
import os, random
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sealane.enclave.forking import fork_for_parent
if os.fork():  # the forks below are this process's children
    for _ in range(4):
        os.wait()
    os._exit(0)
Ed25519PrivateKey.generate(), random.random()
for _ in range(3):
    if fork_for_parent()[0] == 0:
        key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        os.write(1, f"{key.hex()} {random.random()}\\n".encode())
        os._exit(0)
os._exit(0)
"""


def test_forks_share_no_random_numbers() -> None:
    """Also where the parent's generators were in use: keys of OpenSSL's, and Python's own numbers."""
    done = subprocess.run(
        [sys.executable, "-c", _RANDOM], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for column in zip(*lines, strict=True):
        assert len(set(column)) == 3
