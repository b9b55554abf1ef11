"""The agent's side of the launcher: it starts it, asks it for enclaves, and holds each by a pidfd.

Enclaves are the agent's own children (`sealane.enclave.forking`), so it alone ends and reaps them. A launcher that died
is replaced at the next request; the enclaves it made go on.
"""

import asyncio
import contextlib
import os
import pwd
import signal
import socket
import subprocess
from collections import deque
from typing import Any, Final, NoReturn

import structlog

from sealane.enclave.interface import LAUNCHER_ENVIRONMENT, CallSocket, socket_pair
from sealane.enclave.launcher import FAILED, PACKET_MAX, REQUEST, STARTED
from sealane.enclave.sandbox import Measures, why_not
from sealane.errors import HostError, SealaneError, make_error
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.limits import ENCLAVE_START_TIMEOUT_S
from sealane.paths import isolated_module

ENCLAVE_USER: Final = "sealane-enclave"
_UNALLOTTED: Final = 60900
_ATTEMPTS: Final = 2
_END_WAIT_S: Final = 5.0


def enclave_ids(user: str) -> tuple[int, ...]:
    """The user and group ids of enclaves: none where this process is not root and cannot choose. Raises `usage.configuration`.

    Where the default user does not exist, a number that systemd's allotment (systemd.io, UIDS-GIDS) leaves free.
    """
    if os.geteuid() != 0:
        return ()
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        if user != ENCLAVE_USER:
            raise make_error("usage.configuration", f"enclave_user: there is no user {user}") from None
        return _UNALLOTTED, _UNALLOTTED
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise make_error("usage.configuration", f"enclave_user: {user} is root, or of root's group")
    return entry.pw_uid, entry.pw_gid


class ChildProcess:
    """A forked child held by its pidfd; `exited` is its wait status (os.waitstatus_to_exitcode), and it is reaped then."""

    def __init__(self, pid: int, pidfd: int) -> None:
        loop = asyncio.get_running_loop()
        self.pid, self._pidfd = pid, pidfd
        self.was_killed = False
        self.exited: asyncio.Future[int] = loop.create_future()
        loop.add_reader(pidfd, self._on_exit)

    def kill(self) -> None:
        """End the process at once; harmless when it has ended."""
        if self._pidfd >= 0:
            self.was_killed = True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        status = -1
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            if ended is not None:
                status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        os.close(self._pidfd)
        self._pidfd = -1
        if not self.exited.done():
            self.exited.set_result(status)


class EnclaveLauncher:
    """`start` it early, `start_enclave` as often as wanted, `stop` it at the end."""

    def __init__(self, *, sandbox: str = "required", user: str = ENCLAVE_USER, log: Any = None) -> None:
        self._policy, self._user, self._log = sandbox, user, log or structlog.get_logger()
        self._told: Measures | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._waiting: deque[asyncio.Future[ChildProcess]] = deque()

    @property
    def pid(self) -> int | None:
        """The launcher's process, where there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the launcher unless it is there; raises HostError `enclave.died`.

        Its environment is empty, its descriptors are one socket and stderr. It loads its libraries meanwhile: requests wait.
        """
        if self._process is not None:
            return
        ids = enclave_ids(self._user)
        ours, theirs = socket_pair()
        try:
            self._process = subprocess.Popen(
                isolated_module("sealane.enclave", theirs.fileno(), *ids),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=LAUNCHER_ENVIRONMENT,
            )
        except OSError as error:
            ours.close()
            raise HostError("enclave.died", f"the launcher could not be started: {error.strerror}") from error
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._on_readable)

    async def start_enclave(self) -> EnclaveProcess:
        """A fresh enclave that is in its sandbox and waits for Begin.

        Raises HostError `enclave.died`, `enclave.slow`, and `enclave.unconfined` where the sandbox lacks what the policy wants.
        """
        ours, theirs = socket_pair()
        ours.setblocking(False)
        try:
            child = await self._fork(theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        child.exited.add_done_callback(lambda exited: self._on_exit(child, exited.result()))
        enclave = EnclaveProcess(child, CallSocket(ours))
        try:
            told = await enclave.wait(
                enclave.sandboxed, ENCLAVE_START_TIMEOUT_S, "enclave.slow", "word from the sandbox"
            )
            self._judge(told.measures)
        except BaseException:
            enclave.kill()
            await uninterrupted(enclave.reap())
            raise
        return enclave

    def _judge(self, measures: Measures) -> None:
        if measures != self._told:
            lacking = {name: why for name, why in measures.items() if why}
            self._log.info("sandbox", policy=self._policy, lacking=lacking or "nothing")
            self._told = measures
        if reasons := why_not(measures, self._policy):
            raise HostError("enclave.unconfined", "; ".join(reasons))

    def _on_exit(self, child: ChildProcess, status: int) -> None:
        """An enclave that a signal ended may have been attacked: the next ones get another layout of their memory."""
        if status < 0 and not child.was_killed:
            self._log.error("an enclave was ended by a signal", pid=child.pid, signal=-status)
            self._lose()

    async def _fork(self, theirs: socket.socket) -> ChildProcess:
        for attempt in range(_ATTEMPTS):
            self.start()
            answer: asyncio.Future[ChildProcess] = asyncio.get_running_loop().create_future()
            try:
                self._ask(theirs, answer)
                async with asyncio.timeout(ENCLAVE_START_TIMEOUT_S):
                    return await answer
            except TimeoutError:
                self._lose()
                raise HostError("enclave.slow", f"no enclave within {ENCLAVE_START_TIMEOUT_S:.0f} s") from None
            except _LauncherGone:
                if attempt + 1 == _ATTEMPTS:
                    raise HostError("enclave.died", "the launcher of enclaves ends as soon as it is started") from None
        raise AssertionError  # the loop returns or raises

    def _ask(self, theirs: socket.socket, answer: "asyncio.Future[ChildProcess]") -> None:
        assert self._control is not None  # noqa: S101 - start made it
        try:
            socket.send_fds(self._control, [REQUEST], [theirs.fileno()])
        except BlockingIOError:
            raise HostError("enclave.slow", "the launcher takes no requests") from None
        except OSError:
            self._lose()
            raise _LauncherGone from None
        self._waiting.append(answer)

    def _on_readable(self) -> None:
        assert self._control is not None  # noqa: S101 - the reader is its
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, PACKET_MAX, 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            packet, descriptors = b"", []
        if packet.startswith(STARTED) and len(descriptors) == 1 and self._waiting:
            os.set_inheritable(descriptors[0], False)
            self._answer(ChildProcess(int(packet.removeprefix(STARTED)), descriptors[0]))
        elif packet.startswith(FAILED) and self._waiting:
            self._answer(HostError("enclave.died", packet.removeprefix(FAILED).decode(errors="replace")))
        else:
            self._lose()

    def _answer(self, answer: ChildProcess | SealaneError) -> None:
        waiting = self._waiting.popleft()
        if isinstance(answer, SealaneError):
            if not waiting.done():
                waiting.set_exception(answer)
        elif waiting.done():  # nobody waits for it any more
            answer.kill()
        else:
            waiting.set_result(answer)

    def _lose(self) -> None:
        """The launcher ended, or is not wanted any more: let those who wait try another."""
        process, waiting = self._process, list(self._waiting)
        if process is not None and process.poll() is None:
            process.kill()
        self._let_go()
        if process is not None:
            process.wait()
            self._log.warning("a launcher of enclaves ended", pid=process.pid, status=process.returncode)
        for each in waiting:
            if not each.done():
                each.set_exception(_LauncherGone())

    def _let_go(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
        self._process = self._control = None
        self._waiting.clear()

    async def stop(self) -> None:
        """End the launcher; enclaves that still run are their migrations' business."""
        process = self._process
        self._let_go()
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, _END_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)


class _LauncherGone(Exception):
    """The launcher ended before it answered."""


def _drop(*_: Any) -> NoReturn:
    raise structlog.DropEvent


async def try_sandbox(user: str) -> Measures:
    """What the sandbox of an enclave that is started here and now holds; for `doctor`."""
    launcher = EnclaveLauncher(sandbox="best-effort", user=user, log=structlog.wrap_logger(None, [_drop]))
    try:
        enclave = await launcher.start_enclave()
        measures = enclave.sandboxed.result().measures
        enclave.kill()
        await enclave.reap()
    finally:
        await launcher.stop()
    return measures
