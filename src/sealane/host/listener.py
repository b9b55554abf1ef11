"""The one TCP port for peers: every connection says in 32 bytes where it belongs, and goes there.

The listener never reads beyond the preface, never ends TLS, and holds nothing that a stranger can make it hold: the table
of connections without a preface is bounded, its oldest entry goes when a new one comes, and so it is with the enclaves
whose peer has not proved itself.
"""

import asyncio
import functools
import itertools
import socket
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import structlog

from sealane.errors import HostError, PeerError, SealaneError
from sealane.host.config import Settings
from sealane.host.limits import TokenBuckets
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.dialling import give_up_when_unanswered, tune
from sealane.host.migration.reception import Reception
from sealane.limits import PENDING_CONNECTIONS_MAX, PREFACE_TIMEOUT_S, UNPROVEN_ENCLAVES_MAX
from sealane.session.preface import PREFACE_BYTES, ConnectionKind, Preface, parse_preface

# A migration, and a number of the reception's own: that of a postcopy may be met again while the first one is still there.
_Key = tuple[bytes, int]
# Takes a connection whose preface asked to pair, or to renew a certificate.
Taker = Callable[[socket.socket], None]
_BACKLOG: Final = 256
# After accept(2) failed for want of descriptors or memory.
_ACCEPT_PAUSE_S: Final = 0.1
# Receptions that are no jobs yet: strangers, those that are ending, and proven peers that have not said what they want.
_BEGINNING_MAX: Final = 2 * UNPROVEN_ENCLAVES_MAX


class PeerListener:
    """Accepts, reads prefaces, routes."""

    def __init__(
        self,
        context: MigrationContext,
        settings: Settings,
        on_pairing: Taker = socket.socket.close,
        on_renewal: Taker = socket.socket.close,
    ) -> None:
        self._context, self._settings = context, settings
        self._on_pairing, self._on_renewal = on_pairing, on_renewal
        self._log = structlog.get_logger().bind(part="listener")
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._pending: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._numbers = itertools.count()
        self._receptions: dict[_Key, Reception] = {}
        self._beginning: dict[_Key, asyncio.Task[asyncio.Task[None] | None]] = {}  # not jobs yet; the oldest first
        self._wishes = TokenBuckets(settings.limits.wishes_per_peer_per_minute, 60.0)

    @property
    def address(self) -> str | None:
        """Where it listens, `host:port`, once it does."""
        if self._socket is None:
            return None
        host, port = self._socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Open the port; raises `host.port`."""
        host, port = self._settings.listen, self._settings.port
        try:
            family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            dual = family == socket.AF_INET6 and host == "::"
            self._socket = socket.create_server(where[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
        except OSError as error:
            raise HostError("host.port", f"{host} port {port}: {error.strerror or error}") from error
        self._socket.setblocking(False)
        self._accepting = asyncio.create_task(self._accept_all(self._socket), name="listener")

    async def stop(self) -> None:
        """Close the port and what has not become a migration; migrations go on."""
        tasks = [task for task in (self._accepting, *self._pending, *self._beginning.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _accept_all(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                self._log.warning("accept failed", reason=error.strerror)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            task = asyncio.create_task(self._welcome(connection), name="preface")
            self._pending[task] = None
            task.add_done_callback(functools.partial(self._welcomed, connection))
            if len(self._pending) > PENDING_CONNECTIONS_MAX:
                oldest, _ = self._pending.popitem(last=False)
                oldest.cancel()
            await asyncio.sleep(0)  # a preface that came along is read before newer connections can push this one out

    async def _welcome(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            tune(connection, self._settings.congestion_control)
            preface = await _read_preface(connection)
        except (SealaneError, OSError, TimeoutError) as error:
            self._log.info("connection without a fitting preface", reason=str(error) or "too slow")
            connection.close()
        else:
            self._route(preface, connection)

    def _welcomed(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._pending.pop(task, None)
        if task.cancelled():  # perhaps before its first step
            connection.close()

    def _route(self, preface: Preface, connection: socket.socket) -> None:
        if preface.kind is ConnectionKind.LANE:
            for reception in self._receptions.values():
                if reception.accept_lane(preface.label, preface.lane, connection):
                    return
            connection.close()
        elif preface.kind is ConnectionKind.PAIRING:
            self._on_pairing(connection)
        elif preface.kind is ConnectionKind.RENEWAL:
            self._on_renewal(connection)
        elif any(id == preface.label and not each.may_rejoin for (id, _), each in self._receptions.items()):
            connection.close()
        else:
            give_up_when_unanswered(connection)
            self._receive(preface.label, connection)

    def _receive(self, migration_id: bytes, connection: socket.socket) -> None:
        if len(self._beginning) >= _BEGINNING_MAX:
            self._log.warning("too many receptions begin at once; one was turned away")
            connection.close()
            return
        admit = functools.partial(self._admit, migration_id)
        reception, own = Reception(self._context, migration_id.hex(), admit), (migration_id, next(self._numbers))
        self._receptions[own] = reception
        task = asyncio.create_task(self._serve(migration_id, reception, connection), name="reception")
        self._beginning[own] = task
        task.add_done_callback(functools.partial(self._begun, own, connection))
        strangers = [
            task
            for key, task in self._beginning.items()
            if not self._receptions[key].is_proven and not task.cancelling()
        ]
        if len(strangers) > UNPROVEN_ENCLAVES_MAX:
            strangers[0].cancel()

    def _admit(self, migration_id: bytes, fingerprint: str, name: str) -> None:
        """Raise `peer.rate` or `peer.busy` where this peer asks too often, or has as much under way as one may have.

        No peer takes all places, and what is refused here is not journalled: no peer fills the disk.
        """
        limits = self._settings.limits
        if not self._wishes.take(name):  # a fleet's host has a new certificate each day
            words = f"more than {limits.wishes_per_peer_per_minute} migrations were asked for in a minute"
            raise PeerError("peer.rate", words)
        most = limits.incoming_from(name)
        under_way = {id for (id, _), each in self._receptions.items() if each.peer_fingerprint == fingerprint}
        if len(under_way - {migration_id}) >= most:
            raise PeerError("peer.busy", f"this host is at its limit of {most} migrations from one peer")

    async def _serve(
        self, migration_id: bytes, reception: Reception, connection: socket.socket
    ) -> asyncio.Task[None] | None:
        structlog.contextvars.bind_contextvars(migration=migration_id.hex()[:8])
        try:
            job = await reception.meet(connection)
        except SealaneError as error:
            self._log.info("a migration was not received", code=error.code, reason=error.detail)
            return None
        return None if job is None else job.task

    def _begun(self, own: _Key, connection: socket.socket, task: asyncio.Task[asyncio.Task[None] | None]) -> None:
        """The reception became a job, which keeps its place in the table, or came to nothing."""
        self._beginning.pop(own, None)
        connection.close()  # the enclave has it, or a task that was cancelled before its first step
        job = None if task.cancelled() or task.exception() else task.result()
        if job is not None:
            for earlier in [key for key in self._receptions if key[0] == own[0] and key not in self._beginning]:
                if earlier != own:  # its lanes were cut, and the job has this one now
                    del self._receptions[earlier]
            job.add_done_callback(lambda _: self._receptions.pop(own, None))
            return
        self._receptions.pop(own, None)
        if not task.cancelled() and (error := task.exception()):
            self._log.error("unexpected error", exc_info=error)


async def _read_preface(connection: socket.socket) -> Preface:
    """Read 32 bytes and no more; what follows is for the enclave."""
    loop = asyncio.get_running_loop()
    data = b""
    async with asyncio.timeout(PREFACE_TIMEOUT_S):
        while len(data) < PREFACE_BYTES:
            piece = await loop.sock_recv(connection, PREFACE_BYTES - len(data))
            if not piece:
                raise OSError("closed before its preface was whole")
            data += piece
    return parse_preface(data)
