"""The agent's side of real enclaves, and of one that the test plays itself."""

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import cast

import pytest

from sealane.crypto.identity import Identity
from sealane.enclave.interface import (
    Abort,
    Begin,
    CallSocket,
    Counters,
    Failed,
    Finish,
    LanesClosed,
    LanesOpen,
    Message,
    PeerEstablished,
    PeerFinished,
    SendMessage,
    VmWanted,
    socket_pair,
)
from sealane.errors import HostError, PeerError, SealaneError, make_error
from sealane.host.migration import enclave_process
from sealane.host.migration.enclave_launcher import EnclaveLauncher
from sealane.host.migration.enclave_process import Child, EnclaveProcess, uninterrupted
from sealane.host.migration.messages import Loaded, Prepared
from sealane.limits import LANES_MAX, TRUSTED_PER_CALL
from sealane.session.preface import PREFACE_BYTES, ConnectionKind, parse_preface
from tests.enclave.quoting import quoting_line
from tests.enclave.rig import open_descriptors, receive_exactly, tcp_pair
from tests.session.rig import DESTINATION, MIGRATION, NOW, SOURCE, SUBJECT

DIGEST = "0" * 64


def begin(role: str) -> Begin:
    own, peer = (SOURCE, DESTINATION) if role == "source" else (DESTINATION, SOURCE)
    return Begin(
        role=role,
        migration=MIGRATION,
        key_pem=own.key_pem.decode(),
        certificate_pem=own.certificate_pem.decode(),
        trusted={peer.fingerprint: peer.name},
        protection="sealed",
        now=NOW.isoformat(),
        vm=SUBJECT.vm if role == "source" else "",
        epoch=SUBJECT.epoch if role == "source" else 0,
        reattest_every_s=600.0,
    )


@pytest.fixture
async def launcher() -> AsyncIterator[EnclaveLauncher]:
    before = open_descriptors()
    made = EnclaveLauncher()
    yield made
    await made.stop()
    lines_end()
    assert open_descriptors() == before


_lines: list[threading.Thread] = []


def line(identity: Identity) -> socket.socket:
    ours, thread = quoting_line(identity)
    _lines.append(thread)
    return ours


def lines_end() -> None:
    """Wait for the other ends of the lines of enclaves that are gone: they close theirs as they notice."""
    while _lines:
        thread = _lines.pop()
        thread.join(20.0)
        assert not thread.is_alive()


async def meet(launcher: EnclaveLauncher) -> tuple[EnclaveProcess, EnclaveProcess]:
    source, destination = await launcher.start_enclave(), await launcher.start_enclave()
    here, there = tcp_pair()
    source.call(begin("source"), here, line(SOURCE))
    assert here.fileno() == -1  # the enclave's alone
    receive_exactly(there, 32)
    destination.call(begin("destination"), there, line(DESTINATION))
    for each in (source, destination):
        met = await each.wait(each.established, 20, "peer.slow", "handshake")
        assert met.kex_group == "X25519MLKEM768"
    return source, destination


async def test_two_agents_talk_through_real_enclaves_and_leave_nothing(launcher: EnclaveLauncher) -> None:
    launcher.start()
    before = open_descriptors()
    source, destination = await meet(launcher)
    destination.call(SendMessage(Prepared(multifd_channels=2, preempt=False).model_dump_json()))
    assert await source.expect(Prepared, 20) == Prepared(multifd_channels=2, preempt=False)
    source.finish()
    await destination.wait(destination.finished, 20, "peer.slow", "goodbye")
    destination.finish()
    for each in (source, destination):
        await each.reap()
        assert not os.path.exists(f"/proc/{each.pid}")
        with pytest.raises(HostError, match=r"enclave\.died"):
            each.call(Finish())
        each.finish()  # harmless, as is abort
        each.abort(make_error("peer.slow"))
    lines_end()
    assert open_descriptors() == before


async def test_the_preface_does_not_wait_for_the_policy(launcher: EnclaveLauncher) -> None:
    """The peer closes a connection that says nothing for seconds; a quoting process that measures may take longer."""
    enclave = await launcher.start_enclave()
    (here, there), (silent, quoting) = tcp_pair(), socket.socketpair()
    with there, silent:
        enclave.call(begin("source"), here, quoting)
        preface = parse_preface(receive_exactly(there, PREFACE_BYTES))
        assert (preface.kind, preface.label.hex()) == (ConnectionKind.CHANNEL, MIGRATION)
        enclave.kill()
        await enclave.reap()


async def test_more_peers_are_trusted_than_one_call_can_name(launcher: EnclaveLauncher) -> None:
    """The one that comes is the first of very many; a full socket is waited for."""
    source, destination = await launcher.start_enclave(), await launcher.start_enclave()
    here, there = tcp_pair()
    source.call(begin("source"), here, line(SOURCE))
    receive_exactly(there, 32)
    crowd = {f"SHA256:{number:064x}": f"host-{number:040d}" for number in range(5000)}
    rest = await destination.tell_trusted({**begin("destination").trusted, **crowd})
    assert 0 < len(rest) <= TRUSTED_PER_CALL
    destination.call(replace(begin("destination"), trusted=rest), there, line(DESTINATION))
    for each in (source, destination):
        await each.wait(each.established, 20, "peer.slow", "handshake")
        each.finish()
    await asyncio.gather(source.reap(), destination.reap())


async def test_an_abort_tells_the_other_end_why(launcher: EnclaveLauncher) -> None:
    source, destination = await meet(launcher)
    destination.abort(make_error("check.cpus", "2 and 1"))
    with pytest.raises(SealaneError, match="the peer says: 2 and 1") as raised:
        await source.expect(Prepared, 20)
    assert raised.value.code == "check.cpus"
    await asyncio.gather(source.reap(), destination.reap())


async def test_a_killed_enclave_is_heard_of(launcher: EnclaveLauncher) -> None:
    enclave = await launcher.start_enclave()
    enclave.kill()
    with pytest.raises(HostError, match=r"enclave\.died"):
        await enclave.next_message(20, "anything")
    await enclave.reap()
    enclave.kill()  # harmless


async def test_an_enclave_that_does_not_end_is_killed(
    launcher: EnclaveLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enclave_process, "_EXIT_WAIT_S", 0.05)
    enclave = await launcher.start_enclave()
    await enclave.reap()
    assert not os.path.exists(f"/proc/{enclave.pid}")


# ---- an enclave played by the test


class Played:
    """An EnclaveProcess whose other end is in the test's hand."""

    def __init__(self) -> None:
        ours, theirs = socket_pair()
        ours.setblocking(False)
        theirs.settimeout(5)
        self.enclave = CallSocket(theirs)
        self.agent = EnclaveProcess(cast("Child", None), CallSocket(ours))


@pytest.fixture
async def played() -> AsyncIterator[Played]:
    made = Played()
    yield made
    made.enclave.close()
    made.agent._stop_listening()


async def test_one_that_is_left_is_not_waited_for(played: Played) -> None:
    played.agent.leave()
    await played.agent.reap()
    assert played.enclave.receive() is None


async def test_what_the_enclave_tells_reaches_who_waits(played: Played) -> None:
    agent, wanted = played.agent, asyncio.Event()
    lanes: list[int] = []
    agent.on_vm_wanted = lambda lane: (lanes.append(lane), wanted.set())[0]  # type: ignore[func-returns-value]
    facts = PeerEstablished("name", "fingerprint", "TLSv1.3", "group", "cipher", "vm", 3, "{}")
    closed = LanesClosed(DIGEST, 3, 4)
    for call in (facts, LanesOpen(), Counters(1, 2), VmWanted(5), closed, PeerFinished()):
        played.enclave.send(call)
    assert await agent.wait(agent.established, 5, "peer.slow", "") == facts
    assert await agent.wait(agent.lanes_open, 5, "peer.slow", "") == LanesOpen()
    await wanted.wait()
    assert lanes == [5]
    assert await agent.wait(agent.lanes_closed, 5, "peer.slow", "") == closed
    assert agent.counters == Counters(3, 4)
    await agent.wait(agent.finished, 5, "peer.slow", "")


async def test_a_lane_wants_its_qemu_once(played: Played) -> None:
    """A compromised enclave has the agent dial no QEMU without end."""
    lanes: list[int] = []
    played.agent.on_vm_wanted = lanes.append
    for lane in (5, 5, -1, LANES_MAX, 10**300, 0, 5, 0):
        played.enclave.send(VmWanted(lane))
    played.enclave.send(PeerFinished())
    await played.agent.wait(played.agent.finished, 5, "peer.slow", "")
    assert lanes == [5, 0]


async def test_the_first_failure_counts(played: Played) -> None:
    for code in ("lane.integrity", "lane.cut"):
        played.enclave.send(Failed(code, code, by_peer=False))
    played.enclave.close()
    with pytest.raises(PeerError) as raised:
        await played.agent.wait(played.agent.lanes_open, 5, "peer.slow", "")
    assert raised.value.code == "lane.integrity"


async def test_a_message_that_was_heard_before_the_failure_is_not_lost(played: Played) -> None:
    """A ticket's answer counts, even where the channel broke right behind it."""
    played.enclave.send(Message(Loaded(digest=DIGEST).model_dump_json()))
    played.enclave.send(Failed("peer.closed", "", by_peer=False))
    await played.agent.failed
    assert await played.agent.expect(Loaded, 5) == Loaded(digest=DIGEST)
    with pytest.raises(PeerError, match=r"peer\.closed"):
        await played.agent.expect(Loaded, 5)


async def test_time_passes_and_the_shared_future_lives_on(played: Played) -> None:
    agent = played.agent
    with pytest.raises(PeerError, match=r"no handshake within 0 s \[peer.slow\]"):
        await agent.wait(agent.established, 0.001, "peer.slow", "handshake")
    assert not agent.established.cancelled()
    with pytest.raises(PeerError, match=r"no word within 0 s \[peer.slow\]"):
        await agent.next_message(0.001, "word")
    played.enclave.send(Message(Prepared(multifd_channels=0, preempt=False).model_dump_json()))
    assert await agent.next_message(5, "word") == Prepared(multifd_channels=0, preempt=False)


async def test_a_message_out_of_turn(played: Played) -> None:
    played.enclave.send(Message(Prepared(multifd_channels=0, preempt=False).model_dump_json()))
    with pytest.raises(PeerError, match="`prepared` came out of turn"):
        await played.agent.expect(Loaded, 5)


async def test_messages_that_wait_are_bounded(played: Played) -> None:
    for _ in range(17):
        played.enclave.send(Message("{}"))
    assert (await played.agent.failed).code == "peer.message"


@pytest.mark.parametrize("packet", [b"nonsense", b"{}", b'{"call": "Failed"}'])
async def test_an_enclave_that_speaks_nonsense(played: Played, packet: bytes) -> None:
    played.enclave.connection.send(packet)
    assert (await played.agent.failed).code == "enclave.died"


async def test_an_unknown_code_of_a_newer_peer_is_an_error_all_the_same(played: Played) -> None:
    played.enclave.send(Failed("lane.from-the-future", "words", by_peer=True))
    assert (await played.agent.failed).code == "internal.error"


async def test_an_enclave_that_takes_no_calls(played: Played) -> None:
    def flood() -> None:
        for _ in range(100_000):
            played.agent.call(SendMessage("x" * 1000))

    with pytest.raises(HostError, match=r"enclave\.slow"):
        flood()


async def test_an_abort_carries_code_and_detail(played: Played) -> None:
    played.agent.abort(make_error("migration.cancelled"))
    received = played.enclave.receive()
    assert received == (Abort("migration.cancelled", "the migration was cancelled"), [])


async def test_uninterrupted_work_ends_however_often_its_caller_is_cancelled() -> None:
    goes_on, begun = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        begun.set()
        await goes_on.wait()
        return "done"

    caller = asyncio.create_task(uninterrupted(work()))
    await begun.wait()
    for _ in range(3):
        caller.cancel()
        await asyncio.wait({caller}, timeout=0)
        assert not caller.done()
    goes_on.set()
    assert await caller == "done"
