"""The agent's side of the quoting process: it starts it, tells it what there is, and gives each enclave a line to it.

A quoting process that died is started anew for the next enclave; its log goes on where it was.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import structlog

from sealane.errors import HostError
from sealane.host.config import AttestationSettings
from sealane.paths import Paths, isolated_module
from sealane.quoting.expected import ExpectedFiles, check_files
from sealane.quoting.interface import (
    PACKET_MAX,
    Configure,
    Packet,
    Ready,
    Serve,
    Unready,
    encode_packet,
    parse_packet,
)
from sealane.quoting.roots import Place

_END_WAIT_S: Final = 5.0


def _system_root() -> str:
    return os.environ.get("SEALANE_SYSTEM_ROOT", "/")


def expected_files(settings: AttestationSettings) -> ExpectedFiles:
    """The files that say what this host expects of peers."""
    return ExpectedFiles(
        settings.reference_values, settings.reference_key, tuple(settings.collateral), tuple(settings.tpm_roots)
    )


def place_of_roots(settings: AttestationSettings) -> Place:
    """Where this host's roots of trust are."""
    return Place(settings.tcti, settings.simulated_root, Path(_system_root()))


def check_expected(paths: Paths, settings: AttestationSettings) -> None:
    """Raise what is wrong with one of these files; one that is missing is logged, and every peer is refused until it comes."""
    log = structlog.get_logger()
    for one in check_files(expected_files(settings), paths.state):
        if one.is_missing:
            log.error("a file of expectations is missing", setting=one.setting, path=one.path)
        elif one.problem is not None:
            raise one.problem


def incoming_binaries(commands: Iterable[Sequence[str] | None]) -> list[str]:
    """The programs that would receive a VM here, before it is known which one comes: of all launch commands."""
    found = {_program_of(command) for command in commands if command}
    return sorted(path for path in found if path)


def _program_of(command: Sequence[str]) -> str | None:
    """QEMU's own binary, also behind words that launch it (`nsenter … --`, `taskset -c 3`); else the first word."""
    behind = (shutil.which(word) for word in command if os.path.basename(word).startswith("qemu-"))
    return next((path for path in behind if path), None) or shutil.which(command[0])


def check_launched(pid: int, measured: Sequence[str]) -> None:
    """The QEMU that was launched is one of the binaries that the evidence covers, by what the process really runs.

    Raises HostError `quoting.qemu`. What runs in another process namespace (pid 0) is not known, and so not accepted.
    """
    running = f"/proc/{pid}/exe"
    for path in measured:
        with contextlib.suppress(OSError):
            if os.path.samefile(running, path):
                return
    name = "another program"
    with contextlib.suppress(OSError):
        name = os.readlink(running)
    raise HostError("quoting.qemu", f"{name} runs, and {', '.join(measured) or 'nothing'} was measured")


class QuotingService:
    """`start` it with the agent, `connect` each enclave, `stop` it at the end."""

    def __init__(self, paths: Paths, settings: AttestationSettings) -> None:
        self._paths, self._settings = paths, settings
        self._started_ns = time.time_ns()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self.root_of_trust = "not known yet"

    @property
    def pid(self) -> int | None:
        """The process, where there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process unless it is there; it measures meanwhile, and enclaves wait for it. Raises HostError."""
        if self._process is not None and self._process.poll() is None:
            return
        self._let_go()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                isolated_module("sealane.quoting", theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
            )
            ours.send(encode_packet(self._configuration()))
        except OSError as error:
            ours.close()
            raise HostError("quoting.failed", f"the quoting process could not be started: {error.strerror}") from error
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._on_readable)

    def connect(self, pid: int, binaries: Sequence[str]) -> socket.socket:
        """The end of a line for the enclave `pid`, whose evidence covers these binaries of QEMU. Raises HostError."""
        self.start()
        assert self._control is not None  # noqa: S101 - start made it
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # before anything is sent
        try:
            packet = encode_packet(Serve(pid=pid, binaries=list(binaries)))
            socket.send_fds(self._control, [packet], [theirs.fileno()])
        except OSError as error:
            mine.close()
            raise HostError("quoting.failed", f"the quoting process takes no calls: {error.strerror}") from error
        finally:
            theirs.close()
        return mine

    def connect_agent(self, binaries: Sequence[str] = ()) -> socket.socket:
        """A line for the agent itself: for what this host shows its CA, and for appraising hosts that ask one."""
        return self.connect(os.getpid(), binaries)

    async def stop(self) -> None:
        """End the process."""
        process = self._process
        self._let_go()
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, _END_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    def _configuration(self) -> Configure:
        settings = self._settings
        return Configure(
            drivers=list(settings.drivers),
            identity_key=str(self._paths.identity_key),
            started_ns=self._started_ns,
            state=str(self._paths.state),
            run=str(self._paths.run),
            root=_system_root(),
            **settings.model_dump(exclude={"drivers", "again_every_s", "tpm_roots"}),
        )

    def _on_readable(self) -> None:
        assert self._control is not None  # noqa: S101 - the reader is its
        try:
            data = self._control.recv(PACKET_MAX)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._heard(parse_packet(data))
            return
        process = self._process
        self._let_go()
        if process is not None:
            structlog.get_logger().warning("the quoting process ended", pid=process.pid, status=process.wait())

    def _heard(self, packet: Packet) -> None:
        log = structlog.get_logger()
        if isinstance(packet, Ready):
            self.root_of_trust = packet.root_of_trust
            log.info("roots of trust", words=packet.root_of_trust)
        elif isinstance(packet, Unready):
            self.root_of_trust = f"none: {packet.detail}"
            log.error("no root of trust", code=packet.code, detail=packet.detail)

    def _let_go(self) -> None:
        if self._control is not None:
            with contextlib.suppress(ValueError):
                asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
        self._process = self._control = None
