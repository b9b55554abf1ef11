"""The man in the middle does what it was told, and nothing else."""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sealane.testing.wiretap import (
    Address,
    Recorder,
    Tamper,
    Wiretap,
    cut_after,
    drop,
    duplicate,
    flip_bit,
    inject,
    stall_after,
    swap,
)

DATA = random.Random(1).randbytes(3_000_000)


class Sink:
    """Takes connections one after another; keeps what came, and answers with its length at the end."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.received: list[bytes] = []
        self.ended = threading.Semaphore(0)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection = self.server.accept()[0]
            except OSError:
                return
            with connection:
                data = bytearray()
                self.received.append(b"")
                try:
                    while chunk := connection.recv(1 << 16):
                        data += chunk
                        self.received[-1] = bytes(data)
                    connection.sendall(f"{len(data)}".encode())
                except OSError:
                    pass
            self.ended.release()

    @property
    def address(self) -> Address:
        name: Address = self.server.getsockname()
        return name


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.server.shutdown(socket.SHUT_RDWR)
    made.server.close()
    made.thread.join(10)


def send(address: Address, data: bytes = DATA) -> bytes:
    """Sends all, closes its half, and gives the answer."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


CHANGES: list[tuple[Tamper, Callable[[bytes], bytes]]] = [
    (drop("forward", offset=10, length=5), lambda data: data[:10] + data[15:]),
    (duplicate("forward", offset=600_000, length=300_000), lambda data: data[:900_000] + data[600_000:]),
    (
        swap("forward", offset=100, lengths=(7, 400_000)),
        lambda data: data[:100] + data[107:400_107] + data[100:107] + data[400_107:],
    ),
    (inject("forward", offset=3, data=lambda: b"foreign"), lambda data: data[:3] + b"foreign" + data[3:]),
    (flip_bit("back", offset=9_999_999), lambda data: data),
    (flip_bit("forward", offset=3, connection=7), lambda data: data),
]


@pytest.mark.parametrize(("tamper", "expected"), CHANGES, ids=["drop", "duplicate", "swap", "inject", "late", "other"])
def test_changes(sink: Sink, tamper: Tamper, expected: Callable[[bytes], bytes]) -> None:
    with Wiretap(sink.address, tampers=[tamper]) as wire:
        answer = send(wire.address)
    assert sink.received == [expected(DATA)]
    assert answer == f"{len(expected(DATA))}".encode()


def test_flips_exactly_one_bit(sink: Sink) -> None:
    with Wiretap(sink.address, tampers=[flip_bit("forward", offset=2_000_000, bit=5)]) as wire:
        send(wire.address)
    difference = int.from_bytes(sink.received[0], "little") ^ int.from_bytes(DATA, "little")
    assert difference == 1 << (2_000_000 * 8 + 5)


@pytest.mark.parametrize("reset", [False, True])
def test_cuts(sink: Sink, reset: bool) -> None:
    with Wiretap(sink.address, tampers=[cut_after("forward", offset=1_234, reset=reset)]) as wire:
        with socket.create_connection(wire.address, timeout=20) as connection:
            connection.sendall(DATA[:2_000])
            if reset:
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
            else:
                # the relay left bytes unread, so the kernel may say reset in place of end
                with suppress(ConnectionResetError):
                    assert connection.recv(100) in {b"", b"1234"}
        assert wire.failures == []
    if not reset:  # a reset may overtake what was sent before it
        assert sink.ended.acquire(timeout=10)
        assert sink.received == [DATA[:1_234]]


def test_stalls_until_released(sink: Sink) -> None:
    with (
        Wiretap(sink.address, tampers=[stall_after("forward", offset=1_000)]) as wire,
        socket.create_connection(wire.address, timeout=20) as connection,
    ):
        connection.sendall(DATA[:5_000])
        connection.shutdown(socket.SHUT_WR)
        assert wire.stalled.wait(10)
        assert len(b"".join(sink.received)) <= 1_000
        wire.release()
        assert connection.recv(100) == b"5000"
    assert sink.received == [DATA[:5_000]]


def test_records_and_injects_from_another_connection(sink: Sink, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    replay = inject("forward", offset=0, connection=1, data=lambda: recorder.recorded(0, "forward"))
    with Wiretap(sink.address, tampers=[recorder, replay]) as wire:
        send(wire.address, b"first")
        send(wire.address, b"second")
        assert wire.connections == 2
    assert sink.received == [b"first", b"firstsecond"]
    assert recorder.recorded(0, "back") == b"5"
    assert recorder.contains(b"second")
    assert not recorder.contains(b"third")


def test_a_broken_tamper_fails_the_test(sink: Sink) -> None:
    def broken(connection: int, direction: str, offset: int, data: bytes) -> bytes:
        raise KeyError("mine")

    def use() -> None:
        with Wiretap(sink.address, tampers=[broken]) as wire, suppress(OSError):
            send(wire.address)

    with pytest.raises(KeyError, match="mine"):
        use()


def test_leaving_with_open_connections_closes_them(sink: Sink) -> None:
    with Wiretap(sink.address) as wire:
        connection = socket.create_connection(wire.address, timeout=20)
        connection.sendall(b"x")
    with connection, suppress(ConnectionResetError):
        assert connection.recv(1) == b""
