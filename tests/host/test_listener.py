"""The one port, on loopback: garbage, drips and crowds on it; every preface goes where it belongs; nothing is left."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
from structlog.testing import capture_logs

from sealane.errors import HostError, PeerError
from sealane.host import listener as module
from sealane.host.config import Settings
from sealane.host.listener import PeerListener
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.enclave_launcher import EnclaveLauncher
from sealane.host.models import Peer
from sealane.limits import (
    LANES_MAX,
    MIGRATIONS_PER_PEER_MAX,
    PENDING_CONNECTIONS_MAX,
    TCP_USER_TIMEOUT_MS,
    UNPROVEN_ENCLAVES_MAX,
    WISHES_PER_PEER_PER_MINUTE,
)
from sealane.session.preface import ConnectionKind, Preface, encode_preface
from tests.enclave.quoting import quoting_line
from tests.enclave.rig import open_descriptors
from tests.session.rig import DESTINATION, SOURCE

PATIENCE_S = 20.0
T = TypeVar("T")


def channel(number: int) -> bytes:
    return encode_preface(Preface(ConnectionKind.CHANNEL, number.to_bytes(16, "big")))


def token(number: int, index: int = 0) -> bytes:
    return b"token of" + number.to_bytes(4, "big") + index.to_bytes(4, "big")


def lane(number: int, index: int = 0, *, shown: bytes | None = None) -> bytes:
    return encode_preface(Preface(ConnectionKind.LANE, shown or token(number, index), index))


@dataclass
class StandIn:
    """A reception without an enclave: it holds what it is given, and becomes a job when the test says so."""

    context: Any
    migration_id: str
    all: "list[StandIn]"
    admit: Callable[[str, str], None]
    peer_fingerprint: str | None = None
    may_rejoin: bool = False
    awaited: dict[bytes, int] = field(default_factory=dict)
    connection: socket.socket | None = None
    lanes: dict[int, socket.socket] = field(default_factory=dict)
    outcome: "asyncio.Future[asyncio.Task[None]]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def is_proven(self) -> bool:
        return self.peer_fingerprint is not None

    def __post_init__(self) -> None:
        self.all.append(self)

    async def meet(self, connection: socket.socket) -> Any:
        self.connection = connection
        try:
            return SimpleNamespace(task=await self.outcome)
        finally:
            connection.close()

    def accept_lane(self, token: bytes, index: int, connection: socket.socket) -> bool:
        if self.awaited.get(token) != index:
            return False
        del self.awaited[token]
        self.lanes[index] = connection
        return True


@dataclass
class Port:
    """A listener, what it received, and the test's connections to it."""

    listener: PeerListener
    receptions: list[StandIn]
    clients: list[socket.socket] = field(default_factory=list)

    async def connect(self, data: bytes = b"") -> socket.socket:
        host, _, port = (self.listener.address or "").rpartition(":")
        client = socket.socket()
        client.setblocking(False)
        self.clients.append(client)
        await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
        if data:
            await asyncio.get_running_loop().sock_sendall(client, data)
        return client

    async def reception(self, number: int) -> StandIn:
        def found() -> StandIn | None:
            return next(
                (each for each in self.receptions if each.migration_id == f"{number:032x}" and each.connection), None
            )

        return await eventually(found)


async def eventually(look: Callable[[], T | None]) -> T:
    """What `look` gives once it is true; the loop runs meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := look()):
            await asyncio.sleep(0)
        return found


async def is_closed(client: socket.socket) -> bool:
    """Wait until the listener closes this connection; it never says a word."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await asyncio.get_running_loop().sock_recv(client, 1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Port]:
    receptions: list[StandIn] = []
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(module, "Reception", lambda context, id, admit: StandIn(context, id, receptions, admit))
        made = Port(PeerListener(cast(MigrationContext, None), Settings(listen="127.0.0.1", port=0)), receptions)
        await made.listener.start()
        yield made
        await made.listener.stop()
    for each in [*made.clients, *(each for reception in receptions for each in reception.lanes.values())]:
        each.close()
    assert made.listener.address is None
    assert not open_descriptors() - before


# ---- prefaces


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + b"x" * 20, bytes(32), b"sealane\x02" + bytes(24), b"sealane\x01\x03" + bytes(23),
     encode_preface(Preface(ConnectionKind.LANE, bytes(16), LANES_MAX))],
    ids=["HTTP", "zeros", "another version", "another kind", "lane too high"],
)  # fmt: skip
async def test_garbage_is_closed_without_a_word(port: Port, garbage: bytes) -> None:
    assert await is_closed(await port.connect(garbage))
    assert port.receptions == []


async def test_a_connection_that_ends_too_early(port: Port) -> None:
    client = await port.connect(channel(1)[:31])
    client.shutdown(socket.SHUT_WR)
    assert await is_closed(client)
    assert port.receptions == []


async def test_a_preface_that_drips_forever_runs_out_of_time(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts from the connection, not from the last byte."""
    monkeypatch.setattr(module, "PREFACE_TIMEOUT_S", 0.2)
    client = await port.connect()
    sent = 0
    closing = asyncio.create_task(is_closed(client))
    for byte in channel(1)[:31]:
        if closing.done():
            break
        try:
            await asyncio.get_running_loop().sock_sendall(client, bytes([byte]))
        except OSError:
            break
        sent += 1
        await asyncio.wait({closing}, timeout=0.02)
    assert await closing
    assert 0 < sent < 31
    assert port.receptions == []


async def test_a_whole_preface_byte_by_byte(port: Port) -> None:
    client = await port.connect()
    for byte in channel(7):
        await asyncio.get_running_loop().sock_sendall(client, bytes([byte]))
        await asyncio.sleep(0)
    assert (await port.reception(7)).connection is not None


async def test_not_a_byte_beyond_the_preface_is_read(port: Port) -> None:
    await port.connect(channel(1) + b"what follows is TLS")
    connection = (await port.reception(1)).connection
    assert connection is not None
    assert await asyncio.get_running_loop().sock_recv(connection, 100) == b"what follows is TLS"
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == TCP_USER_TIMEOUT_MS


# ---- crowds


async def test_a_real_preface_gets_through_a_thousand_idle_connections(port: Port) -> None:
    for number in range(1000):
        await port.connect()
        if number == 500:
            await port.connect(channel(1))
    await port.connect(channel(2))
    await port.reception(1)
    await port.reception(2)
    assert len(port.listener._pending) <= PENDING_CONNECTIONS_MAX
    assert await is_closed(port.clients[0])  # the oldest went first


async def test_a_preface_that_waits_in_the_backlog_is_not_pushed_out_by_what_comes_after_it(port: Port) -> None:
    """All of these connect before the listener accepts one: the kernel holds them with what they have sent."""
    host, _, number = (port.listener.address or "").rpartition(":")

    def crowd() -> None:
        for index in range(PENDING_CONNECTIONS_MAX + 50):
            client = socket.create_connection((host, int(number)))
            client.setblocking(False)
            port.clients.append(client)
            if index == 0:
                client.send(channel(1))

    crowd()  # without giving the loop a turn
    assert (await port.reception(1)).connection is not None


async def test_strangers_are_bounded_and_the_oldest_goes(port: Port) -> None:
    count = UNPROVEN_ENCLAVES_MAX + 3
    for number in range(count):
        await port.connect(channel(number))
        await port.reception(number)
    for client in port.clients[:3]:
        assert await is_closed(client)
    held = [each for each in port.receptions if each.connection is not None and each.connection.fileno() >= 0]
    assert [each.migration_id for each in held] == [f"{number:032x}" for number in range(3, count)]


async def test_a_burst_of_strangers_is_bounded_too(port: Port) -> None:
    most = 0
    for number in range(200):
        await port.connect(channel(number))
        most = max(most, sum(each.connection is not None and each.connection.fileno() >= 0 for each in port.receptions))
    await port.reception(199)
    assert most <= 2 * UNPROVEN_ENCLAVES_MAX
    assert len(port.listener._receptions) <= 2 * UNPROVEN_ENCLAVES_MAX


async def test_proven_peers_are_not_pushed_out_by_strangers(port: Port) -> None:
    await port.connect(channel(1))
    (await port.reception(1)).peer_fingerprint = "SHA256:1"
    for number in range(2, 2 * UNPROVEN_ENCLAVES_MAX):
        await port.connect(channel(number))
        await port.reception(number)
    assert await is_closed(port.clients[1])
    kept = (await port.reception(1)).connection
    assert kept is not None
    assert kept.fileno() >= 0


async def test_one_peer_does_not_ask_without_end(port: Port) -> None:
    await port.connect(channel(1))
    reception = await port.reception(1)
    for _ in range(WISHES_PER_PEER_PER_MINUTE):
        reception.admit("SHA256:1", "host-b")
    with pytest.raises(PeerError, match=r"peer\.rate"):
        reception.admit("SHA256:1", "host-b")
    reception.admit("SHA256:2", "host-c")


async def test_one_peer_does_not_take_all_places(port: Port) -> None:
    for number in range(MIGRATIONS_PER_PEER_MAX + 1):
        await port.connect(channel(number))
        reception = await port.reception(number)
        if number < MIGRATIONS_PER_PEER_MAX:
            reception.admit("SHA256:1", "host-b")
            reception.peer_fingerprint = "SHA256:1"
    with pytest.raises(PeerError, match=r"peer\.busy"):
        reception.admit("SHA256:1", "host-b")
    reception.admit("SHA256:2", "host-c")


# ---- routes


async def test_lanes_go_to_their_migration_each_once(port: Port) -> None:
    for unexpected in (lane(1), lane(2, 5)):
        assert await is_closed(await port.connect(unexpected))  # nobody knows that migration
    await port.connect(channel(1))
    reception = await port.reception(1)
    assert await is_closed(await port.connect(lane(1)))  # no lanes awaited yet
    await port.connect(channel(2))
    assert (await port.reception(2)).connection is not None
    reception.awaited = {token(1, 0): 0, token(1, 1): 1}
    by_id = lane(1, shown=(1).to_bytes(16, "big"))  # the id, which a stranger reads in the channel's preface
    for guessed in (by_id, lane(1, shown=bytes(16)), lane(1, 1, shown=token(1, 0))):
        assert await is_closed(await port.connect(guessed))
    for index in (1, 0):
        await port.connect(lane(1, index))
        await eventually(partial(reception.lanes.get, index))
        assert not reception.lanes[index].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)  # a lane may rest
    for again in (lane(1, 0), lane(1, 2), lane(2, 0)):
        assert await is_closed(await port.connect(again))


async def test_a_second_channel_for_a_migration_is_closed_and_the_first_one_stays(port: Port) -> None:
    await port.connect(channel(1))
    reception = await port.reception(1)
    assert await is_closed(await port.connect(channel(1)))
    assert port.receptions == [reception]
    assert reception.connection is not None
    assert reception.connection.fileno() >= 0


async def test_a_migration_keeps_its_place_until_its_job_is_over(port: Port) -> None:
    await port.connect(channel(1))
    reception = await port.reception(1)
    over = asyncio.Event()

    async def job() -> None:
        await over.wait()

    task = asyncio.create_task(job())
    reception.outcome.set_result(task)
    await eventually(lambda: not port.listener._beginning)
    assert await is_closed(await port.connect(channel(1)))
    over.set()
    await task
    await port.connect(channel(1))
    await eventually(lambda: len(port.receptions) == 2)


async def in_postcopy(port: Port, number: int) -> tuple[StandIn, "asyncio.Task[Any]", asyncio.Event]:
    """A migration that may be met again, its job, and what ends that."""
    await port.connect(channel(number))
    reception, over = await port.reception(number), asyncio.Event()
    reception.peer_fingerprint, reception.may_rejoin = "SHA256:1", True
    task = asyncio.create_task(over.wait())
    reception.outcome.set_result(cast("asyncio.Task[None]", task))
    await eventually(lambda: reception.connection is not None and reception.connection.fileno() < 0)
    return reception, task, over


@pytest.fixture
def all_may_rejoin(port: Port) -> Iterator[None]:
    """Every further reception is asked about the same job, and says the same."""
    make = vars(module)["Reception"]

    def made(*arguments: Any) -> Any:
        reception = make(*arguments)
        cast(StandIn, reception).may_rejoin = True
        return reception

    with pytest.MonkeyPatch.context() as patch:  # undone before the port's own
        patch.setattr(module, "Reception", made)
        yield


@pytest.mark.usefixtures("all_may_rejoin")
async def test_strangers_who_name_a_postcopy_are_bounded_too(port: Port) -> None:
    """Its id is read in the channel's preface."""
    _, task, over = await in_postcopy(port, 1)
    for _ in range(4 * UNPROVEN_ENCLAVES_MAX):
        await port.connect(channel(1))
        await eventually(lambda: not port.listener._pending)
        held = [each for each in port.receptions if each.connection is not None and each.connection.fileno() >= 0]
        assert len(held) <= 2 * UNPROVEN_ENCLAVES_MAX
    over.set()
    await task


@pytest.mark.usefixtures("all_may_rejoin")
async def test_a_stranger_who_names_a_postcopy_does_not_take_its_sources_place(port: Port) -> None:
    _, task, over = await in_postcopy(port, 1)
    await port.connect(channel(1))
    await eventually(lambda: len(port.receptions) == 2 and port.receptions[1].connection)
    await port.connect(channel(1))
    await eventually(lambda: len(port.receptions) == 3 and port.receptions[2].connection)
    stranger, source = port.receptions[1:]
    source.awaited = {token(1): 0}
    stranger.outcome.set_exception(PeerError("peer.unknown"))
    await eventually(lambda: len(port.listener._beginning) == 1)
    await port.connect(lane(1))
    await eventually(lambda: source.lanes.get(0))
    source.outcome.set_result(cast("asyncio.Task[None]", task))
    await eventually(lambda: not port.listener._beginning)
    assert [cast(Any, each) for each in port.listener._receptions.values()] == [source], (
        "the first one's lanes were cut"
    )
    over.set()
    await task
    await eventually(lambda: not port.listener._receptions)


@pytest.mark.usefixtures("all_may_rejoin")
async def test_a_postcopy_that_is_joined_again_takes_one_place(port: Port) -> None:
    for number in range(MIGRATIONS_PER_PEER_MAX - 1):
        await port.connect(channel(100 + number))
        (await port.reception(100 + number)).peer_fingerprint = "SHA256:1"
    _, task, over = await in_postcopy(port, 1)
    await port.connect(channel(1))
    await eventually(lambda: port.receptions[-1].migration_id == f"{1:032x}" and port.receptions[-1].connection)
    joining = port.receptions[-1]
    joining.admit("SHA256:1", "host-b")  # raises nothing: its migration has a place already
    joining.peer_fingerprint = "SHA256:1"
    await port.connect(channel(2))
    with pytest.raises(PeerError, match=r"peer\.busy"):  # its two receptions count for one, and fill the last place
        (await port.reception(2)).admit("SHA256:1", "host-b")
    assert len({id for id, _ in port.listener._receptions}) == MIGRATIONS_PER_PEER_MAX + 1
    over.set()
    await task


@pytest.mark.parametrize("error", [PeerError("peer.unknown"), RuntimeError("a bug")])
async def test_a_reception_that_fails_makes_room(port: Port, error: Exception) -> None:
    client = await port.connect(channel(1))
    (await port.reception(1)).outcome.set_exception(error)
    assert await is_closed(client)
    await eventually(lambda: not port.listener._beginning and not port.listener._receptions)


# ---- the port itself


async def test_a_port_that_is_taken(port: Port) -> None:
    number = int((port.listener.address or "").rpartition(":")[2])
    other = PeerListener(cast(MigrationContext, None), Settings(listen="127.0.0.1", port=number))
    with pytest.raises(HostError, match=rf"127\.0\.0\.1 port {number}: .*host\.port"):
        await other.start()
    await other.stop()


async def test_both_families_by_default() -> None:
    before = open_descriptors()
    listener = PeerListener(cast(MigrationContext, None), Settings(port=0))
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    await listener.start()
    assert listener.address is not None
    host, _, number = listener.address.rpartition(":")
    assert host == "[::]"
    for address in ("127.0.0.1", "::1"):
        with socket.create_connection((address, int(number))):
            pass
    await listener.stop()
    assert not open_descriptors() - before


async def test_it_goes_on_after_accept_failed(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, failures = asyncio.get_running_loop(), []
    accept = loop.sock_accept

    async def exhausted(_: socket.socket) -> Any:
        monkeypatch.setattr(loop, "sock_accept", accept, raising=False)
        failures.append(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        raise failures[-1]

    await port.connect(channel(1))
    await port.reception(1)  # by now the listener waits in the accept that is there
    monkeypatch.setattr(module, "_ACCEPT_PAUSE_S", 0.0)
    monkeypatch.setattr(loop, "sock_accept", exhausted, raising=False)
    with capture_logs() as logs:
        await port.connect(channel(2))  # what that accept waited for
        assert (await port.reception(2)).connection is not None
        await eventually(lambda: failures)
        await port.connect(channel(3))
        assert (await port.reception(3)).connection is not None
    assert len(failures) == 1
    told = [each["reason"] for each in logs if each["event"] == "accept failed"]
    assert told == ["Too many open files"]


# ---- with real enclaves


async def test_real_enclaves_of_strangers_are_bounded_and_all_gone_afterwards() -> None:
    before = open_descriptors()
    launcher = EnclaveLauncher()
    peers = SimpleNamespace(list=lambda: [Peer(name="source", fingerprint=SOURCE.fingerprint)])
    facts = SimpleNamespace(
        identity=DESTINATION,
        peers=peers,
        launcher=launcher,
        settings=Settings(),
        registry=SimpleNamespace(definitions=dict),
        quoting=SimpleNamespace(connect=lambda pid, binaries: quoting_line(DESTINATION)[0]),
        membership=SimpleNamespace(introduction=dict),
    )
    context = cast(MigrationContext, facts)
    port = Port(PeerListener(context, Settings(listen="127.0.0.1", port=0)), [])
    await port.listener.start()
    most = 0
    for number in range(3 * UNPROVEN_ENCLAVES_MAX):
        await port.connect(channel(number))
        most = max(most, len(enclaves(launcher)))
        await asyncio.sleep(0)
    await eventually(lambda: len(enclaves(launcher)) == len(port.listener._beginning) <= 2 * UNPROVEN_ENCLAVES_MAX)
    most = max(most, len(enclaves(launcher)))
    assert 0 < most <= 2 * UNPROVEN_ENCLAVES_MAX
    assert await is_closed(port.clients[0])
    await port.listener.stop()
    await eventually(lambda: not enclaves(launcher))  # those that were being forked are ended as they come
    await launcher.stop()
    for client in port.clients:
        client.close()
    assert not open_descriptors() - before


def enclaves(launcher: EnclaveLauncher) -> list[int]:
    """Children of this process that are enclaves."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    if int(child) != launcher.pid and Path("/proc", child, "comm").read_text().startswith("sealane-"):
                        found.append(int(child))
    return found
