"""One connection to a QEMU's QMP socket: commands, events, and its end, on QEMU's own client library (qemu.qmp).

QMP serves one client at a time: a second one connects and then waits for its greeting, which `connect` tells as
`vm.unreachable`. The library logs every message at debug level; here nothing of a message is ever logged, since
`object-add secret` and its like carry keys.
"""

import asyncio
import errno
import itertools
import logging
import os
import socket
import struct
import weakref
from collections.abc import Callable, Mapping
from typing import Final, Self, TypeGuard, cast

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.message import Message

from sealane.errors import make_error
from sealane.hypervisor.driver import Closed, QmpEvent, VmEvent
from sealane.hypervisor.lent import LENT, borrow
from sealane.hypervisor.process import LaunchedMachine, start_time_ticks
from sealane.hypervisor.unix import connect_unix
from sealane.limits import QMP_TIMEOUT_S

# Events that a slow reader may leave waiting. A migration makes a dozen, a guest in a reset loop some per second.
EVENTS_WAITING_MAX: Final = 4096
# What an event says beside its name is left out where it is longer: those that Sealane looks at have some 200 bytes.
EVENT_BYTES_MAX: Final = 1024
_NUMBER_MAX: Final = 1 << 64

_CLIENTS: Final = itertools.count()
_SILENT: Final = logging.Logger("sealane.hypervisor.qmp.silent")
_SILENT.disabled = True


def as_dict(value: object) -> dict[str, object]:
    """QEMU's value where it is an object, or an empty one."""
    return cast(dict[str, object], value) if isinstance(value, dict) else {}


def _dicts(value: object) -> list[dict[str, object]]:
    return [as_dict(each) for each in value] if isinstance(value, list) else []


def as_int(value: object) -> int:
    """QEMU's value where it is a number of 64 bits, as all of its are, or 0."""
    return int(as_float(value)) if isinstance(value, float) else int(value) if _fits(value) else 0


def as_float(value: object) -> float:
    """QEMU's value where it is a number, and no NaN or infinity, or 0."""
    return float(value) if _fits(value) else 0.0


def _fits(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and -_NUMBER_MAX <= value <= _NUMBER_MAX


class _Client(QMPClient):
    """The library's client, silenced, that hands each event on as it comes."""

    def __init__(self, on_event: Callable[[Message], None]) -> None:
        # each command's id begins with this name: an answer to an earlier client has another
        super().__init__(f"{os.getpid()}-{next(_CLIENTS)}")
        self.logger = _SILENT
        self._on_event = on_event

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    async def _on_message(self, msg: Message) -> None:
        if "event" in msg:
            self._on_event(msg)
        else:
            await super()._on_message(msg)


def _peer_pid(sock: socket.socket) -> int:
    """The process that listens on the other end (unix(7), SO_PEERCRED); 0 if it lives in another pid namespace."""
    pid, _uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


class EventStream:
    """An asynchronous iterator over one machine's events. When nobody reads, the oldest ones are dropped."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[VmEvent] = asyncio.Queue(EVENTS_WAITING_MAX)
        self._ended = False

    def push(self, event: VmEvent) -> None:
        """Add an event; never blocks."""
        if self._waiting.full():
            self._waiting.get_nowait()
        self._waiting.put_nowait(event)

    def taken(self) -> list[VmEvent]:
        """What has arrived so far, without waiting."""
        arrived = []
        while not self._waiting.empty():
            arrived.append(self._waiting.get_nowait())
        self._ended = self._ended or any(isinstance(event, Closed) for event in arrived)
        return arrived

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> VmEvent:
        if self._ended:
            raise StopAsyncIteration
        event = await self._waiting.get()
        self._ended = isinstance(event, Closed)
        return event


def _reason(error: BaseException) -> str:
    """One line for a failure of the connection, never with a message's content."""
    cause = error.exc if isinstance(error, ConnectError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    if isinstance(cause, EOFError):
        return "QEMU closed the connection"
    return type(cause).__name__


class QmpConnection:
    """A QEMU's QMP socket; use `async with` on what `connect` gives."""

    def __init__(self, path: str, timeout_s: float = QMP_TIMEOUT_S) -> None:
        self.path = path
        self._holder: LaunchedMachine | None = None
        self.pid = 0
        self._timeout_s = timeout_s
        self._client = _Client(self._dispatch)
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._closed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, pid={self.pid}, closed={self.is_closed})"

    # Connection

    @classmethod
    def connect(cls, path: str, timeout_s: float = QMP_TIMEOUT_S) -> Self:
        """A machine to be entered with `async with`; `timeout_s` bounds the connection and then every command."""
        return cls(path, timeout_s)

    @classmethod
    def take_up(cls, path: str, holder: LaunchedMachine | None, timeout_s: float = QMP_TIMEOUT_S) -> Self:
        """As `connect`, to the QEMU that an earlier agent launched, where it launched one: no other process is taken for it.
        Where that agent lent it a connection, it is over that one (`lent.py`)."""
        machine = cls(path, timeout_s)
        machine._holder = holder
        return machine

    @classmethod
    def gone(cls, path: str) -> Self:
        """A machine whose QEMU is gone: closed from the beginning, and every command is `vm.unreachable`."""
        machine = cls(path)
        machine._closed.set()
        return machine

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(self._timeout_s):
                kept = borrow(self.path, self._holder) if self._holder else None
                sock = await connect_unix(self.path) if kept is None else kept
                self.pid = _peer_pid(sock)
                if kept is not None:
                    self._client.await_greeting = self._client.negotiate = False
                try:
                    self._check_holder()
                    await self._client.connect(sock)
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError:
            raise make_error("vm.unreachable", f"no greeting on {self.path} within {self._timeout_s:g} s") from None
        except (OSError, QMPError, EOFError) as error:
            raise make_error("vm.unreachable", f"{self.path}: {_reason(error)}") from error
        self._socket = sock
        self._watcher = asyncio.create_task(self._watch(), name=f"qmp {self.path}")
        return self

    def _check_holder(self) -> None:
        """Raise OSError where another process serves the socket than the one that was launched for the VM."""
        holder = self._holder
        if holder is None or self.pid == 0:  # a process of another pid namespace, whose pid nobody can tell
            return
        if start_time_ticks(holder.pid) != holder.start_time_ticks:
            raise ProcessLookupError(errno.ESRCH, f"process {holder.pid}, which was launched for the VM, is gone")
        if self.pid != holder.pid:
            raise PermissionError(
                errno.EPERM, f"process {self.pid} serves it, and {holder.pid} was launched for the VM"
            )

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; the VM is left as it is."""
        if self._watcher is None:
            return
        if self._client.runstate is Runstate.RUNNING:  # else it is tidying up already, and must not be disturbed
            self._watcher.cancel()
        await asyncio.wait([self._watcher])
        if not self.is_closed:  # cancelled before its first step
            await self._disconnect()

    async def _watch(self) -> None:
        """Notice that QEMU closed the socket, tidy up behind the library, and tell everyone."""
        try:
            while self._client.runstate is Runstate.RUNNING:
                await self._client.runstate_changed()
        finally:
            await self._disconnect()

    async def _disconnect(self) -> None:
        detail = ""
        try:
            await self._client.disconnect()
        except Exception as error:  # also what the library makes of a line that is no QMP
            detail = _reason(error)
        finally:
            self._closed.set()
            for stream in list(self._streams):
                stream.push(Closed(detail))

    @property
    def is_open(self) -> bool:
        """Whether commands can be given; False as soon as the connection begins to end."""
        return self._client.runstate is Runstate.RUNNING

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended."""
        return self._closed.is_set()

    async def closed(self) -> None:
        """Return once QEMU, or `aclose`, has ended the connection."""
        await self._closed.wait()

    # Commands and events

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """One QMP command. Raises `vm.qmp` where QEMU refuses, `vm.unreachable` where it is gone or hangs."""
        return await self._execute(command, arguments, out_of_band=False)

    async def execute_out_of_band(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """As `execute`, for the few commands that QEMU does beside whatever its main thread does, or waits for."""
        return await self._execute(command, arguments, out_of_band=True)

    async def _execute(self, command: str, arguments: Mapping[str, object] | None, *, out_of_band: bool) -> object:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._client.execute(command, arguments, oob=out_of_band)
        except TimeoutError:
            raise make_error("vm.unreachable", f"no answer to {command} within {self._timeout_s:g} s") from None
        except ExecuteError as error:  # it carries the message that was sent: never chain it
            raise make_error("vm.qmp", f"{command}: {error.error.error.desc}") from None
        except (ExecInterruptedError, OSError, EOFError):
            raise make_error("vm.unreachable", f"QEMU closed the connection during {command}") from None
        except QMPError as error:
            if self._client.runstate is not Runstate.RUNNING:
                raise make_error("vm.unreachable", f"not connected: {command}") from None
            raise make_error("vm.qmp", f"{command}: {type(error).__name__}") from None

    async def lend(self) -> None:
        """Have QEMU keep this connection open too, for `take_up` by the next agent, until `end_loan`; raises as `execute` does."""
        assert self._socket is not None  # noqa: S101 - it is connected
        try:
            self._client.send_fd_scm(self._socket.fileno())
        except (OSError, QMPError) as error:
            raise make_error("vm.unreachable", f"a descriptor could not be given to QEMU: {_reason(error)}") from error
        await self.execute("add-fd", {"opaque": LENT})

    async def end_loan(self) -> None:
        """QEMU closes what it keeps of this connection; nothing to do where it keeps nothing. Raises as `execute` does.

        While the VM runs: of a VM that is paused, QEMU 7.2 closes it later (monitor/misc.c, monitor_fdset_cleanup).
        """
        for each in _dicts(await self.execute("query-fdsets")):
            if any(fd.get("opaque") == LENT for fd in _dicts(each.get("fds"))):
                await self.execute("remove-fd", {"fdset-id": each["fdset-id"]})

    def _dispatch(self, message: Message) -> None:
        stamp = as_dict(message.get("timestamp"))
        event = QmpEvent(
            name=str(message["event"])[:EVENT_BYTES_MAX],
            data=as_dict(message.get("data")) if len(bytes(message)) <= EVENT_BYTES_MAX else {},
            timestamp_s=as_int(stamp.get("seconds")) + as_int(stamp.get("microseconds")) / 1e6,
        )
        for stream in list(self._streams):
            stream.push(event)

    def events(self) -> EventStream:
        """Events from this call on, to be read with `async for`; the last one is `Closed`."""
        stream = EventStream()
        if self.is_closed:
            stream.push(Closed())
        else:
            self._streams.add(stream)
        return stream
