"""Starts a QEMU that waits for a migration, and ends one for sure.

A launched QEMU is nobody's ward: a session of its own, no pipe to us, no signal of ours. It outlives the agent after a
hand-over. Until then the journal knows its pid and start time, so that the next agent finds and destroys it; a pid
alone is not enough, the kernel gives it out again.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from sealane.errors import SealaneError, make_error
from sealane.hypervisor.process import LaunchedMachine, start_time_ticks
from sealane.hypervisor.qmp import QmpMachine
from sealane.limits import LAUNCH_TIMEOUT_S, QEMU_LOG_MAX

# QEMU has no way to say that its socket is there; a connection costs some 50 microseconds.
SOCKET_LOOK_INTERVAL_S: Final = 0.02
# A QEMU that was asked to end closes its disks; then it is killed.
TERM_GRACE_S: Final = 5.0
KILL_GRACE_S: Final = 10.0
# How much of the end of the log is searched for QEMU's last words.
LOG_TAIL_BYTES: Final = 4096
# An agent ignores or handles these; the hypervisor must meet them as a shell would hand them over.
_SIGNALS_TO_DEFAULT: Final = (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# Every launch is marked in its processes' environment: what a command forks and leaves behind is found by it.
_MARK: Final = "SEALANE_LAUNCH"
# A process may fork while its siblings are looked for.
_SWEEPS: Final = 5

# systemd's words to the agent are not for its children.
_OURS_ALONE: Final = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"})


def incoming_argv(argv: Sequence[str]) -> list[str]:
    """The launch command made to wait: `-incoming defer -S` is added unless it has `-incoming` of its own."""
    given = list(argv)
    if any(argument in {"-incoming", "--incoming"} for argument in given):
        return given
    return [*given, "-incoming", "defer", "-S"]


async def launch_incoming(
    argv: Sequence[str],
    qmp_path: str,
    log_path: Path,
    timeout_s: float = LAUNCH_TIMEOUT_S,
    *,
    on_started: Callable[[LaunchedMachine], None] | None = None,
) -> LaunchedMachine:
    """Start the command and return once QEMU answers on `qmp_path`, waiting for a migration.

    `on_started` is called as soon as a process exists, before anything is awaited, and again if QEMU turns out to be
    another one (a command that daemonizes): the place to journal it. Raises `launch.failed` with QEMU's last words,
    `launch.slow`, or `host.permission`; the process is then destroyed. A stale socket at `qmp_path` is removed, a live
    one is an error, because QEMU would take its name away.
    """
    if not argv:
        raise make_error("launch.failed", "the launch command is empty")
    await remove_stale_socket(qmp_path)
    mark = secrets.token_hex(16)
    child = _spawn(incoming_argv(argv), log_path, mark)
    processes: list[LaunchedMachine] = []

    def note(machine: LaunchedMachine) -> None:
        processes.append(machine)
        if on_started:
            on_started(machine)

    try:
        note(LaunchedMachine(child.pid, start_time_ticks(child.pid) or 0))
        async with asyncio.timeout(timeout_s):
            return await _wait_answer(child, qmp_path, log_path, note)
    except BaseException as error:
        await _sweep(reversed(processes), mark, qmp_path)
        if isinstance(error, TimeoutError):
            detail = f"no answer on {qmp_path} within {timeout_s:g} s; {last_words(log_path)}"
            raise make_error("launch.slow", detail) from None
        raise


async def _sweep(noted: Iterable[LaunchedMachine], mark: str, qmp_path: str) -> None:
    """End what a launch that failed has started: what was noted, and what carries its mark (a daemon not yet met).

    Whatever cannot be ended stays noted with the caller, who has to `destroy` it and hears of it then.
    """
    with contextlib.suppress(SealaneError):
        for machine in noted:
            await _end_process(machine.pid, machine.start_time_ticks)
        for _ in range(_SWEEPS):
            if not (left := _marked(mark)):
                break
            for machine in left:
                await _end_process(machine.pid, machine.start_time_ticks)
        await remove_stale_socket(qmp_path)


def _marked(mark: str) -> list[LaunchedMachine]:
    word, found = f"{_MARK}={mark}".encode(), []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if word in (process / "environ").read_bytes().split(b"\0"):
                pid = int(process.name)
                if (ticks := start_time_ticks(pid)) is not None:
                    found.append(LaunchedMachine(pid, ticks))
    return found


async def _wait_answer(
    child: "_Child", qmp_path: str, log_path: Path, note: Callable[[LaunchedMachine], None]
) -> LaunchedMachine:
    while True:
        try:
            return await _ask(child, qmp_path, note)
        except SealaneError as error:
            if error.code != "vm.unreachable":
                raise
        if child.status:
            how = f"signal {-child.status}" if child.status < 0 else f"status {child.status}"
            raise make_error("launch.failed", f"{last_words(log_path)} ({how})")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SOCKET_LOOK_INTERVAL_S if child.status is None else SOCKET_LOOK_INTERVAL_S * 5):
                await (child.exited.wait() if child.status is None else asyncio.Event().wait())


async def _ask(child: "_Child", qmp_path: str, note: Callable[[LaunchedMachine], None]) -> LaunchedMachine:
    async with QmpMachine.connect(qmp_path) as machine:
        pid = machine.pid or child.pid
        found = LaunchedMachine(pid, start_time_ticks(pid) or 0)
        if pid != child.pid:
            note(found)
        run_state = await machine.run_state()
        if run_state != "inmigrate":
            await machine.quit()
            raise make_error("launch.failed", f"QEMU came up {run_state} instead of waiting for a migration")
        return found


async def remove_stale_socket(path: str) -> None:
    """Remove a socket that nobody listens on; raises `launch.failed` when somebody does."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise make_error("launch.failed", f"{path} is there and is not a socket")
    except FileNotFoundError:
        return
    if _is_served(path):
        raise make_error("launch.failed", f"another process listens on {path}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            pass  # a full backlog: somebody listens
    return True


# Ending


async def destroy(pid: int, start_time_ticks_: int, *, qmp_path: str | None = None) -> bool:
    """End exactly this process: SIGTERM, then SIGKILL; then remove its QMP socket. False when it was gone already.

    Raises `host.permission` where the process may not be ended, and where another one still serves the VM's socket: as
    long as somebody does, nobody may say that the VM is gone.

    The start time is compared after the pidfd is open, so that the signal cannot reach a process that got the pid since.
    """
    ended = await _end_process(pid, start_time_ticks_)
    if qmp_path is not None:
        if _is_served(qmp_path):
            raise make_error("host.permission", f"process {pid} has ended, and another one serves {qmp_path}")
        with contextlib.suppress(SealaneError):
            await remove_stale_socket(qmp_path)
    return ended


async def _end_process(pid: int, expected_start: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, ValueError):
        return False
    except OSError as error:
        raise make_error("host.permission", f"cannot watch process {pid}: {error.strerror}") from error
    try:
        if start_time_ticks(pid) != expected_start:
            return False
        for number, grace_s in ((signal.SIGTERM, TERM_GRACE_S), (signal.SIGKILL, KILL_GRACE_S)):
            try:
                signal.pidfd_send_signal(pidfd, number)
            except ProcessLookupError:
                pass
            except OSError as error:
                raise make_error("host.permission", f"cannot end process {pid}: {error.strerror}") from error
            if await _readable(pidfd, grace_s):
                return True
    finally:
        os.close(pidfd)
        _reap(pid)
    raise make_error("host.permission", f"process {pid} does not end, not even on SIGKILL")


async def _readable(fd: int, timeout_s: float) -> bool:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ready.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
    return True


# Starting


class _Child:
    """A process that we started. Reaped as soon as it ends, left alone when we end first.

    asyncio's own subprocesses will not do: they kill what still runs when the loop closes.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exited = asyncio.Event()
        self.status: int | None = None
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._on_exit)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        _CHILDREN.pop(self.pid, None)
        self.reap()
        self.exited.set()

    def reap(self) -> None:
        """Take the exit status if there is one; keeps the first."""
        if self.status is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.status = os.waitstatus_to_exitcode(status)


_CHILDREN: Final[dict[int, _Child]] = {}


def _reap(pid: int) -> None:
    child = _CHILDREN.get(pid)
    if child is not None:
        child.reap()


def _spawn(argv: Sequence[str], log_path: Path, mark: str) -> _Child:
    program = shutil.which(argv[0])
    if program is None:
        raise make_error("launch.failed", f"no program {argv[0]}")
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (
            open(log_path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_TRUNC, 0o600)) as log,
            open(os.devnull, "rb") as nothing,
        ):
            pid = os.posix_spawn(
                program,
                list(argv),
                {**{name: value for name, value in os.environ.items() if name not in _OURS_ALONE}, _MARK: mark},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, nothing.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=_SIGNALS_TO_DEFAULT,
            )
    except OSError as error:
        raise make_error("launch.failed", f"{program}: {error.strerror}") from error
    child = _Child(pid)
    _CHILDREN[pid] = child
    return child


def trim_log(log_path: Path, limit_bytes: int = QEMU_LOG_MAX) -> None:
    """Keep a launched QEMU's log below the limit: beyond it, only the later half of the limit stays.

    QEMU goes on writing where the file then ends (O_APPEND); what it wrote in that very moment may be lost.
    """
    try:
        with open(log_path, "r+b") as log:
            size = os.fstat(log.fileno()).st_size
            if size <= limit_bytes:
                return
            log.seek(size - limit_bytes // 2)
            tail = log.read(limit_bytes // 2)
            log.truncate(0)
        with open(log_path, "ab") as log:
            log.write(tail)
    except OSError:
        return  # no log, or no room: there is nothing to be said about it


def last_words(log_path: Path, lines: int = 1) -> str:
    """The last line that a launched QEMU wrote, or the last few."""
    try:
        with open(log_path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL_BYTES))
            said = log.read().decode(errors="replace").split("\n")
    except OSError:
        said = []
    words = [line.strip() for line in said if line.strip()]
    return "; ".join(words[-lines:]) or "it printed nothing"
