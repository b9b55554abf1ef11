"""Plain libvirt's migration between two simulated hosts, through relays that a test may meddle with: the yardstick."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from sealane.libvirt.binding import load
from sealane.libvirt.rpc import MessageReader, Procedure
from sealane.libvirt.rpcfilter import MigrateFlag
from sealane.testing.libvirt import LibvirtHost

_DIRECTORY = "plain"
MEMORY_SOCKET = f"/run/{_DIRECTORY}/memory.sock"
_READ_BYTES = 256 * 1024

# Bytes of one direction go in, bytes to send on come out; None breaks the connection.
Meddle = Callable[[bytes], bytes | None]


def as_it_is(data: bytes) -> bytes:
    """Change nothing."""
    return data


def lose_the_answer_to_finish() -> Meddle:
    """Break the connection in place of the answer to Finish."""
    reader = MessageReader()

    def meddle(data: bytes) -> bytes | None:
        finished = any(each.procedure == Procedure.DOMAIN_MIGRATE_FINISH3_PARAMS for each in reader.feed(data))
        return None if finished else data

    return meddle


def flip_bit_at(offset: int) -> Meddle:
    """Invert one bit of the byte at `offset`."""
    passed = 0

    def meddle(data: bytes) -> bytes:
        nonlocal passed
        at, passed = offset - passed, passed + len(data)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if 0 <= at < len(data) else data

    return meddle


class Relay:
    """A unix socket that leads to another one."""

    def __init__(self, listen: Path, target: Path, forward: Meddle, back: Meddle) -> None:
        self.bytes_forward = 0
        self._target, self._forward, self._back = target, forward, back
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(self._target))
            self._open += [near, far]
            threading.Thread(target=self._pump, args=(near, far, self._forward, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, self._back, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, meddle: Meddle, is_forward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                self.bytes_forward += len(data) if is_forward else 0
                changed = meddle(data)
                if changed is None:
                    source.shutdown(socket.SHUT_RDWR)
                    break
                sink.sendall(changed)
            sink.shutdown(socket.SHUT_WR if meddle is as_it_is else socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections that are open; later ones are led on."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close everything."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for each in (self._listener, *self._open):
            each.close()


def _directories(source: LibvirtHost, destination: LibvirtHost) -> list[Path]:
    """Where the sockets lie at both ends, empty."""
    made = [each.socket.parents[1] / _DIRECTORY for each in (source, destination)]
    for directory in made:
        directory.mkdir(exist_ok=True)
        for left in directory.iterdir():
            left.unlink()
    return made


@contextlib.contextmanager
def relay_memory(source: LibvirtHost, destination: LibvirtHost) -> Iterator[Relay]:
    """A way for the memory alone, from `MEMORY_SOCKET` at the source to the same path at the destination."""
    here, there = (each / Path(MEMORY_SOCKET).name for each in _directories(source, destination))
    with contextlib.closing(Relay(here, there, as_it_is, as_it_is)) as relay:
        yield relay


@contextlib.contextmanager
def _relays(source: LibvirtHost, destination: LibvirtHost, memory: Meddle, answers: Meddle) -> Iterator[list[Relay]]:
    here, there = _directories(source, destination)
    relays = [
        Relay(here / "memory.sock", there / "memory.sock", memory, as_it_is),
        Relay(here / "libvirt.sock", destination.socket, as_it_is, answers),
    ]
    try:
        yield relays
    finally:
        for each in relays:
            each.close()


def migrate_plainly(
    source: LibvirtHost,
    destination: LibvirtHost,
    name: str,
    *,
    memory: Meddle = as_it_is,
    answers: Meddle = as_it_is,
) -> tuple[str | None, int]:
    """A live migration with libvirt alone, not paused; what libvirt complained of, and the bytes of memory that went over."""
    libvirt = load()
    with _relays(source, destination, memory, answers) as (ram, _rpc):
        here = libvirt.open(source.uri)
        there = libvirt.open(f"qemu+unix:///system?socket={source.socket.parents[1] / _DIRECTORY / 'libvirt.sock'}")
        parameters = {"migrate_uri": f"unix://{MEMORY_SOCKET}"}
        problem = None
        try:
            here.lookupByName(name).migrate3(there, parameters, MigrateFlag.LIVE)
        except libvirt.libvirtError as error:
            problem = str(error)
        finally:
            for each in (here, there):
                with contextlib.suppress(libvirt.libvirtError):
                    each.close()
        return problem, ram.bytes_forward
