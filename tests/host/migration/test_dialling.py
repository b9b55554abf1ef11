"""Sockets between hosts and to QEMU."""

import asyncio
import socket
import stat
from pathlib import Path

import pytest

from sealane import limits
from sealane.errors import HostError, PeerError
from sealane.host.migration import dialling
from sealane.host.migration.dialling import (
    SocketDirectory,
    all_or_none,
    dial_peer,
    dial_vm,
    give_up_when_unanswered,
    listen_for_vm,
)
from tests.enclave.rig import open_descriptors


async def test_a_peer_is_dialled_without_delay_and_noticed_when_it_vanishes() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        await dial_peer("127.0.0.1", listener.getsockname()[1]) as connection,
    ):
        tcp = socket.IPPROTO_TCP
        assert connection.getpeername() == listener.getsockname()
        assert not connection.getblocking()
        assert connection.getsockopt(tcp, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for option, value in (
            (socket.TCP_KEEPIDLE, limits.TCP_KEEPALIVE_IDLE_S),
            (socket.TCP_KEEPINTVL, limits.TCP_KEEPALIVE_INTERVAL_S),
            (socket.TCP_KEEPCNT, limits.TCP_KEEPALIVE_PROBES),
            (socket.TCP_USER_TIMEOUT, 0),  # a lane's reader may rest as long as QEMU does
        ):
            assert connection.getsockopt(tcp, option) == value
        give_up_when_unanswered(connection)
        assert connection.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == limits.TCP_USER_TIMEOUT_MS


async def test_lanes_are_dialled_at_once_and_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, all_wait = 0, asyncio.Event()

    async def dial(index: int, *, fails: bool) -> socket.socket:
        nonlocal waiting
        waiting += 1
        if waiting == 3:
            all_wait.set()
        await asyncio.wait_for(all_wait.wait(), 10)  # one after the other, nobody would come this far
        if fails and index == 1:
            raise PeerError("peer.unreachable", "the second one")
        return socket.socket()

    before = open_descriptors()
    for connection in await all_or_none([dial(index, fails=False) for index in range(3)]):
        connection.close()
    waiting = 0
    all_wait.clear()
    with pytest.raises(PeerError, match="the second one"):
        await all_or_none([dial(index, fails=True) for index in range(3)])
    assert open_descriptors() == before


async def test_nobody_listens() -> None:
    before = open_descriptors()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerError, match=rf"127\.0\.0\.1 port {port}: .*peer\.unreachable"):
        await dial_peer("127.0.0.1", port)
    with pytest.raises(PeerError, match=r"peer\.unreachable"):
        await dial_peer("no such host", port)
    assert open_descriptors() == before


async def test_a_peer_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(dialling, "_DIAL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", never, raising=False)
    before = open_descriptors()
    with pytest.raises(PeerError, match="port 9: no answer"):
        await dial_peer("127.0.0.1", 9)
    assert open_descriptors() == before


async def test_qemu_is_dialled_where_it_listens(tmp_path: Path) -> None:
    path = tmp_path / "in.sock"
    before = open_descriptors()
    for state in ("absent", "dead"):
        with pytest.raises(HostError, match="QEMU does not listen") as raised:
            await dial_vm(path)
        assert raised.value.code == "migration.destination-died", state
        if state == "absent":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.bind(str(path))
        qemu.listen()
        with await dial_vm(path):
            pass
    assert open_descriptors() == before


async def test_the_sources_socket_is_for_one_user(tmp_path: Path) -> None:
    path = tmp_path / "out.sock"
    with listen_for_vm(path, 3):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with await dial_vm(path):
            pass
        with pytest.raises(HostError, match=r"host\.permission"):
            listen_for_vm(path, 3)
    with pytest.raises(HostError, match=r"host\.permission"):
        listen_for_vm(tmp_path / ("long" * 40), 3)


def test_a_directory_for_sockets_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with SocketDirectory(tmp_path) as directory:
        assert directory.parent == tmp_path / "m"
        assert len(directory.name) <= 12, "a unix socket's path is short"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "out.sock").touch()
        with SocketDirectory(tmp_path) as other:
            assert other != directory
        assert directory.exists()
    assert list((tmp_path / "m").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"host\.permission"), SocketDirectory(tmp_path / "file"):
        pass
