"""Real keepers and swtpms, with stand-ins for QEMU (which speaks its control channel) and for the rest of the enclave."""

import fcntl
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sealane.enclave.vtpm import VtpmStates
from sealane.errors import SealaneError
from sealane.vtpm.control import BlobType, Command
from sealane.vtpm.envelope import Journey, StateSealer
from sealane.vtpm.keeper import call_keeper
from sealane.vtpm.launcher import KeeperLauncher
from sealane.vtpm.order import Order
from sealane.vtpm.record import Record, Records

SECRET = bytes(range(32))
JOURNEY = Journey("web01", 0, b"m" * 16)
READ_EK = bytes.fromhex("80010000000e0000017381010001")
STARTUP = bytes.fromhex("80010000000c000001440000")
LAUNCHER = KeeperLauncher()  # it ends with this process


class KeeperProcess:
    """One host's keeper of web01's TPM."""

    def __init__(self, root: Path, vm: str = "web01") -> None:
        self.root = root
        self.order = Order(
            vm=vm,
            how="create",
            epoch=0,
            storage=str(root / "files"),
            records=str(root / "records"),
            scratch=str(root / "scratch"),
            control_path=str(root / "c"),
            admin_path=str(root / "a"),
            tcti=None,
        )

    def start(self, how: str, **changes: Any) -> "KeeperProcess":
        LAUNCHER.launch(replace(self.order, how=how, **changes), 2)
        return self

    def call(self, call: str, **said: Any) -> dict[str, Any]:
        return call_keeper(Path(self.order.admin_path), call, **said)

    def record(self) -> Record:
        found = Records(Path(self.order.records)).find(self.order.vm)
        assert found is not None
        return found

    def end(self) -> None:
        with suppress(SealaneError):
            self.call("stop")
        with open(Path(self.order.records) / f"{self.order.vm}.lock", "a", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the keeper holds it for life


def wait_for_end(pid: int) -> None:
    """Until the process, which is nobody's child here, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(descriptor, "rb", buffering=0) as pidfd:
        assert select.select([pidfd], [], [], 20.0)[0], "the keeper does not end"


class QemuStandIn:
    """QEMU's side of the control channel, and of the TPM's own."""

    def __init__(self, keeper: KeeperProcess) -> None:
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.settimeout(20.0)
        self._control.connect(keeper.order.control_path)
        self._data, theirs = socket.socketpair()
        self._data.settimeout(20.0)
        with theirs:
            socket.send_fds(self._control, [struct.pack(">I", Command.SET_DATAFD)], [theirs.fileno()])
            assert self._control.recv(4) == bytes(4)

    def init(self, *, incoming: bool = False) -> int:
        self._control.sendall(struct.pack(">II", Command.INIT, int(incoming)))
        return int.from_bytes(self._control.recv(4), "big")

    def tpm(self, command: bytes) -> bytes:
        self._data.sendall(command)
        return self._data.recv(4096)

    def get(self, blob_type: int) -> tuple[int, bytes]:
        self._control.sendall(struct.pack(">IIII", Command.GET_STATEBLOB, 1, blob_type, 0))
        result, _, _, length = struct.unpack(">IIII", self._exactly(16))
        return result, self._exactly(length)

    def set(self, blob_type: int, blob: bytes) -> int:
        self._control.sendall(struct.pack(">IIII", Command.SET_STATEBLOB, 0, blob_type, len(blob)) + blob)
        return int.from_bytes(self._exactly(4), "big")

    def raw(self, data: bytes) -> bytes:
        self._control.sendall(data)
        return self._control.recv(100)

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            piece = self._control.recv(count - len(found))
            assert piece, "the keeper closed the control channel"
            found += piece
        return found

    def close(self) -> None:
        self._control.close()
        self._data.close()


class EnclaveStandIn:
    """The enclave's part in a thread; `errors` is what it raised."""

    def __init__(self, keeper: KeeperProcess, journey: Journey, *, is_source: bool, secret: bytes = SECRET) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            keeper.call("link", descriptors=[theirs.fileno()])
        self._connection = ours
        self._states = VtpmStates(ours, StateSealer(secret, journey, os.urandom), is_source=is_source)
        ours.settimeout(None)
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                if not self._states.serve():
                    return
            except SealaneError as error:
                self.errors.append(error.code)

    def close(self) -> None:
        """End it, once it has said what it has to say."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        self._connection.close()


@contextmanager
def running(root: Path, how: str, **changes: Any) -> Iterator[tuple[KeeperProcess, QemuStandIn]]:
    """A keeper and its QEMU; both end."""
    keeper = KeeperProcess(root).start(how, **changes)
    try:
        qemu = QemuStandIn(keeper)
        try:
            yield keeper, qemu
        finally:
            qemu.close()
    finally:
        keeper.end()


TYPES = list(BlobType)
