"""Two real enclave processes: what they carry, how they end, and what they gave up."""

import contextlib
import json
import os
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from sealane.crypto.tls import TlsConnection
from sealane.enclave.interface import (
    Abort,
    AcceptLane,
    AttachVm,
    Counters,
    ExpectLanes,
    Failed,
    Finish,
    LanesClosed,
    Message,
    Outlive,
    PeerEstablished,
    PeerFinished,
    PeerSeen,
    SendMessage,
)
from sealane.enclave.process import COUNTERS_EVERY_S, GRACE_S
from sealane.limits import CHANNEL_MESSAGE_MAX, REATTEST_AT_ONCE
from sealane.seal.records import OVERHEAD_BYTES
from sealane.session.channel import FrameKind, encode_frame
from tests.enclave.rig import (
    PATIENCE_S,
    Enclave,
    Pair,
    open_descriptors,
    passing,
    receive_exactly,
    tcp_pair,
    two_enclaves,
)
from tests.session.rig import DESTINATION, SOURCE, STRANGER, SUBJECT, hello_of, software_evidence


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    before = open_descriptors()
    with two_enclaves(tmp_path) as made:
        yield made
    assert open_descriptors() == before


def finish(pair: Pair) -> None:
    """Both sides say goodbye and end in order, without a word on stderr."""
    pair.source.call(Finish())
    pair.destination.until(PeerFinished)
    pair.destination.call(Finish())
    assert pair.source.ends() == (0, "")
    assert pair.destination.ends() == (0, "")


# ---- what they carry


def test_they_meet_talk_and_part(pair: Pair) -> None:
    at_source, at_destination = pair.meet()
    facts = ("TLSv1.3", "X25519MLKEM768", "TLS_AES_256_GCM_SHA384")
    for met, peer in ((at_source, DESTINATION), (at_destination, SOURCE)):
        expected = PeerEstablished(peer.name, peer.fingerprint, *facts, SUBJECT.vm, SUBJECT.epoch, met.verdict)
        assert met == expected
        verdict = json.loads(met.verdict)
        assert verdict["accepted"]
        assert verdict["level"] == 1
        assert [one["root"] for one in verdict["evidence"]] == ["software key (identity only)"]
    for one, other in ((pair.source, pair.destination), (pair.destination, pair.source)):
        for words in ("hello", "é" * 10, "x" * CHANNEL_MESSAGE_MAX):
            one.call(SendMessage(words))
            assert other.until(Message) == Message(words)
    finish(pair)


@pytest.mark.parametrize("lanes", [1, 3])
def test_bytes_go_both_ways_and_the_digests_agree(pair: Pair, lanes: int) -> None:
    chance = random.Random(lanes)
    there = {lane: chance.randbytes(chance.randint(300_000, 900_000)) for lane in range(lanes)}
    back = {lane: chance.randbytes(chance.randint(1, 50_000)) for lane in range(lanes)}
    pair.meet()
    pair.open_lanes(lanes)
    received: dict[tuple[str, int], bytes] = {}

    def speak(vm: socket.socket, data: bytes, seed: int) -> None:
        sizes, at = random.Random(seed), 0
        while at < len(data):
            step = sizes.choice([1, 100, 4096, 70_000])
            vm.sendall(data[at : at + step])
            at += step
        vm.shutdown(socket.SHUT_WR)

    def listen(vm: socket.socket, name: str, lane: int) -> None:
        parts = []
        while piece := vm.recv(65_536):
            parts.append(piece)
        received[name, lane] = b"".join(parts)

    talk = []
    for lane in range(lanes):
        talk += [pair.run(speak, pair.vms[lane][0], there[lane], lane)]
        talk += [pair.run(listen, pair.vms[lane][0], "source", lane)]
    pair.attach(lanes=lanes)
    for lane in range(lanes):
        talk += [pair.run(listen, pair.vms[lane][1], "destination", lane)]
        talk += [pair.run(speak, pair.vms[lane][1], back[lane], lane)]
    ours, theirs = pair.source.until(LanesClosed), pair.destination.until(LanesClosed)
    for thread in talk:
        thread.join(20)
    assert received == {
        **{("destination", lane): data for lane, data in there.items()},
        **{("source", lane): data for lane, data in back.items()},
    }
    total = sum(map(len, [*there.values(), *back.values()]))
    assert ours.digest == theirs.digest
    assert ours.plaintext_bytes == theirs.plaintext_bytes == total
    assert ours.wire_bytes >= total + lanes * 6 * OVERHEAD_BYTES  # OPEN, at least one DATA, CLOSE, both ways
    finish(pair)
    for enclave in (pair.source, pair.destination):
        counted = [call.plaintext_bytes for call in enclave.heard if isinstance(call, Counters)]
        assert counted == sorted(counted)


def test_half_close_reaches_one_direction_only(pair: Pair) -> None:
    pair.meet()
    pair.open_lanes(1)
    pair.vms[0][0].sendall(b"stream")
    pair.attach(lanes=1)
    here, there = pair.vms[0]
    assert receive_exactly(there, 6) == b"stream"
    here.shutdown(socket.SHUT_WR)
    assert there.recv(1) == b""
    there.sendall(b"return path")  # goes on after the other direction was closed
    assert receive_exactly(here, 11) == b"return path"
    there.shutdown(socket.SHUT_WR)
    assert here.recv(1) == b""
    assert pair.source.until(LanesClosed).digest == pair.destination.until(LanesClosed).digest
    finish(pair)


def test_lanes_that_carried_nothing_close_too(pair: Pair) -> None:
    pair.meet()
    pair.open_lanes(2)
    pair.vms[0][0].sendall(b"x")
    pair.attach(lanes=1)
    for vm in (pair.vms[0][0], pair.vms[0][1], pair.vms[1][0]):
        vm.shutdown(socket.SHUT_WR)
    assert pair.source.until(LanesClosed).digest == pair.destination.until(LanesClosed).digest
    finish(pair)


def attach_at(enclave: Enclave, lane: int) -> socket.socket:
    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    enclave.call(AttachVm(lane), theirs)
    return mine


def test_a_lane_that_is_attached_at_the_source_waits_with_what_the_destination_says_first(pair: Pair) -> None:
    """As NBD does, which copies disks."""
    pair.meet()
    pair.open_lanes(2, attached=1)
    pair.vms[0][0].sendall(b"x")
    pair.attach(lanes=1)
    server = attach_at(pair.destination, 1)
    server.sendall(b"NBDMAGIC")
    client = attach_at(pair.source, 1)
    assert receive_exactly(client, 8) == b"NBDMAGIC"
    client.sendall(b"write")
    assert receive_exactly(server, 5) == b"write"
    for vm in (*pair.vms[0], client, server):
        vm.shutdown(socket.SHUT_WR)
    assert pair.source.until(LanesClosed).digest == pair.destination.until(LanesClosed).digest
    finish(pair)


def test_a_lane_of_the_listeners_is_not_attached(pair: Pair) -> None:
    pair.meet()
    pair.open_lanes(2, attached=1)
    attach_at(pair.source, 0)
    assert pair.source.until(Failed).code == "internal.error"


# ---- how they end


def test_the_peers_reason_is_told(pair: Pair) -> None:
    pair.meet()
    pair.destination.call(Abort("check.memory", "the memory is 1 GiB and 2 GiB"))
    failed = pair.source.until(Failed)
    assert failed == Failed("check.memory", "the peer says: the memory is 1 GiB and 2 GiB", by_peer=True)
    assert pair.source.ends() == (0, "")
    assert pair.destination.ends() == (0, "")


def test_an_unknown_peer_is_refused_at_both_ends(pair: Pair) -> None:
    here, there = tcp_pair()
    pair.begin(pair.source, here)
    receive_exactly(there, 32)
    pair.begin(pair.destination, there, **{STRANGER.fingerprint: "stranger"})
    failed = pair.destination.until(Failed)
    assert (failed.code, failed.by_peer) == ("peer.unknown", False)
    told = pair.source.until(Failed)
    assert (told.code, told.by_peer) == ("peer.unknown", True)


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_a_killed_enclave_ends_the_other_one(pair: Pair, victim: str) -> None:
    pair.meet()
    pair.open_lanes(1)
    pair.vms[0][0].sendall(b"stream")
    pair.attach(lanes=1)
    killed, other = (pair.source, pair.destination) if victim == "source" else (pair.destination, pair.source)
    killed.kill()
    failed = other.until(Failed)
    assert failed.code in {"lane.cut", "lane.truncated", "peer.closed", "migration.destination-died"}
    assert not failed.by_peer
    assert other.ends() == (0, "")
    for vm in pair.vms[0]:  # both QEMUs see their connection end
        vm.settimeout(20)
        assert vm.recv(100) in {b"", b"stream"}


def test_an_enclave_whose_agent_is_gone_ends(pair: Pair) -> None:
    pair.meet()
    pair.open_lanes(1)
    pair.source.calls.close()
    assert pair.source.ends() == (0, "")
    assert pair.vms[0][0].recv(1) == b""
    assert pair.destination.until(Failed).code in {"lane.truncated", "lane.cut", "peer.closed"}


def test_an_enclave_without_work_ends_with_its_agent(pair: Pair) -> None:
    pair.source.calls.close()
    assert pair.source.ends() == (0, "")


def told_to_outlive(pair: Pair) -> None:
    """Bytes are on their way, and the destination's enclave is to go on without its agent, should it lose it."""
    pair.meet()
    pair.open_lanes(1)
    pair.vms[0][0].sendall(b"stream")
    pair.attach(lanes=1)
    pair.destination.call(Outlive())


def left_alone(pair: Pair) -> None:
    """The destination's enclave has lost the agent that it was told to outlive."""
    told_to_outlive(pair)
    pair.destination.calls.close()


def test_a_destinations_enclave_outlives_its_agent_until_the_lanes_are_closed(pair: Pair) -> None:
    left_alone(pair)
    here, there = pair.vms[0]
    here.sendall(b" of pages" * 50_000)
    assert receive_exactly(there, 450_006) == b"stream" + b" of pages" * 50_000
    pair.source.call(SendMessage("nobody hears it"))
    there.sendall(b"wanted")
    assert receive_exactly(here, 6) == b"wanted"
    for vm in (here, there):
        vm.shutdown(socket.SHUT_WR)
    while not {LanesClosed, PeerFinished} <= {type(call) for call in pair.source.heard}:  # in either order
        pair.source.until(Counters)
    assert pair.destination.ends() == (0, "")
    pair.source.call(Finish())
    assert pair.source.ends() == (0, "")


def test_an_enclave_that_loses_its_agent_after_the_lanes_says_goodbye_at_once(pair: Pair) -> None:
    told_to_outlive(pair)
    for vm in pair.vms[0]:
        vm.shutdown(socket.SHUT_WR)
    pair.destination.until(LanesClosed)
    pair.destination.calls.close()
    pair.source.until(PeerFinished)
    assert pair.destination.ends() == (0, "")


@pytest.mark.parametrize("cut", ["lane", "peer", "vm"])
def test_an_enclave_alone_ends_with_the_first_failure(pair: Pair, cut: str) -> None:
    left_alone(pair)
    assert receive_exactly(pair.vms[0][1], 6) == b"stream"
    if cut == "lane":
        pair.held[0].shutdown(socket.SHUT_RDWR)
    elif cut == "peer":
        pair.source.kill()
    else:
        pair.vms[0][1].close()
        pair.vms[0][0].sendall(b"for nobody")
    assert pair.destination.ends() == (0, "")


@contextlib.contextmanager
def asked_again(directory: Path) -> Iterator[tuple[Pair, Callable[[], None]]]:
    """A destination's enclave that is to outlive its agent, and waits for evidence; and what ends its quoting process."""
    asked, ends = threading.Event(), threading.Event()
    rounds: list[bytes] = []

    def quote(user_data: bytes) -> Mapping[str, bytes]:
        rounds.append(user_data)
        if len(rounds) == 1:
            return software_evidence(DESTINATION, user_data)
        asked.set()
        ends.wait(PATIENCE_S)
        raise OSError("the quoting process is gone")

    with two_enclaves(directory) as pair:
        pair.reattest_every_s = 0.05
        pair.quotes["destination"] = quote
        pair.meet()
        pair.open_lanes(1)
        pair.vms[0][0].sendall(b"stream")
        pair.attach(lanes=1)
        pair.destination.call(Outlive())
        pair.destination.call(SendMessage("heard after it"))
        pair.source.until(Message)
        assert asked.wait(PATIENCE_S)
        its_quoting = pair.threads[1]

        def end_quoting() -> None:
            ends.set()
            its_quoting.join(PATIENCE_S)

        try:
            yield pair, end_quoting
        finally:
            ends.set()


@pytest.mark.parametrize("first", ["agent", "quoting process"])
def test_an_enclave_alone_attests_no_more(tmp_path: Path, first: str) -> None:
    """A round is under way as the agent ends, and the quoting process with it."""
    with asked_again(tmp_path) as (pair, end_quoting):
        if first == "agent":
            pair.destination.calls.close()
        end_quoting()
        pair.destination.calls.close()
        seen = receive_exactly(pair.vms[0][1], 6)
        for _ in range(int((GRACE_S + 1) / COUNTERS_EVERY_S)):  # the source goes on, and asks no more or in vain
            pair.source.until(Counters)
            pair.vms[0][0].sendall(b"stream")
            seen += receive_exactly(pair.vms[0][1], 6)
        assert {seen[at : at + 6] for at in range(0, len(seen), 6)} == {b"stream"}


def test_an_enclave_that_could_outlive_its_agent_attests_while_that_lives(tmp_path: Path) -> None:
    with asked_again(tmp_path) as (pair, end_quoting):
        end_quoting()
        assert pair.destination.until(Failed).code == "quoting.failed"
        assert pair.destination.ends() == (0, "")


def test_a_source_cannot_have_the_destination_attest_without_end(pair: Pair) -> None:
    """A TPM's time is for all VMs of a host."""
    pair.reattest_every_s, pair.destination_reattests_every_s = 0.001, 600.0
    pair.meet()
    pair.open_lanes(1)
    assert pair.destination.until(Failed).code == "attest.too-often"
    assert sum(isinstance(each, PeerSeen) for each in pair.destination.heard) >= REATTEST_AT_ONCE


def test_a_destination_that_would_ask_as_often_attests_as_often(pair: Pair) -> None:
    pair.reattest_every_s = 0.001
    pair.meet()
    pair.open_lanes(1)
    seen = [pair.destination.until(PeerSeen) for _ in range(REATTEST_AT_ONCE + 4)]
    assert all(each.accepted for each in seen)
    assert not any(isinstance(each, Failed) for each in pair.destination.heard)


@pytest.mark.parametrize("when", ["at the start", "before the lanes", "at a source"])
def test_who_carries_nothing_for_a_vm_does_not_outlive_its_agent(pair: Pair, when: str) -> None:
    enclave = pair.destination
    if when != "at the start":
        pair.meet()
    if when == "at a source":
        pair.open_lanes(1)
        enclave = pair.source
    enclave.call(Outlive())
    assert enclave.until(Failed).code == "internal.error"
    assert enclave.ends() == (0, "")


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" * 4, bytes(100)], ids=["HTTP", "zeros"])
def test_garbage_instead_of_tls(pair: Pair, garbage: bytes) -> None:
    here, there = tcp_pair()
    pair.begin(pair.destination, there)
    here.sendall(garbage)
    failed = pair.destination.until(Failed)
    assert (failed.code, failed.by_peer) == ("peer.tls", False)
    assert pair.destination.ends() == (0, "")
    here.close()


def test_a_stranger_that_hangs_up(pair: Pair) -> None:
    here, there = tcp_pair()
    pair.begin(pair.destination, there)
    here.close()
    assert pair.destination.until(Failed).code == "peer.tls"
    assert pair.destination.ends() == (0, "")


def test_what_a_stranger_said_before_it_hung_up_is_told(pair: Pair) -> None:
    here, there = tcp_pair()
    there.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    there.close()  # with a reset: the first bytes of the enclave's cannot leave
    pair.begin(pair.source, here)
    assert pair.source.until(Failed).code == "peer.tls"
    assert pair.source.ends() == (0, "")


def test_damage_on_an_established_channel(pair: Pair) -> None:
    """The channel's connection stays in the test's hand: garbage goes in where the next TLS record belongs."""
    here, there = tcp_pair()
    intruder = here.dup()
    pair.begin(pair.source, here)
    receive_exactly(there, 32)
    pair.begin(pair.destination, there)
    pair.source.until(PeerEstablished)
    pair.destination.until(PeerEstablished)
    intruder.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    intruder.close()
    failed = pair.destination.until(Failed)
    assert (failed.code, failed.by_peer) == ("peer.tls", False)
    assert pair.destination.ends() == (0, "")


@pytest.mark.parametrize(
    "payload", [b'"' * CHANNEL_MESSAGE_MAX, b"\xff" * CHANNEL_MESSAGE_MAX], ids=["quotes", "bytes"]
)
def test_a_message_that_grows_beyond_a_call_is_the_peers_fault(pair: Pair, payload: bytes) -> None:
    """A trusted peer that does not behave: its message fits a frame, and its JSON does not fit a packet to the agent."""
    here, there = tcp_pair()
    pair.begin(pair.destination, there)
    tls = TlsConnection(SOURCE, "client")
    tls.start()
    while not tls.established:
        here.sendall(tls.bytes_to_send())
        tls.receive(here.recv(65_536))
    tls.send(encode_frame(FrameKind.HELLO, hello_of("source").encode()))
    tls.send(encode_frame(FrameKind.MESSAGE, payload))
    here.sendall(tls.bytes_to_send())
    failed = pair.destination.until(Failed)
    assert (failed.code, failed.by_peer) == ("peer.message", False)
    assert pair.destination.ends() == (0, "")
    here.close()


def test_a_cut_lane(pair: Pair) -> None:
    pair.meet()
    pair.open_lanes(2)
    pair.held[1].shutdown(socket.SHUT_RDWR)
    for enclave in (pair.source, pair.destination):
        assert enclave.until(Failed).code in {"lane.truncated", "lane.cut"}
        assert enclave.ends() == (0, "")


def test_a_peers_reason_is_preferred_to_a_broken_lane(pair: Pair) -> None:
    pair.meet()
    pair.open_lanes(1)
    pair.held[0].shutdown(socket.SHUT_RDWR)
    pair.destination.call(Abort("migration.destination-died", "QEMU ended"))
    failed = pair.source.until(Failed)
    assert failed == Failed("migration.destination-died", "the peer says: QEMU ended", by_peer=True)


def _flip_at(position: int) -> Callable[[int, bytes], bytes]:
    def change(offset: int, data: bytes) -> bytes:
        if not offset <= position < offset + len(data):
            return data
        changed = bytearray(data)
        changed[position - offset] ^= 1
        return bytes(changed)

    return change


OPENING = OVERHEAD_BYTES


@pytest.mark.parametrize(
    ("position", "code"),
    [(OPENING + 0, "lane.malformed"), (OPENING + 15, "lane.integrity"), (OPENING + 20, "lane.foreign"),
     (OPENING + 30, "lane.integrity")],
    ids=["kind", "sequence", "identifier", "ciphertext"],
)  # fmt: skip
def test_a_changed_record_is_found_and_its_finders_reason_is_told_at_both_ends(
    pair: Pair, position: int, code: str
) -> None:
    pair.meet()
    pair.open_lanes(1, passing(_flip_at(position)))
    pair.vms[0][0].sendall(b"x" * 1000)
    failed = pair.destination.until(Failed)
    assert (failed.code, failed.by_peer) == (code, False)
    told = pair.source.until(Failed)  # its own lane broke as well, which says less
    assert (told.code, told.by_peer) == (code, True)


def test_bytes_slipped_into_a_lane(pair: Pair) -> None:
    pair.meet()
    pair.open_lanes(1)
    pair.held[0].sendall(b"\x02" + bytes(99))
    assert pair.destination.until(Failed).code == "lane.malformed"
    told = pair.source.until(Failed)
    assert (told.code, told.by_peer) == ("lane.malformed", True)


def test_a_lane_that_nobody_expects(pair: Pair) -> None:
    pair.meet()
    pair.destination.call(ExpectLanes(1))
    here, there = tcp_pair()
    pair.destination.call(AcceptLane(1), there)
    failed = pair.destination.until(Failed)
    assert failed.code == "peer.preface"
    told = pair.source.until(Failed)
    assert told == Failed("peer.preface", "the peer says: lane 1 is not expected", by_peer=True)
    assert here.recv(1) == b""
    here.close()


# ---- what they gave up


def test_a_live_enclave_is_hardened(pair: Pair) -> None:
    pair.meet()
    process = Path(f"/proc/{pair.source.pid}")
    assert "\nNoNewPrivs:\t1\n" in (process / "status").read_text()
    (core,) = [line for line in (process / "limits").read_text().splitlines() if line.startswith("Max core file size")]
    assert core.split()[4:6] == ["0", "0"]
    assert (process / "environ").stat().st_uid == 0  # a process that is not dumpable belongs to root, proc(5)
    assert int((process / "status").read_text().partition("SigIgn:\t")[2].split()[0], 16) >> (signal.SIGINT - 1) & 1


def test_an_enclave_inherits_one_socket_and_no_environment(pair: Pair) -> None:
    process = Path(f"/proc/{pair.source.pid}")
    pair.meet()
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            (process / "environ").read_bytes()  # not dumpable: only root may look
        return
    names = {entry.partition(b"=")[0] for entry in (process / "environ").read_bytes().split(b"\0") if entry}
    assert names == {b"LANG", b"OPENBLAS_NUM_THREADS"}
    kinds = [os.readlink(entry).partition(":")[0] for entry in (process / "fd").iterdir()]
    assert kinds.count("socket") == 5  # calls, the channel, the quoting process, and the pair that wakes the loop
