"""What an enclave cannot do, tried from inside a real one's sandbox, and from outside by its own user.

Each row names the measures that forbid the act: with any one of them it fails, without all of them it succeeds.
"""

import ast
import contextlib
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sealane.enclave import landlock
from sealane.enclave.interface import LAUNCHER_ENVIRONMENT, socket_pair
from sealane.enclave.launcher import PACKET_MAX, REQUEST, STARTED
from sealane.enclave.sandbox import MEASURES, REQUIRED, STRICT, Sandbox, _lock_memory, why_not
from sealane.enclave.seccomp import TABLE, SystemCallFilter
from sealane.errors import HostError
from sealane.host.migration.enclave_launcher import ENCLAVE_USER, enclave_ids
from tests.enclave.probe import CAP_IPC_LOCK, CAP_SYS_RESOURCE, HOLD_BYTES, LOCKED_BYTES_MAX
from tests.enclave.rig import PATIENCE_S, Enclave, a_launcher
from tests.session.rig import SOURCE

AS_ROOT = os.geteuid() == 0
PROBE = Path(__file__).with_name("probe.py")
KILLED = "killed by signal 31"
ADDRESS_SPACE_BYTES = 1 << 30  # a probe's, at most: the limit counts what is mapped, not what is touched


@dataclass
class Probed:
    """How an act went: `done`, an error's words, or the signal; and the process while it is looked at from outside."""

    pid: int
    measures: dict[str, str]
    outcome: str


@contextlib.contextmanager
def probed(act: str, *removed: str, own_user: bool = True, extra: Mapping[str, str] | None = None) -> Iterator[Probed]:
    ids = list(map(str, enclave_ids(ENCLAVE_USER))) if own_user else []
    control, theirs = socket_pair()
    control.settimeout(PATIENCE_S)
    argv = [sys.executable, str(PROBE), str(theirs.fileno()), *(ids or ["-", "-"]), act, ",".join(removed) or "none"]
    with theirs, control, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            argv, pass_fds=[theirs.fileno()], stderr=stderr, env={**LAUNCHER_ENVIRONMENT, **(extra or {})}
        )
        mine, calls = socket_pair()
        mine.settimeout(PATIENCE_S)
        with mine:
            with calls:
                socket.send_fds(control, [REQUEST], [calls.fileno()])
            packet, (pidfd,), _, _ = socket.recv_fds(control, PACKET_MAX, 1)
            pid = int(packet.removeprefix(STARTED))
            told = mine.recv(65_536)
            if not told:
                stderr.seek(0)
                pytest.fail(stderr.read().decode())
            outcome = mine.recv(65_536).decode()
            ended = None if outcome else os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            if ended is not None:
                outcome = f"killed by signal {ended.si_status}" if ended.si_code != os.CLD_EXITED else "exited"
            yield Probed(pid, ast.literal_eval(told.decode()), outcome)
        if ended is None:
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        control.close()
        process.wait(PATIENCE_S)


@dataclass(frozen=True)
class Row:
    """An act, and how it ends with only this measure in force."""

    act: str
    ends: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)


ROWS = (
    Row("open", {"calls": "PermissionError: [Errno 13]", "files": "PermissionError: [Errno 13]"}),
    Row("create", {"calls": "PermissionError: [Errno 13]", "files": "PermissionError: [Errno 13]"}),
    Row("connect", {"calls": "PermissionError: [Errno 13]", "files": "PermissionError: [Errno 13]"}),
    Row("listen", {"calls": "PermissionError: [Errno 13]", "files": "PermissionError: [Errno 13]"}),
    Row("datagram", {"calls": KILLED}),
    Row("signal by descriptor", {"calls": KILLED}),
    Row("exec", {"calls": KILLED, "files": "PermissionError: [Errno 13]"}),
    Row("fork", {"calls": "PermissionError: [Errno 1]"}),
    Row("executable memory", {"calls": "PermissionError: [Errno 13]"}),
    Row("dumpable", {"calls": KILLED}),
    Row("another death signal", {"calls": KILLED}),
    Row("limit", {"calls": KILLED}),
    Row("many descriptors", {"limits": "OSError: [Errno 24]"}),
)
CASES = [(row, measure) for row in ROWS for measure in row.ends]


@pytest.fixture
def surroundings() -> Iterator[dict[str, str]]:
    """A directory that anybody may write to, a port that listens, and a socket that takes anybody's datagrams."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        os.chmod(directory, 0o777)
        path = f"{directory}/datagrams"
        datagrams.bind(path)
        os.chmod(path, 0o777)
        yield {"TMP_FILE": f"{directory}/made", "PORT": str(listener.getsockname()[1]), "DATAGRAMS": path}


@pytest.mark.parametrize(("row", "measure"), CASES, ids=[f"{row.act}-{measure}" for row, measure in CASES])
def test_an_act_fails_with_one_measure(row: Row, measure: str, surroundings: dict[str, str]) -> None:
    others = {"calls", "files", "limits"} - {measure}
    with probed(row.act, *others, extra=surroundings) as seen:
        assert seen.outcome.startswith(row.ends[measure])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.act))
def test_and_succeeds_without_them(row: Row, surroundings: dict[str, str]) -> None:
    with probed(row.act, *row.ends, extra=surroundings) as seen:
        assert seen.outcome in {"done", "exited"}  # exec does not come back


@pytest.mark.parametrize("act", [row.act for row in ROWS])
def test_and_fails_with_all(act: str, surroundings: dict[str, str]) -> None:
    with probed(act, extra=surroundings) as seen:
        assert seen.outcome not in {"done", "exited"}


def test_it_may_have_no_death_signal() -> None:
    with probed("outlive") as seen:
        assert seen.outcome == "done"


@pytest.mark.skipif(not AS_ROOT, reason="only root has privileges to lose")
def test_root_is_given_up() -> None:
    with probed("gain", "calls", "files") as seen:
        assert seen.outcome.startswith("PermissionError: [Errno 1]")
    with probed("gain", "calls", "files", own_user=False) as seen:  # the same act where the user was kept
        assert seen.outcome == "done"
        assert seen.measures["user"] == "it is root"


@pytest.mark.skipif(not AS_ROOT, reason="only root has capabilities to lose")
def test_capabilities_are_given_up_even_by_root() -> None:
    with probed("mount", "calls", "files", own_user=False) as seen:
        assert seen.outcome.startswith("PermissionError: [Errno 1]")
        assert seen.measures["capabilities"] == ""
    with probed("nothing", "calls", "files", "capabilities", own_user=False) as seen:
        assert seen.measures["capabilities"] == "it has some"


@pytest.mark.parametrize("act", ["signal", "ptrace"])
def test_other_processes_are_out_of_reach(act: str) -> None:
    with probed(act) as seen:
        assert seen.outcome == KILLED
    with probed(act, "calls") as seen:
        assert seen.outcome.startswith("PermissionError: [Errno 1]")


_READ_MEMORY = """
import ctypes, os, sys
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
try:
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
    print("mem")
except PermissionError:
    pass
if libc.ptrace(0x4206, pid, 0, 0) == 0:
    print("ptrace")
"""


def from_outside(pid: int) -> list[str]:
    """What a process of the same user can do to it, without any capability."""
    ids = enclave_ids(ENCLAVE_USER)
    become = ["setpriv", f"--reuid={ids[0]}", f"--regid={ids[1]}", "--clear-groups", "--"] if ids else []
    done = subprocess.run(
        [*become, "/usr/bin/python3", "-I", "-c", _READ_MEMORY, str(pid)], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_nobody_of_its_user_reads_its_memory() -> None:
    with a_launcher() as launcher, contextlib.closing(Enclave(SOURCE, launcher)) as enclave:
        assert from_outside(enclave.pid) == []
        assert from_outside(launcher.process.pid) == []
    with probed("nothing", "calls", "files", "dumpable") as seen:  # the same act where it was left dumpable
        assert seen.measures["dumpable"] == "it is"
        assert from_outside(seen.pid) == ["mem", "ptrace"]


def lacks_to_lock() -> str:
    """What a probe that keeps the capabilities of this process lacks to lock all of its memory; empty where it may.

    In a user namespace CapEff may show capabilities that the kernel does not mean here: mlock(2) and setrlimit(2) want the
    initial namespace's.
    """
    effective = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    initial = Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]
    if initial and (effective >> CAP_IPC_LOCK & 1 or effective >> CAP_SYS_RESOURCE & 1):  # no limit binds; it is lifted
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY or soft >= ADDRESS_SPACE_BYTES:  # the launcher raises the soft one
        return ""
    has = f"CapEff {effective:016x} has neither CAP_IPC_LOCK nor CAP_SYS_RESOURCE" if initial else "a user namespace"
    return f"{has}, and RLIMIT_MEMLOCK is {soft // 1024} KiB"


@pytest.mark.skipif(lacks_to_lock() != "", reason=f"memory cannot be locked here: {lacks_to_lock()}")
def test_its_memory_is_never_swapped_out() -> None:
    """What it has, and what it takes once it is in the sandbox. CAP_IPC_LOCK stands for a limit that not every root can lift."""
    with probed("hold", "calls", "files", "capabilities", "locked memory's limit", own_user=False) as seen:
        assert seen.outcome == "done"
        assert seen.measures["memory"] == ""
        assert locked_bytes(seen.pid) > HOLD_BYTES
    with probed("hold", "calls", "files", "capabilities", "memory", own_user=False) as seen:
        assert locked_bytes(seen.pid) == 0


@pytest.mark.parametrize("own_user", [False, True], ids=["the caller's user", "its own user"])
def test_it_says_so_where_its_memory_cannot_be_locked(*, own_user: bool) -> None:
    """On every machine: the probe gives up what it may have of the right to lock. The words tell who refused."""
    with probed("hold", "calls", "files", "the right to lock", own_user=own_user) as seen:
        assert seen.outcome == "done"
        assert seen.measures["memory"] == f"RLIMIT_MEMLOCK is {LOCKED_BYTES_MAX // 1024} KiB"
        assert locked_bytes(seen.pid) == 0
        assert f"memory: {seen.measures['memory']}" in why_not(seen.measures, "strict")
    with probed("hold", "calls", "files", "the right to lock", "locked memory's limit", own_user=own_user) as seen:
        assert seen.outcome == "done"  # it tried, and the kernel said no
        assert seen.measures["memory"] == "mlockall(2): Cannot allocate memory"
        assert locked_bytes(seen.pid) == 0


def locked_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmLck:")[1].split()[0]) * 1024


def test_memory_is_not_locked_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping that reaches the limit would end a migration in mid-copy."""
    monkeypatch.setattr("resource.getrlimit", lambda _: (8 << 20, 8 << 20))
    assert _lock_memory() == "RLIMIT_MEMLOCK is 8192 KiB"
    assert locked_bytes(os.getpid()) == 0


# ---- what it says of itself


def test_all_of_it_holds_here() -> None:
    """On a kernel of this machine's age; only the user depends on being root."""
    with a_launcher() as launcher, contextlib.closing(Enclave(SOURCE, launcher)) as enclave:
        assert set(enclave.measures) == set(MEASURES)
        lacking = {name for name, why in enclave.measures.items() if why}
        assert not lacking & REQUIRED
        assert (enclave.measures["user"] == "") == AS_ROOT
        assert (enclave.measures["memory"] == "") == (locked_bytes(enclave.pid) > 0)


@pytest.mark.parametrize("measure", ["privileges", "dumpable", "limits", "descriptors"])
def test_a_measure_that_was_left_out_is_told(measure: str) -> None:
    """The filter and Landlock are told by what installs them: the next test."""
    with probed("nothing", "calls", "files", measure) as seen:
        assert seen.measures[measure]
        assert why_not(seen.measures, "required") == [f"{measure}: {seen.measures[measure]}"]


def test_what_the_kernel_or_the_library_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealane.enclave.seccomp.LIBRARY", "libnowhere.so.2")
    with pytest.raises(HostError, match=r"libnowhere.*enclave\.unconfined"):
        SystemCallFilter()
    assert isinstance(Sandbox(None)._filter, HostError)
    monkeypatch.setattr(landlock, "_CREATE_RULESET", 100_000)
    with pytest.raises(HostError, match=r"Landlock is not in this kernel"):
        landlock.restrict()


def test_policies() -> None:
    whole = dict.fromkeys(MEASURES, "")
    for policy in ("strict", "required", "best-effort"):
        assert why_not(whole, policy) == []
    for name in MEASURES:
        lacking = {**whole, name: "not here"}
        assert why_not(lacking, "required") == ([f"{name}: not here"] if name in REQUIRED else [])
        assert why_not(lacking, "strict") == ([f"{name}: not here"] if name in STRICT else [])
        assert why_not(lacking, "best-effort") == []
    assert len(why_not({}, "required")) == len(REQUIRED)  # what is not told does not hold


def test_the_table_gives_each_call_a_reason_and_one_answer() -> None:
    seen: dict[str, list[bool]] = {}
    for calls in TABLE:
        assert calls.why
        for name in calls.names.split():
            seen.setdefault(name, []).append(bool(calls.where))
    for name, narrowed in seen.items():
        assert len(narrowed) == 1 or all(narrowed), name
    for dangerous in ("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "bpf", "io_uring_setup",
                      "kill", "tgkill", "mount", "setuid", "unshare", "setns", "keyctl", "userfaultfd", "pidfd_getfd"):  # fmt: skip
        assert dangerous not in seen
