"""Two enclave processes, the agents' ends of their call sockets, and a network that the test holds in its hands."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from sealane.crypto.identity import Identity
from sealane.enclave.interface import (
    LAUNCHER_ENVIRONMENT,
    AcceptLane,
    AttachVm,
    Begin,
    CallSocket,
    Ecall,
    ExpectLanes,
    Failed,
    LanesOpen,
    LaneTokens,
    Ocall,
    OpenLanes,
    PeerEstablished,
    Sandboxed,
    VmWanted,
    socket_pair,
)
from sealane.enclave.launcher import PACKET_MAX, REQUEST, STARTED
from sealane.host.migration.enclave_launcher import ENCLAVE_USER, enclave_ids
from sealane.paths import isolated_module
from sealane.session.preface import PREFACE_BYTES, ConnectionKind, Preface, parse_preface
from tests.enclave.quoting import Quote, quoting_line
from tests.session.rig import DESTINATION, MIGRATION, NOW, SOURCE, SUBJECT

T = TypeVar("T", bound=Ocall)
# A hung enclave fails a test after this; nothing waits so long when all is well.
PATIENCE_S: Final = 20.0


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection over loopback: who dialled, who accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    for end in (dialled, accepted):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.settimeout(PATIENCE_S)
    return dialled, accepted


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        assert piece, f"the connection ended after {len(data)} of {count} bytes"
        data += piece
    return data


def open_descriptors() -> set[str]:
    """What this process holds open."""
    links = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(f"{entry} {os.readlink(f'/proc/self/fd/{entry}')}")
    return {link for link in links if "/proc/" not in link}


class Launcher:
    """A real launcher, as an agent starts it; the enclaves are this process's children."""

    def __init__(self) -> None:
        self.control, theirs = socket_pair()
        self.control.settimeout(PATIENCE_S)
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self.process = subprocess.Popen(
                isolated_module("sealane.enclave", theirs.fileno(), *enclave_ids(ENCLAVE_USER)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                stderr=self.stderr,
                env=LAUNCHER_ENVIRONMENT,
            )

    def fork(self, calls: socket.socket) -> tuple[int, int]:
        """A fresh enclave on that end of a call socket: (pid, pidfd)."""
        socket.send_fds(self.control, [REQUEST], [calls.fileno()])
        packet, descriptors, _, _ = socket.recv_fds(self.control, PACKET_MAX, 1)
        assert packet.startswith(STARTED), packet
        (pidfd,) = descriptors
        return int(packet.removeprefix(STARTED)), pidfd

    def words(self) -> str:
        """What it and its enclaves wrote to stderr."""
        self.stderr.seek(0)
        return self.stderr.read().decode()

    def close(self) -> None:
        """End it."""
        self.control.close()
        assert self.process.wait(PATIENCE_S) == 0, self.words()
        self.stderr.close()


class Enclave:
    """A real enclave process and the agent's end of its call socket."""

    def __init__(self, identity: Identity, launcher: Launcher) -> None:
        mine, theirs = socket_pair()
        mine.settimeout(PATIENCE_S)
        self.launcher = launcher
        with theirs:
            self.pid, self._pidfd = launcher.fork(theirs)
        self.status: int | None = None
        self.identity = identity
        self.calls = CallSocket(mine)
        self.heard: list[Ocall] = []
        self.measures = self.until(Sandboxed).measures

    def call(self, call: Ecall, *sockets: socket.socket) -> None:
        """An ecall; the sockets are the enclave's alone afterwards."""
        self.calls.send(call, [each.fileno() for each in sockets])
        for each in sockets:
            each.close()

    def until(self, kind: type[T]) -> T:
        """The next ocall of this kind; fails the test where the enclave fails or ends before."""
        while True:
            received = self.calls.receive()
            assert received is not None, f"ended before {kind.__name__}; heard {self.heard}"
            call, sockets = received
            assert sockets == []
            self.heard.append(call)  # type: ignore[arg-type]
            if isinstance(call, kind):
                return call
            assert not isinstance(call, Failed), call

    def ends(self) -> tuple[int, str]:
        """Wait for the process's end: its exit status (less than 0: the signal), and what was written to stderr."""
        if self.status is None:
            assert select.select([self._pidfd], [], [], PATIENCE_S)[0], "the enclave does not end"
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            assert ended is not None
            self.status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return self.status, self.launcher.words()

    def kill(self) -> None:
        """End it at once."""
        if self.status is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Nothing is left, whatever happened."""
        self.calls.close()
        self.kill()
        self.ends()
        os.close(self._pidfd)


Between = Callable[[socket.socket, socket.socket], None]


@dataclass
class Pair:
    """A source's and a destination's enclave."""

    source: Enclave
    destination: Enclave
    directory: Path
    quotes: dict[str, Quote] = field(default_factory=dict)
    reattest_every_s: float = 600.0
    destination_reattests_every_s: float | None = None  # where it differs

    def __post_init__(self) -> None:
        self.vms: dict[int, tuple[socket.socket, socket.socket]] = {}
        self.held: list[socket.socket] = []
        self.threads: list[threading.Thread] = []

    def begin(self, enclave: Enclave, connection: socket.socket, **trusted: str) -> None:
        """Begin with the usual facts."""
        role, peer = ("source", DESTINATION) if enclave is self.source else ("destination", SOURCE)
        line, thread = quoting_line(enclave.identity, quote=self.quotes.get(role))
        own = self.destination_reattests_every_s if role == "destination" else None
        self.threads.append(thread)
        enclave.call(
            Begin(
                role=role,
                migration=MIGRATION,
                key_pem=enclave.identity.key_pem.decode(),
                certificate_pem=enclave.identity.certificate_pem.decode(),
                trusted=trusted or {peer.fingerprint: peer.name},
                protection="sealed",
                now=NOW.isoformat(),
                vm=SUBJECT.vm if role == "source" else "",
                epoch=SUBJECT.epoch if role == "source" else 0,
                reattest_every_s=self.reattest_every_s if own is None else own,
            ),
            connection,
            line,
        )

    def meet(self) -> tuple[PeerEstablished, PeerEstablished]:
        """The channel stands."""
        here, there = tcp_pair()
        self.begin(self.source, here)
        preface = parse_preface(receive_exactly(there, PREFACE_BYTES))
        assert preface == Preface(ConnectionKind.CHANNEL, bytes.fromhex(MIGRATION))
        self.begin(self.destination, there)
        return self.source.until(PeerEstablished), self.destination.until(PeerEstablished)

    def open_lanes(self, count: int, between: Between | None = None, *, attached: int = 0) -> None:
        """Lanes are open, and a stand-in for the source's QEMU has dialled each but the last `attached`. `between` sits on
        lane 0's network."""
        listener = socket.socket(socket.AF_UNIX)
        path = str(self.directory / "out.sock")
        listener.bind(path)
        listener.listen(count)
        ends = [tcp_pair() for _ in range(count)]
        self.held = [end.dup() for end, _ in ends]
        self.destination.call(ExpectLanes(count))
        lanes = self.destination.until(LaneTokens).lanes
        tokens = {int(lane): bytes.fromhex(token) for token, lane in lanes.items()}
        assert len(tokens) == count
        self.source.call(OpenLanes(attached=attached), listener, *(end for end, _ in ends))
        for lane, (_, there) in enumerate(ends):
            preface = parse_preface(receive_exactly(there, PREFACE_BYTES))
            assert preface == Preface(ConnectionKind.LANE, tokens[lane], lane)
            arriving = there
            if between is not None and lane == 0:
                inner, arriving = tcp_pair()
                self.run(between, there, inner)
            self.destination.call(AcceptLane(lane), arriving)
        self.source.until(LanesOpen)
        self.destination.until(LanesOpen)
        for lane in range(count - attached):
            vm = socket.socket(socket.AF_UNIX)
            vm.settimeout(PATIENCE_S)
            vm.connect(path)
            self.vms[lane] = (vm, vm)

    def attach(self, *, lanes: int) -> None:
        """Give the destination's QEMU to each lane that asks for it; each must have been sent something."""
        for _ in range(lanes):
            lane = self.destination.until(VmWanted).lane
            mine, theirs = socket.socketpair()
            mine.settimeout(PATIENCE_S)
            self.destination.call(AttachVm(lane), theirs)
            self.vms[lane] = (self.vms[lane][0], mine)

    def run(self, target: Callable[..., None], *arguments: object) -> threading.Thread:
        """A thread that ends before the test does."""
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def close(self) -> None:
        """Nothing is left."""
        for enclave in (self.source, self.destination):
            enclave.close()
        for each in [*self.held, *(end for ends in self.vms.values() for end in ends)]:
            each.close()
        for thread in self.threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@contextlib.contextmanager
def two_enclaves(directory: Path) -> Iterator[Pair]:
    """A pair; every process, thread and socket of it is gone afterwards."""
    with a_launcher() as launcher:
        pair = Pair(Enclave(SOURCE, launcher), Enclave(DESTINATION, launcher), directory)
        try:
            yield pair
        finally:
            pair.close()


@contextlib.contextmanager
def a_launcher() -> Iterator[Launcher]:
    """A launcher; it is gone afterwards."""
    launcher = Launcher()
    try:
        yield launcher
    finally:
        launcher.close()


def passing(change: Callable[[int, bytes], bytes]) -> Between:
    """A network that changes what goes towards the destination; `change` gets the offset and the bytes."""

    def between(outer: socket.socket, inner: socket.socket) -> None:
        def back() -> None:
            with contextlib.suppress(OSError):
                while data := inner.recv(65_536):
                    outer.sendall(data)

        returning = threading.Thread(target=back, daemon=True)
        returning.start()
        offset = 0
        with contextlib.suppress(OSError):
            while data := outer.recv(65_536):
                inner.sendall(change(offset, data))
                offset += len(data)
        for end in (inner, outer):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        returning.join(PATIENCE_S)
        inner.close()
        outer.close()

    return between
