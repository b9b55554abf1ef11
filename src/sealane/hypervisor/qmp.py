"""QEMU over QMP, on QEMU's own client library (qemu.qmp).

QMP serves one client at a time: a second one connects and then waits for its greeting, which `connect` tells as
`vm.unreachable`. The library logs every message at debug level; here nothing of a message is ever logged, since
`object-add secret` and its like carry keys.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Final, Self, cast

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.message import Message

from sealane.errors import SealaneError, make_error
from sealane.hypervisor.driver import (
    INACTIVE_STATUSES,
    TERMINAL_STATUSES,
    Closed,
    MigrationParameters,
    MigrationStatus,
    QmpEvent,
    VmDescription,
    VmEvent,
)
from sealane.limits import QMP_TIMEOUT_S

# `max-bandwidth` is a size (uint64); QEMU computes with it in int64 (migration/migration.c, migration_rate_set).
BANDWIDTH_UNBOUNDED: Final = 2**63 - 1
# Events that a slow reader may leave waiting. A migration makes a dozen, a guest in a reset loop some per second.
EVENTS_WAITING_MAX: Final = 4096
QEMU_DEFAULT_DOWNTIME_LIMIT_MS: Final = 300
# How often to look where MIGRATION events are off (a migration that something else began).
BLIND_LOOK_INTERVAL_S: Final = 0.1
# A QEMU whose sockets were closed pauses its postcopy at once.
_PAUSES_BY_ITSELF_S: Final = 2.0

_ENDED: Final = {"completed": "completed already", "failed": "failed", "cancelled": "was cancelled"}

_SILENT: Final = logging.Logger("sealane.hypervisor.qmp.silent")
_SILENT.disabled = True

# QEMU's default: how far auto-converge slows a guest down at first; it goes on in steps of `cpu-throttle-increment`.
THROTTLE_INITIAL_PERCENT: Final = 20
# Capabilities that are an error where they are wanted and this QEMU has none of them.
_REFUSED_WITHOUT: Final = ("events", "return-path", "multifd", "auto-converge", "postcopy-ram", "postcopy-preempt")

# Parameters that an earlier migration, or a person, may have left; only those that this QEMU knows are sent.
_PARAMETER_DEFAULTS: Final[Mapping[str, object]] = {
    "multifd-compression": "none",
    "max-postcopy-bandwidth": 0,
    "avail-switchover-bandwidth": 0,
    "tls-creds": "",
    "tls-hostname": "",
    "tls-authz": "",
    "mode": "normal",
    "cpu-throttle-initial": THROTTLE_INITIAL_PERCENT,
    "cpu-throttle-increment": 10,
    "max-cpu-throttle": 99,
}


def _as_dict(value: object) -> dict[str, object]:
    return cast(dict[str, object], value) if isinstance(value, dict) else {}


def _as_int(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _as_dicts(value: object) -> list[dict[str, object]]:
    return [_as_dict(item) for item in value] if isinstance(value, list) else []


class _Client(QMPClient):
    """The library's client, silenced, that hands each event on as it comes."""

    def __init__(self, on_event: Callable[[Message], None]) -> None:
        super().__init__()
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


async def _open_socket(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, path)
    except BaseException:
        sock.close()
        raise
    return sock


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


class QmpMachine:
    """One QEMU over its QMP socket; a `VmDriver`. Use `async with QmpMachine.connect(path)`."""

    def __init__(self, path: str, timeout_s: float = QMP_TIMEOUT_S) -> None:
        self.path = path
        self.pid = 0
        self._timeout_s = timeout_s
        self._client = _Client(self._dispatch)
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._has_events = False
        self._closed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"QmpMachine({self.path!r}, pid={self.pid}, closed={self.is_closed})"

    # Connection

    @classmethod
    def connect(cls, path: str, timeout_s: float = QMP_TIMEOUT_S) -> Self:
        """A machine to be entered with `async with`; `timeout_s` bounds the connection and then every command."""
        return cls(path, timeout_s)

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(self._timeout_s):
                sock = await _open_socket(self.path)
                try:
                    self.pid = _peer_pid(sock)
                    await self._client.connect(sock)
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError:
            raise make_error("vm.unreachable", f"no greeting on {self.path} within {self._timeout_s:g} s") from None
        except (OSError, QMPError, EOFError) as error:
            raise make_error("vm.unreachable", f"{self.path}: {_reason(error)}") from error
        self._watcher = asyncio.create_task(self._watch(), name=f"qmp {self.path}")
        return self

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
        except (OSError, QMPError, EOFError) as error:
            detail = _reason(error)
        finally:
            self._closed.set()
            for stream in list(self._streams):
                stream.push(Closed(detail))

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
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._client.execute(command, arguments)
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

    def _dispatch(self, message: Message) -> None:
        stamp = _as_dict(message.get("timestamp"))
        event = QmpEvent(
            name=str(message["event"]),
            data=_as_dict(message.get("data")),
            timestamp_s=_as_int(stamp.get("seconds")) + _as_int(stamp.get("microseconds")) / 1e6,
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

    # The VM

    async def describe(self) -> VmDescription:
        """Who and what the VM is; about ten short commands."""
        version = _as_dict(_as_dict(await self.execute("query-version")).get("qemu"))
        memory = _as_dict(await self.execute("query-memory-size-summary"))
        machine = await self.execute("qom-get", {"path": "/machine", "property": "type"})
        return VmDescription(
            name=cast(str | None, _as_dict(await self.execute("query-name")).get("name")),
            uuid=str(_as_dict(await self.execute("query-uuid")).get("UUID")),
            qemu_version=(_as_int(version.get("major")), _as_int(version.get("minor")), _as_int(version.get("micro"))),
            machine_type=str(machine).removesuffix("-machine"),
            memory_bytes=_as_int(memory.get("base-memory")) + _as_int(memory.get("plugged-memory")),
            cpus=len(_as_dicts(await self.execute("query-cpus-fast"))),
            run_state=await self.run_state(),
            accelerator="kvm" if _as_dict(await self.execute("query-kvm")).get("enabled") else "tcg",
            capabilities=frozenset(await self._capabilities()),
            pid=self.pid,
            migration_status=(await self.migration_status()).status,
        )

    async def run_state(self) -> str:
        """QEMU's RunState: "running", "paused", "inmigrate", "finish-migrate", "postmigrate", …."""
        return str(_as_dict(await self.execute("query-status")).get("status"))

    async def resume(self) -> None:
        """Let the guest run (`cont`)."""
        await self.execute("cont")

    async def stop(self) -> None:
        """Pause the guest; while it is awaited (inmigrate): do not start it once it has arrived."""
        await self.execute("stop")

    async def quit(self) -> None:
        """End QEMU and wait until it has closed the connection."""
        try:
            await self.execute("quit")
        except SealaneError as error:
            if error.code != "vm.unreachable" or not self.is_closed:
                raise
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.closed()
        except TimeoutError:
            raise make_error("vm.unreachable", f"QEMU did not end within {self._timeout_s:g} s") from None

    # Migration

    async def _capabilities(self) -> dict[str, bool]:
        answer = _as_dicts(await self.execute("query-migrate-capabilities"))
        return {str(item["capability"]): bool(item["state"]) for item in answer}

    async def configure_migration(self, parameters: MigrationParameters, *, incoming: bool) -> None:
        """Set what the hand-over needs and put all else back to QEMU's defaults.

        `late-block-activate` keeps an incoming VM from locking its disks before it is resumed, so that the source can
        still take them back. An incoming VM is told to `stop`, which in state "inmigrate" means: do not start by
        yourself when all has arrived, whatever the command line says (monitor/qmp-cmds.c, qmp_stop).
        """
        known = await self._capabilities()
        wanted = {
            "events": True,
            "return-path": True,
            "validate-uuid": True,
            "pause-before-switchover": not incoming,
            "late-block-activate": incoming,
            "multifd": parameters.multifd_channels > 0,
            "auto-converge": parameters.throttle_max_percent is not None,
            "postcopy-ram": parameters.postcopy,
            "postcopy-preempt": parameters.postcopy and parameters.postcopy_preempt,
        }
        missing = sorted(name for name in _REFUSED_WITHOUT if wanted[name] and name not in known)
        if missing:
            raise make_error("check.capabilities", f"this QEMU has no {', '.join(missing)}")
        states = [{"capability": name, "state": wanted.get(name, False)} for name in sorted(known)]
        try:
            await self.execute("migrate-set-capabilities", {"capabilities": states})
        except SealaneError as error:
            if parameters.postcopy and error.code == "vm.qmp":  # a destination asks the kernel for userfaultfd here
                raise make_error("check.postcopy", error.detail) from error
            raise
        await self._set_parameters(parameters)
        if incoming:
            await self.stop()
        self._has_events = True

    async def _set_parameters(self, parameters: MigrationParameters) -> None:
        known = _as_dict(await self.execute("query-migrate-parameters"))
        values: dict[str, object] = {name: value for name, value in _PARAMETER_DEFAULTS.items() if name in known}
        values["max-bandwidth"] = parameters.max_bandwidth_bytes_per_s or BANDWIDTH_UNBOUNDED
        values["downtime-limit"] = parameters.downtime_limit_ms or QEMU_DEFAULT_DOWNTIME_LIMIT_MS
        if parameters.postcopy:  # pages that the guest waits for are bounded too; 0 is unbounded here
            values["max-postcopy-bandwidth"] = parameters.max_bandwidth_bytes_per_s
        if parameters.throttle_max_percent is not None:
            values["max-cpu-throttle"] = parameters.throttle_max_percent
            values["cpu-throttle-initial"] = min(THROTTLE_INITIAL_PERCENT, parameters.throttle_max_percent)
        if parameters.multifd_channels:
            values["multifd-channels"] = parameters.multifd_channels
        await self.execute("migrate-set-parameters", values)

    async def migrate(self, uri: str) -> None:
        """Start to send the VM; `wait_migration` tells how it goes on."""
        await self.execute("migrate", {"uri": uri})

    async def migrate_incoming(self, uri: str) -> None:
        """Listen on `uri`. A QEMU whose stream fails says why in its log and exits, also when no agent is left to end it."""
        await self.execute("migrate-incoming", {"uri": uri})

    async def migrate_continue(self) -> None:
        """Let a source that waits in "pre-switchover" send the rest."""
        await self.execute("migrate-continue", {"state": "pre-switchover"})

    # Postcopy

    async def start_postcopy(self) -> None:
        """Stop the VM and let QEMU switch to postcopy; it then waits in "pre-switchover" as at any other switch-over.

        The VM is stopped by us, and not by QEMU's switch: a VM that ran when a switch began is resumed by QEMU itself where
        the switch fails, also after the destination has all that it needs to run (migration/migration.c, postcopy_start and
        migration_iteration_finish). One that was paused stays paused.
        """
        await self.stop()
        await self.execute("migrate-start-postcopy")

    async def postcopy_channels(self) -> int:
        """How many channels a postcopy of this QEMU has, as it was configured."""
        return 2 if (await self._capabilities()).get("postcopy-preempt") else 1

    async def pause_postcopy(self) -> None:
        """Break the channels, where QEMU has not seen yet that they are broken, and wait for "postcopy-paused"."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PAUSES_BY_ITSELF_S):
                await self._wait_paused()
            return
        await self.execute("migrate-pause")
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._wait_paused()
        except TimeoutError:
            raise make_error("migration.qemu-failed", "QEMU does not pause its postcopy") from None

    async def _wait_paused(self) -> None:
        while (status := (await self.migration_status()).status) != "postcopy-paused":
            if status in INACTIVE_STATUSES:
                raise make_error("migration.qemu-failed", f"QEMU says of its postcopy: {status}")
            await asyncio.sleep(BLIND_LOOK_INTERVAL_S)

    async def recover_incoming(self, uri: str) -> None:
        """A destination in "postcopy-paused" listens on `uri` for the source's other half."""
        await self.execute("migrate-recover", {"uri": uri})

    async def recover_outgoing(self, uri: str) -> None:
        """A source in "postcopy-paused" goes on by `uri`; `wait_migration` tells how."""
        await self.execute("migrate", {"uri": uri, "resume": True})

    async def cancel_migration(self) -> None:
        """End an outgoing migration and wait until it has ended; QEMU then lets a guest that ran before run again."""
        status = (await self.migration_status()).status
        if status not in INACTIVE_STATUSES:
            await self.execute("migrate_cancel")
            status = (await self.wait_migration(TERMINAL_STATUSES, self._timeout_s)).status
        if status == "failed":
            await self._finish_failed()

    async def _finish_failed(self) -> None:
        """See a failed migration to its end, so that the guest can run again.

        A multifd channel that breaks while QEMU waits in "pre-switchover" makes the migration failed, and its thread
        waits on: the guest stays stopped for ever, and `cont` is refused ("Migration is not finalized yet"). The command
        that lets it go on asks only that it be told the present state (QEMU 10.0, migration/migration.c,
        qmp_migrate_continue and migration_maybe_pause). What is said too much is forgotten by the next migration.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while await self.run_state() == "finish-migrate":
                    await self.execute("migrate-continue", {"state": "failed"})
                    await asyncio.sleep(BLIND_LOOK_INTERVAL_S)
        except TimeoutError:
            raise make_error("migration.qemu-failed", "the failed migration does not end") from None

    async def migration_status(self) -> MigrationStatus:
        """How far the migration is; status "none" before the first one."""
        answer = _as_dict(await self.execute("query-migrate"))
        ram = _as_dict(answer.get("ram"))
        page_bytes = _as_int(ram.get("page-size")) or 4096
        has_rate = "mbps" in ram
        return MigrationStatus(
            status=str(answer.get("status", "none")),
            total_ms=_as_int(answer["total-time"]) if "total-time" in answer else None,
            downtime_ms=_as_int(answer["downtime"]) if "downtime" in answer else None,
            ram_total=_as_int(ram.get("total")),
            ram_remaining=_as_int(ram.get("remaining")),
            ram_transferred=_as_int(ram.get("transferred")),
            iteration=_as_int(ram.get("dirty-sync-count")),
            dirty_rate_bytes_per_s=float(_as_int(ram.get("dirty-pages-rate")) * page_bytes) if has_rate else None,
            rate_bytes_per_s=cast(float, ram["mbps"]) * 1e6 / 8 if has_rate else None,
            throttle_percent=_as_int(answer["cpu-throttle-percentage"])
            if "cpu-throttle-percentage" in answer
            else None,
            postcopy_requests=_as_int(ram["postcopy-requests"]) if "postcopy-requests" in ram else None,
            error=cast(str | None, answer.get("error-desc")),
        )

    async def wait_migration(self, statuses: Collection[str], timeout_s: float | None = None) -> MigrationStatus:
        """Wait until the migration is (or passes through) one of `statuses`.

        Raises `migration.qemu-failed` when it ends in another way or `timeout_s` is over, `vm.unreachable` when QEMU
        goes away. Driven by MIGRATION events; looks ten times a second only where a QEMU has them switched off.
        """
        stream = self.events()
        if not self._has_events:
            self._has_events = (await self._capabilities()).get("events", False)
        seen = ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    look = await self.migration_status()
                    if look.status in statuses:
                        return look
                    if look.status in TERMINAL_STATUSES:
                        raise make_error("migration.qemu-failed", look.error or f"the migration {_ENDED[look.status]}")
                    if seen in statuses:
                        return replace(look, status=seen)
                    seen = await self._next_migration_status(stream)
        except TimeoutError:
            raise make_error(
                "migration.qemu-failed", f"not {' or '.join(sorted(statuses))} in {timeout_s:g} s"
            ) from None

    async def _next_migration_status(self, stream: EventStream) -> str:
        try:
            async with asyncio.timeout(None if self._has_events else BLIND_LOOK_INTERVAL_S):
                async for event in stream:
                    if isinstance(event, QmpEvent) and event.name == "MIGRATION":
                        return str(event.data.get("status"))
        except TimeoutError:
            return ""
        raise make_error("vm.unreachable", "QEMU ended during the migration")
