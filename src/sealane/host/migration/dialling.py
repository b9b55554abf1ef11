"""Sockets between hosts and to QEMU: dialled by the agent, handed to the enclave."""

import asyncio
import contextlib
import shutil
import socket
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from sealane.errors import HostError, PeerError
from sealane.hypervisor.unix import connect_unix
from sealane.limits import (
    LANE_RATE_MAX_BYTES_PER_S,
    LANE_WINDOW_MIN,
    RECORD_PAYLOAD_MAX,
    TCP_KEEPALIVE_IDLE_S,
    TCP_KEEPALIVE_INTERVAL_S,
    TCP_KEEPALIVE_PROBES,
    TCP_USER_TIMEOUT_MS,
)

_DIAL_TIMEOUT_S = 10.0
_DIRECTORIES = "m"
_TCP_INFO_BYTES = 104
_TCPI_RTT = 68
_WINDOW_MAX = (1 << 31) - 1


def tune(connection: socket.socket, congestion_control: str) -> None:
    """No delay for small records, a vanished peer is noticed (RFC 9293 3.8.4), little waits in buffers.

    What waits between the two QEMUs when the VM is paused is downtime, and a falsehood in QEMU's estimate of bandwidth.
    So the sender queues one record beyond what the line holds, and the receiver's window is what the line holds, at
    least LANE_WINDOW_MIN. A congestion control that this kernel does not have leaves the system's.
    """
    if congestion_control:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, RECORD_PAYLOAD_MAX)
    window = max(LANE_WINDOW_MIN, int(_round_trip_s(connection) * LANE_RATE_MAX_BYTES_PER_S))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, min(window, _WINDOW_MAX))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, TCP_KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, TCP_KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, TCP_KEEPALIVE_PROBES)


def give_up_when_unanswered(connection: socket.socket) -> None:
    """For a channel, whose reader always reads: bytes that stay unacknowledged mean that the peer is gone (RFC 5482).

    Not for a lane: its reader may rest for long, as QEMU behind it does, and the kernel would take that for death. A dead
    host shows on the channel; a lane that died alone stops all bytes, which the stall limit finds.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)


def _round_trip_s(connection: socket.socket) -> float:
    """What the kernel has measured during connection set-up (tcpi_rtt of struct tcp_info, in microseconds)."""
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return int.from_bytes(information[_TCPI_RTT : _TCPI_RTT + 4], sys.byteorder) / 1e6


async def dial_peer(address: str, port: int, congestion_control: str = "") -> socket.socket:
    """A TCP connection to a peer's agent; raises `peer.unreachable`."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT_S):
            found = await loop.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, where = found[0]
            connection = socket.socket(family, kind, protocol)
            try:
                connection.setblocking(False)
                await loop.sock_connect(connection, where)
            except BaseException:
                connection.close()
                raise
    except TimeoutError:
        raise PeerError("peer.unreachable", f"{address} port {port}: no answer") from None
    except OSError as error:
        raise PeerError("peer.unreachable", f"{address} port {port}: {error.strerror or error}") from error
    tune(connection, congestion_control)
    return connection


async def all_or_none(dialling: Sequence[Coroutine[Any, Any, socket.socket]]) -> list[socket.socket]:
    """All connections, dialled at once; where one fails, or the caller is cancelled, none is left open."""
    tasks = [asyncio.ensure_future(each) for each in dialling]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for made in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(made, socket.socket):
                made.close()
        raise


async def dial_vm(path: Path) -> socket.socket:
    """A connection to the unix socket on which a destination's QEMU listens; raises `migration.destination-died`."""
    try:
        connection = await connect_unix(str(path))
    except OSError as error:
        reason = error.strerror or "it takes no connection"
        raise HostError("migration.destination-died", f"QEMU does not listen: {reason}") from error
    # two records: QEMU reads 32 KiB at a time, and each time this buffer runs full costs a switch of tasks
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * RECORD_PAYLOAD_MAX)
    return connection


async def close_unused(path: Path) -> None:
    """Take the place of a connection that a source's QEMU was to make and did not need, and close it."""
    # where it was made, nobody listens any more
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, str(path))


def listen_for_vm(path: Path, backlog: int) -> socket.socket:
    """The unix socket that a source's QEMU will dial, for its user alone; raises `host.permission`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise HostError("host.permission", f"{path}: {error.strerror}") from error
    return listener


def remove_socket_directories(run: Path) -> None:
    """Remove what an agent that was killed has left; for the next one, before its first migration."""
    shutil.rmtree(run / _DIRECTORIES, ignore_errors=True)


class SocketDirectory:
    """A private directory for one migration's unix sockets, gone afterwards.

    Its name is this host's choice and new each time: a migration's id is the peer's choice, and two in one directory would lead
    one VM's lanes to the other's QEMU.
    """

    def __init__(self, run: Path) -> None:
        self._root = run / _DIRECTORIES

    def __enter__(self) -> Path:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path = Path(tempfile.mkdtemp(prefix="", dir=self._root))
        except OSError as error:
            raise HostError("host.permission", f"{self._root}: {error.strerror}") from error
        return self._path

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            for leftover in self._path.iterdir():
                leftover.unlink()
            self._path.rmdir()
