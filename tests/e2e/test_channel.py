"""The channel and the port: strangers, expired certificates, old TLS, garbage, silence; and bytes changed in TLS."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sealane.crypto.identity import Identity, create_identity
from sealane.host.models import Peer
from sealane.limits import LOADED_TIMEOUT_S
from sealane.session.preface import PREFACE_BYTES, ConnectionKind, Preface, encode_preface
from sealane.testing.faults import dial, flip, on_channel, on_preface, replay, serve, stall
from sealane.testing.pair import AgentHost, make_pair
from sealane.testing.wiretap import Direction, cut_after, flip_bit
from tests.e2e.rig import HARDWARE, SLOWLY, WORKLOAD, Rig, make_rig

pytestmark = pytest.mark.e2e

LONG_AGO = datetime.now(UTC) - timedelta(days=400)


# Changed on the way


@pytest.mark.parametrize(
    ("direction", "offset"),
    [("forward", PREFACE_BYTES + 60), ("back", 100), ("forward", 2500), ("back", 1500)],
    ids=["client hello", "server hello", "source's certificate", "destination's certificate"],
)
def test_bit_flipped_in_the_handshake(rig: Rig, direction: Direction, offset: int) -> None:
    attempt = rig.attempt(flip_bit(direction, offset=offset, connection=0))
    rig.assert_aborted(attempt, "peer.tls", "peer.closed")


@pytest.mark.parametrize("change", [flip("tag"), replay], ids=["flipped", "replayed"])
def test_channel_changed_before_the_hand_over(rig: Rig, change: Any) -> None:
    """The destination's word that it has loaded everything does not arrive as it was: the VM is not handed over."""
    armed = threading.Event()
    attempt = rig.attempt(
        on_channel(armed=armed, direction="back", change=change), during=lambda _: armed.set(), at_bytes=1, **SLOWLY
    )
    rig.assert_aborted(attempt, "peer.tls", "peer.closed")


def test_last_word_held_back() -> None:
    """Nobody has given the VM up yet, so its pause ends soon, and not with the patience that a launch deserves."""
    with make_rig(settings="[limits]\nword_timeout_s = 1.0\n") as rig:
        armed = threading.Event()
        begun = time.monotonic()
        attempt = rig.attempt(
            on_channel(armed=armed, direction="back", change=stall), during=lambda _: armed.set(), at_bytes=1, **SLOWLY
        )
        assert time.monotonic() - begun < LOADED_TIMEOUT_S
        rig.assert_aborted(attempt, "peer.slow", "peer.closed")


def test_channel_cut(rig: Rig) -> None:
    attempt = rig.attempt(cut_after("back", offset=2000, connection=0))
    rig.assert_aborted(attempt, "peer.tls", "peer.closed")


def test_preface_of_the_channel_changed(rig: Rig) -> None:
    attempt = rig.attempt(on_preface(lane=None, change=flip("kind")))
    rig.assert_aborted(attempt, "peer.tls", "peer.closed")
    assert "connection without a fitting preface" in said_by(rig.away)


# Who the peer is


def test_source_is_not_trusted(rig: Rig) -> None:
    with rig.away.client() as client:
        client.remove_peer(rig.home.name)
    try:
        attempt = rig.attempt()
        rig.assert_aborted(attempt, "peer.unknown")
        assert attempt.destination is None
        assert "peer.unknown" in said_by(rig.away)
    finally:
        rig.away.trust(rig.home)


def test_destination_is_another(rig: Rig) -> None:
    other = create_identity("other", now=datetime.now(UTC))
    with rig.home.client() as client:
        client.remove_peer(rig.away.name)
        host = rig.away.host
        client.add_peer(Peer(name=rig.away.name, fingerprint=other.fingerprint, address=host.address, port=host.port))
    try:
        attempt = rig.attempt()
        rig.assert_aborted(attempt, "peer.unknown")
    finally:
        with rig.home.client() as client:
            client.remove_peer(rig.away.name)
        rig.home.trust(rig.away)


def test_peer_unreachable(rig: Rig) -> None:
    with rig.home.client() as client:
        peer = Peer(
            name=rig.away.name, fingerprint=rig.away.identity.fingerprint, address=rig.away.host.address, port=1
        )
        client.add_peer(peer)
    try:
        rig.assert_aborted(rig.attempt(), "peer.unreachable")
    finally:
        rig.home.trust(rig.away)


@pytest.mark.parametrize("expired", [0, 1], ids=["source", "destination"])
def test_expired_certificate(expired: int) -> None:
    born = [None, None]
    born[expired] = LONG_AGO  # type: ignore[call-overload]
    with make_pair(born=born) as pair:
        guest = pair.add_guest(hardware=HARDWARE, workload=WORKLOAD)
        pair.start_guest(guest, pair.a)
        rig = Rig(pair, guest, pair.a, pair.b)
        rig.settings = rig.settings_of(pair.a)
        with pair.a.client() as client:
            client.vms()
        rig.note_descriptors()
        rig.assert_aborted(rig.attempt(), "peer.expired")
        assert "expired" in said_by((pair.b, pair.a)[expired])


# Peers that speak something else


def test_client_speaks_tls_1_2(rig: Rig, tmp_path: Path) -> None:
    stranger = create_identity("stranger", now=datetime.now(UTC))
    context = tls_1_2(ssl.PROTOCOL_TLS_CLIENT, stranger, tmp_path)
    connection = dial(rig.home.host, rig.away.host)
    connection.sendall(encode_preface(Preface(ConnectionKind.CHANNEL, b"\x12" * 16)))
    with connection, pytest.raises((ssl.SSLError, ConnectionError)), context.wrap_socket(connection):
        pass
    wait_said(rig.away, '"code": "peer.tls-version"')
    rig.assert_goes_on()


def test_server_speaks_tls_1_2(rig: Rig, tmp_path: Path) -> None:
    stranger = create_identity("stranger", now=datetime.now(UTC))
    context = tls_1_2(ssl.PROTOCOL_TLS_SERVER, stranger, tmp_path)

    def handshake(connection: socket.socket) -> None:
        connection.recv(PREFACE_BYTES, socket.MSG_WAITALL)
        with context.wrap_socket(connection, server_side=True):
            pass

    with impostor(rig, stranger, handshake):
        attempt = rig.attempt()
    rig.assert_aborted(attempt, "peer.tls-version")


def test_server_speaks_no_tls(rig: Rig) -> None:
    stranger = create_identity("stranger", now=datetime.now(UTC))
    with impostor(rig, stranger, lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n" * 20)):
        attempt = rig.attempt()
    rig.assert_aborted(attempt, "peer.tls", "peer.tls-version")


def test_server_says_nothing(rig: Rig) -> None:
    stranger = create_identity("stranger", now=datetime.now(UTC))
    over = threading.Event()
    with impostor(rig, stranger, lambda connection: over.wait(30.0)):
        attempt = rig.attempt()
        over.set()
    rig.assert_aborted(attempt, "peer.slow")


# The port


def test_garbage_for_a_preface(rig: Rig) -> None:
    for garbage in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2, bytes(32), b"\xff" * 4096, b"sealane\x07" + bytes(24)):
        with dial(rig.home.host, rig.away.host) as connection:
            connection.sendall(garbage)
            assert is_closed(connection)
    rig.assert_goes_on()


def test_lane_that_nobody_awaits(rig: Rig) -> None:
    with dial(rig.home.host, rig.away.host) as connection:
        connection.sendall(encode_preface(Preface(ConnectionKind.LANE, b"\x34" * 16, 0)))
        assert is_closed(connection)
    rig.assert_goes_on()


def test_stranger_who_read_the_migration_id(rig: Rig) -> None:
    """What a channel's preface shows is enough to be turned away with: the lanes' places stay free, the VM arrives."""
    seen: dict[str, bytes] = {}

    def read_on_the_way(connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        if direction == "forward" and offset == 0 and connection == 0:
            seen["id"] = data[PREFACE_BYTES - 16 : PREFACE_BYTES]
        return data

    def flood() -> None:
        while not over.wait(0.01):
            for lane in range(3):
                with suppress(OSError), dial(rig.home.host, rig.away.host) as connection:
                    connection.sendall(encode_preface(Preface(ConnectionKind.LANE, seen.get("id", bytes(16)), lane)))
                    turned_away.append(is_closed(connection))

    over, turned_away = threading.Event(), list[bool]()
    stranger = threading.Thread(target=flood, name="stranger")
    stranger.start()
    try:
        attempt = rig.attempt(read_on_the_way, **SLOWLY)
    finally:
        over.set()
        stranger.join()
    assert "id" in seen
    assert turned_away
    assert all(turned_away)
    rig.assert_arrived(attempt)


def test_endless_preface(rig: Rig) -> None:
    """A byte now and then does not keep a connection: the whole preface has a time, not each byte."""
    with dial(rig.home.host, rig.away.host) as connection:
        begun = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() < begun + 15.0:
                connection.sendall(b"s")
                time.sleep(0.5)
        assert time.monotonic() < begun + 12.0
    rig.assert_goes_on()


def test_thousand_idle_connections(rig: Rig) -> None:
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(dial(rig.home.host, rig.away.host))
        attempt = rig.attempt()
        assert attempt.source.state == "completed", attempt.source.problem
        rig.guest.wait_ticks(2)
        assert len(rig.home.descriptors()) < 400
    rig.assert_arrived(attempt)


def test_channels_that_stay_silent(rig: Rig) -> None:
    """A preface opens an enclave, so their number is bounded; those who say nothing more make room for a peer."""
    with ExitStack() as stack:
        for number in range(12):
            connection = stack.enter_context(dial(rig.home.host, rig.away.host))
            connection.sendall(encode_preface(Preface(ConnectionKind.CHANNEL, bytes([number]) * 16)))
        attempt = rig.attempt()
        assert attempt.source.state == "completed", attempt.source.problem
    rig.assert_arrived(attempt)


def test_afterwards_it_migrates(rig: Rig) -> None:
    rig.migrate_and_return()


def said_by(end: AgentHost) -> str:
    assert end.agent is not None
    return end.agent.output


def wait_said(end: AgentHost, text: str) -> None:
    assert end.agent is not None
    end.agent.wait_for(text)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end closes without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def tls_1_2(side: Any, identity: Identity, directory: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    both = directory / "both.pem"
    both.write_bytes(identity.key_pem + identity.certificate_pem)
    context.load_cert_chain(both)
    return context


@contextmanager
def impostor(rig: Rig, identity: Identity, behave: Any) -> Iterator[None]:
    """Where the source looks for its destination somebody else answers, once."""

    def work() -> None:
        try:
            connection, _ = listener.accept()
            with connection:
                behave(connection)
        except (OSError, ssl.SSLError):
            pass

    with serve(rig.home.host) as listener:
        listener.settimeout(30.0)
        thread = threading.Thread(target=work, name="impostor")
        thread.start()
        address, port = listener.getsockname()
        with rig.home.client() as client:
            client.remove_peer(rig.away.name)
            client.add_peer(Peer(name=rig.away.name, fingerprint=identity.fingerprint, address=address, port=port))
        try:
            yield
        finally:
            with rig.home.client() as client:
                client.remove_peer(rig.away.name)
            rig.home.trust(rig.away)
            thread.join(40.0)
