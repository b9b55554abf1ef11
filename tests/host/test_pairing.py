"""The desk: tries, time, room, one pairing for one code; over real connections, with an injected clock."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sealane.crypto.identity import Identity, create_identity
from sealane.errors import SealaneError
from sealane.host.config import Settings
from sealane.host.models import Peer
from sealane.host.pairing import PairingDesk
from sealane.host.peers import Peers
from sealane.host.store import Store
from sealane.limits import PAIRING_CONNECTIONS_MAX, PAIRING_LIFETIME_S
from sealane.session.preface import PREFACE_BYTES
from tests.host.factories import NOW


@dataclass
class Host:
    """What pairing needs of an agent, with a port that hands every connection to the desk."""

    identity: Identity
    store: Store
    settings: Settings = field(default_factory=Settings)
    now: float = 1000.0
    port: int = 0

    def __post_init__(self) -> None:
        self.peers = Peers(self.store)
        self.desk = PairingDesk(self, clock=lambda: self.now)

    async def listen(self) -> asyncio.Task[None]:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        self.port = listening.getsockname()[1]

        async def accept() -> None:
            loop = asyncio.get_running_loop()
            with listening:
                while True:
                    connection, _ = await loop.sock_accept(listening)
                    connection.setblocking(False)
                    assert len(await loop.sock_recv(connection, PREFACE_BYTES)) == PREFACE_BYTES
                    self.desk.welcome(connection)

        return asyncio.create_task(accept())

    def trusted(self) -> list[tuple[str, str]]:
        return [(peer.name, peer.fingerprint) for peer in self.peers.list()]


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[tuple[Host, Host]]:
    made = [Host(create_identity(name, now=NOW), Store(tmp_path / name)) for name in ("host-a", "host-b")]
    tasks = [await host.listen() for host in made]
    yield made[0], made[1]
    for host, task in zip(made, tasks, strict=True):
        task.cancel()
        await asyncio.wait([task])
        await host.desk.stop()
        host.store.close()


async def settled(host: Host) -> None:
    """Until nobody tries its code any more."""
    invitation = host.desk._invitation
    assert invitation is not None
    while invitation.tasks:
        await asyncio.wait(invitation.tasks)
        await asyncio.sleep(0)


def other_than(code: str, number: int = 1) -> str:
    """A wrong code, of right words."""
    first, *words = code.split("-")
    return "-".join([str(int(first) % 99 + number), *words]) if int(first) % 99 + number <= 99 else "1-acorn-zinc"


async def refused(host: Host, at: Host, code: str, *codes: str) -> None:
    with pytest.raises(SealaneError) as raised:
        await host.desk.join("127.0.0.1", at.port, code)
    assert raised.value.code in codes
    await settled(at)


async def test_pairing(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    code = a.desk.invite().code
    assert code
    joined = await b.desk.join("127.0.0.1", a.port, code.upper().replace("-", " "))
    await settled(a)
    invited = a.desk.status()
    assert (joined.state, invited.state, joined.words) == ("paired", "paired", invited.words)
    assert a.trusted() == [("host-b", b.identity.fingerprint)]
    assert b.trusted() == [("host-a", a.identity.fingerprint)]
    assert (a.peers.get("host-b").address, a.peers.get("host-b").port) == ("127.0.0.1", b.port)
    assert b.peers.get("host-a").port == a.port


async def test_a_code_serves_once(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    code = a.desk.invite().code or ""
    await b.desk.join("127.0.0.1", a.port, code)
    await settled(a)
    await refused(b, a, code, "pairing.closed")


async def test_of_two_at_once_one_is_paired(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    a, b = hosts
    third = Host(create_identity("host-c", now=NOW), Store(tmp_path / "host-c"), port=1)
    code = a.desk.invite().code or ""
    outcomes = await asyncio.gather(
        *(host.desk.join("127.0.0.1", a.port, code) for host in (b, third)), return_exceptions=True
    )
    await settled(a)
    assert len(a.trusted()) == 1
    assert sorted(isinstance(outcome, SealaneError) for outcome in outcomes) == [False, True]
    third.store.close()


async def test_pairing_again_changes_nothing(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    for inviter, joiner in ((a, b), (b, a), (a, b)):
        await joiner.desk.join("127.0.0.1", inviter.port, inviter.desk.invite().code or "")
        await settled(inviter)
    assert (len(a.trusted()), len(b.trusted())) == (1, 1)


async def test_three_wrong_tries_end_it(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    code = a.desk.invite().code or ""
    for left in (2, 1):
        await refused(b, a, other_than(code), "pairing.code")
        assert a.desk.status().tries_left == left
    await refused(b, a, other_than(code), "pairing.code")
    status = a.desk.status()
    assert status.state == "failed"
    assert status.problem
    assert "3 wrong codes" in status.problem.detail
    await refused(b, a, code, "pairing.closed")
    assert a.trusted() == b.trusted() == []


async def test_many_at_once_are_not_more_tries(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    code = a.desk.invite().code or ""
    outcomes = await asyncio.gather(
        *(b.desk.join("127.0.0.1", a.port, other_than(code)) for _ in range(12)), return_exceptions=True
    )
    await settled(a)
    codes = [error.code for error in outcomes if isinstance(error, SealaneError)]
    assert len(codes) == 12
    assert codes.count("pairing.code") <= 3


async def test_a_code_expires(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    code = a.desk.invite().code or ""
    a.now += PAIRING_LIFETIME_S
    await refused(b, a, code, "pairing.closed")
    assert a.desk.status().state == "failed"


async def test_a_new_code_voids_the_old_one(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    old = a.desk.invite().code or ""
    a.desk.invite()
    a.desk._invitation.code = other_than(old)  # type: ignore[union-attr]
    await refused(b, a, old, "pairing.code")
    a.desk.cancel()
    await refused(b, a, old, "pairing.closed")


async def test_nobody_pairs_where_no_code_is_shown(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    with pytest.raises(SealaneError, match=r"pairing\.closed"):
        await b.desk.join("127.0.0.1", a.port, "7-orchid-tempo")
    with pytest.raises(SealaneError, match=r"pairing\.over"):
        a.desk.status()


async def test_silent_connections_are_bounded_and_void_the_code(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    a.desk.invite()
    loop = asyncio.get_running_loop()
    for _ in range(PAIRING_CONNECTIONS_MAX + 1):
        one, other = socket.socketpair()
        one.setblocking(False)
        other.setblocking(False)
        a.desk.welcome(one)
        invitation = a.desk._invitation
        assert invitation is not None
        assert invitation.trying <= 3
        other.close()
    while a.desk._invitation.tasks:  # type: ignore[union-attr]
        await asyncio.sleep(0)
    assert loop.time() > 0
    assert a.desk.status().state == "failed"


@pytest.mark.parametrize("who", ["inviter", "joiner"])
async def test_a_name_that_is_somebody_else_is_not_taken(hosts: tuple[Host, Host], who: str) -> None:
    """Neither end trusts the other then."""
    a, b = hosts
    knows, called = (a, "host-b") if who == "inviter" else (b, "host-a")
    knows.peers.add(Peer(name=called, fingerprint="SHA256:" + "0" * 64))
    await refused(b, a, a.desk.invite().code or "", "trust.exists")
    status = a.desk.status()
    assert status.state == ("failed" if who == "inviter" else "waiting") or status.problem
    assert (len(a.trusted()), len(b.trusted())) == ((1, 0) if who == "inviter" else (0, 1))
