"""An attacker with connections of his own: one who repeats recordings, floods a port, or waits where a host should be.

He knows how connections begin (docs/protocol.md) and has no key that anybody trusts. Standard library only; the certificate of the
false destination is made with openssl(1).
"""

import secrets
import socket
import ssl
import struct
import subprocess
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

from sealane.lab.pcap import Conversation

Address: TypeAlias = tuple[str, int]
_TIMEOUT_S: Final = 20.0
_PREFACE: Final = struct.Struct(">7sBBBHI16s")
_PREFACE_BYTES: Final = _PREFACE.size
_CHANNEL, _LANE = 1, 2
_REFUSE: Final = 2


def preface(*, kind: int = _CHANNEL, lane: int = 0, version: int = 3) -> bytes:
    """The first bytes of a Sealane connection, with a label by chance."""
    return _PREFACE.pack(b"sealane", version, kind, 0, lane, 0, secrets.token_bytes(16))


def play(address: Address, conversations: list[Conversation]) -> list[tuple[str, int]]:
    """Open each recorded connection anew and say what its client said; gives for each how it ended and how much came back."""
    ended = []
    with ExitStack() as stack:
        opened = []
        for conversation in conversations:
            connection = stack.enter_context(socket.create_connection(address, timeout=_TIMEOUT_S))
            opened.append(connection)
            with suppress(OSError):
                connection.sendall(conversation.forward.data)
        for connection in opened:
            ended.append(_drain(connection))
    return ended


def _drain(connection: socket.socket) -> tuple[str, int]:
    received = 0
    try:
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(1 << 16):
            received += len(data)
    except TimeoutError:
        return "still open", received
    except OSError:
        return "reset", received
    return "closed", received


@dataclass
class Flood:
    """Holds as many connections to an address as it may, of every kind that a false source can make. A context manager."""

    address: Address
    connections: int = 300
    opened: int = 0
    _held: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> "Flood":
        says = (
            b"",
            preface()[:20],
            preface(),
            preface() + secrets.token_bytes(200),
            preface(kind=_LANE),
            b"QEVM\0\0\0\3" + bytes(64),
        )
        for number in range(self.connections):
            with suppress(OSError):
                connection = socket.create_connection(self.address, timeout=_TIMEOUT_S)
                self._held.append(connection)
                connection.sendall(says[number % len(says)])
                self.opened += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._held:
            connection.close()


def offer_old_tls(address: Address) -> str:
    """Begin a channel with TLS 1.2 at most; gives what came of it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        with socket.create_connection(address, timeout=_TIMEOUT_S) as connection:
            connection.sendall(preface())
            with context.wrap_socket(connection) as channel:
                return f"accepted: {channel.version()}"
    except (OSError, ssl.SSLError) as error:
        return f"refused: {getattr(error, 'reason', None) or error or type(error).__name__}"


class FalseDestination:
    """Listens where a source will be led, and speaks TLS 1.3 with a certificate of its own. A context manager.

    `received` is what the source said inside the channel: nothing, unless it took this host for another.
    """

    def __init__(self, directory: Path, listener: socket.socket) -> None:
        self._files = make_certificate(directory)
        self._listener = listener
        self.received = b""
        self.connections = 0
        self.ended = ""
        self._thread = threading.Thread(target=self._serve, name="false destination", daemon=True)

    @property
    def was_refused(self) -> bool:
        """Whether all that the source said is one frame REFUSE (docs/protocol.md, Frames)."""
        frame = self.received
        return len(frame) > 5 and frame[4] == _REFUSE and int.from_bytes(frame[:4], "big") == len(frame) - 4

    def __enter__(self) -> "FalseDestination":
        self._listener.settimeout(_TIMEOUT_S)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(_TIMEOUT_S)

    def _serve(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self._files)
        try:
            connection, _ = self._listener.accept()
            self.connections += 1
            connection.settimeout(_TIMEOUT_S)
            with connection:
                begun = connection.recv(_PREFACE_BYTES, socket.MSG_WAITALL)
                if begun[:7] != b"sealane":
                    self.ended = "no channel of Sealane's"
                    return
                with context.wrap_socket(connection, server_side=True) as channel:
                    self.received = channel.recv(1 << 16)
                    self.ended = "the source spoke" if self.received else "the source hung up"
        except (OSError, ssl.SSLError) as error:
            self.ended = str(error) or type(error).__name__


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed Ed25519 certificate and its key, that nobody trusts."""
    directory.mkdir(parents=True, exist_ok=True)
    certificate, key = directory / "false.crt", directory / "false.key"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ed25519",
            "-nodes",
            "-subj",
            "/CN=host-b",
            "-days",
            "2",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
        timeout=_TIMEOUT_S,
    )
    return certificate, key
