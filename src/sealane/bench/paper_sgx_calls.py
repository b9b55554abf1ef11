"""The second paper's figures 11 to 13: a TPM's image written and read, and its four calls, in the open and through an enclave.

There is no SGX here. What takes an ECALL's place is one packet to a process in the enclaves' own sandbox and one back; that
process has the key, and asks for the TPM's state over the link that real enclaves have to a VM's keeper (enclave/vtpm.py).
Its cost is what a process costs on this machine, and says nothing of what SGX's transitions cost.
"""

import os
import socket
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Final, NoReturn, TypeAlias

from sealane.bench.turns import in_turn
from sealane.enclave.sandbox import Sandbox, die_with_parent, drop_privileges
from sealane.enclave.vtpm import VtpmStates
from sealane.errors import SealaneError
from sealane.testing.problems import RigError
from sealane.vtpm.control import BlobType, Command, ControlChannel
from sealane.vtpm.envelope import Journey, StateSealer
from sealane.vtpm.keeper import call_keeper
from sealane.vtpm.launcher import KeeperLauncher
from sealane.vtpm.link import Frame, Link, What
from sealane.vtpm.order import Order
from sealane.vtpm.record import Records
from sealane.vtpm.swtpm import ANSWER_TIMEOUT_S, Swtpm, manufacture

Figures: TypeAlias = dict[str, dict[str, list[float]]]
IMAGE_WAYS: Final = ("normal", "kvm", "sealane")
IMAGE_PARTS: Final = 12
CALLS: Final = ("tpm_state_read", "tpm_state_write", "volatile_state_enc", "volatile_state_dec")
_KIND: Final = BlobType.VOLATILE
_PACKET_MAX: Final = 1 << 17
_KEY_BYTES: Final = 32
_STARTUP: Final = bytes.fromhex("80010000000c000001440000")
# TPM2_NV_DefineSpace of a counter at 0x01500001 under the owner, and TPM2_NV_Increment of it, both without a password
_DEFINE: Final = bytes.fromhex(
    "80020000002d0000012a40000001000000094000000900000000000000000e01500001000b0204001400000008"
)
_INCREMENT: Final = bytes.fromhex("80020000001f00000134015000010150000100000009400000090000000000")


def measure_images(count: int) -> Figures:
    """Figure 11, in us: an NV counter raised, which writes the image, and the TPM started anew, which reads it.

    In parts of the same size, each with TPMs of its own: two processes of the same program differ more than the ways may.
    """
    found: Figures = {what: {way: [] for way in IMAGE_WAYS} for what in ("write", "read")}
    for begin, end in _parts(count):
        for what, ways in _measure_images(end - begin).items():
            for way, taken in ways.items():
                found[what][way] += taken
    return found


def _parts(count: int) -> list[tuple[int, int]]:
    """Where each part of so many calls begins and ends."""
    parts = min(IMAGE_PARTS, count)
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def part_medians(values: Sequence[float]) -> list[float]:
    """What each part of `measure_images` comes to."""
    return [statistics.median(values[begin:end]) for begin, end in _parts(len(values))]


def _measure_images(count: int) -> Figures:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sl-")))
        images = {way: stack.enter_context(_image(way, _fresh(scratch / way))) for way in IMAGE_WAYS}
        for _, command in images.values():
            command(_DEFINE)
        return {
            "write": _in_turns({way: partial(command, _INCREMENT) for way, (_, command) in images.items()}, count),
            "read": _in_turns({way: partial(_restart, control) for way, (control, _) in images.items()}, count),
        }


Image: TypeAlias = tuple[ControlChannel, Callable[[bytes], None]]


@contextmanager
def _image(way: str, directory: Path) -> Iterator[Image]:
    """A new TPM: its control channel, and what sends it a command that must succeed."""
    made = _fresh(directory / "made")
    manufacture(made)
    if way == "sealane":
        with _kept(made, directory) as control, _started(control) as command:
            yield control, command
        return
    state = _state_of(made, BlobType.PERMANENT)
    swtpm = Swtpm(_fresh(directory / "own"), os.urandom(_KEY_BYTES) if way == "kvm" else None)
    try:
        swtpm.control.tpm_state_write(BlobType.PERMANENT, state)
        with _started(swtpm.control) as command:
            yield swtpm.control, command
    finally:
        swtpm.stop()


@contextmanager
def _kept(image: Path, directory: Path) -> Iterator[ControlChannel]:
    """A keeper with that image, as a VM's QEMU meets it."""
    order = Order(
        vm="bench", how="adopt", epoch=0, storage=str(image), records=str(directory / "records"),
        scratch=str(directory / "scratch"), control_path=str(directory / "c"), admin_path=str(directory / "a"), tcti=None,
    )  # fmt: skip
    launcher = KeeperLauncher()
    launcher.launch(order, 2)
    launcher.stop()
    qemu = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with qemu:
        qemu.connect(order.control_path)
        yield ControlChannel(qemu, ANSWER_TIMEOUT_S)
        with suppress(SealaneError, OSError):
            call_keeper(Path(order.admin_path), "stop")
        with Records(Path(order.records)).locked(order.vm, wait=True):
            pass  # it has ended


@contextmanager
def _started(control: ControlChannel) -> Iterator[Callable[[bytes], None]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        control.command(Command.SET_DATAFD, descriptors=[theirs.fileno()])
        control.start()

        def command(words: bytes) -> None:
            ours.sendall(words)
            answer = ours.recv(4096)
            if int.from_bytes(answer[6:10], "big"):
                raise RigError(f"TPM command {words[6:10].hex()}: {answer.hex()}")

        command(_STARTUP)
        yield command


def _restart(control: ControlChannel) -> None:
    control.command(Command.STOP)
    control.start()


def _state_of(image: Path, kind: BlobType) -> bytes:
    reader = Swtpm(image, None)
    try:
        reader.control.start()
        return reader.control.tpm_state_read(kind)
    finally:
        reader.stop()


def measure_calls(count: int) -> Figures:
    """Figures 12 and 13, in us: each of the four calls in the open, and through an enclave's process."""
    with tempfile.TemporaryDirectory(prefix="sl-") as scratch:
        manufacture(_fresh(Path(scratch) / "made"))
        swtpm = Swtpm(Path(scratch) / "made", None)
        try:
            swtpm.control.start()
            state = swtpm.control.tpm_state_read(_KIND)
            sealer = _sealer(os.urandom(_KEY_BYTES))
            sealed = sealer.volatile_state_enc(_KIND, state)
            with _Enclave(swtpm.control) as enclave:
                inside = enclave.call(b"e", state)
                found = {
                    "tpm_state_read": _in_turns(
                        {
                            "open": lambda: swtpm.control.tpm_state_read(_KIND),
                            "enclave": lambda: enclave.call(b"r"),
                        },
                        count,
                    ),
                    "volatile_state_enc": _in_turns(
                        {
                            "open": lambda: sealer.volatile_state_enc(_KIND, state),
                            "enclave": lambda: enclave.call(b"e", state),
                        },
                        count,
                    ),
                    "volatile_state_dec": _in_turns(
                        {
                            "open": lambda: sealer.volatile_state_dec(_KIND, sealed),
                            "enclave": lambda: enclave.call(b"d", inside),
                        },
                        count,
                    ),
                }
                swtpm.control.command(Command.STOP)  # a TPM takes its state before it is started
                found["tpm_state_write"] = _in_turns(
                    {
                        "open": lambda: swtpm.control.tpm_state_write(_KIND, state),
                        "enclave": lambda: enclave.call(b"w", state),
                    },
                    count,
                )
        finally:
            swtpm.stop()
    return {name: found[name] for name in CALLS}


def _sealer(key: bytes) -> StateSealer:
    return StateSealer(key, Journey("vm", 1, bytes(16)), os.urandom)


class _Enclave:
    """A process in the enclaves' sandbox, and beside it a thread that asks the TPM for it as the VM's keeper does."""

    def __init__(self, control: ControlChannel) -> None:
        self._calls, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keeper, link = socket.socketpair()
        parent = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            self._calls.close()
            keeper.close()
            _become_enclave(parent, theirs, link)
        theirs.close()
        link.close()
        self._keeper = threading.Thread(target=_keep, args=[keeper, control], name="keeper", daemon=True)
        self._keeper.start()

    def __enter__(self) -> "_Enclave":
        return self

    def __exit__(self, *failure: object) -> None:
        self._calls.close()
        os.waitpid(self._pid, 0)
        self._keeper.join()

    def call(self, what: bytes, data: bytes = b"") -> bytes:
        """One packet there and one back."""
        self._calls.send(what + data)
        answer = self._calls.recv(_PACKET_MAX)
        if not answer:
            raise RigError("the enclave's process ended")
        return answer[1:]


def _become_enclave(parent: int, calls: socket.socket, link: socket.socket) -> NoReturn:
    """Serve calls until the other end is closed; never returns into the caller's frames."""
    try:
        die_with_parent(parent)
        low, high = sorted((calls.fileno(), link.fileno()))
        for begin, end in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(begin, end)
        sandbox = Sandbox(None)
        drop_privileges(None, None)
        sandbox.enter(frozenset({low, high}))
        sealer = _sealer(os.urandom(_KEY_BYTES))
        states = VtpmStates(link, sealer, is_source=True)
        while packet := calls.recv(_PACKET_MAX):
            calls.send(packet[:1] + _answer(states, sealer, packet[:1], packet[1:]))
    finally:
        os._exit(0)


def _answer(states: VtpmStates, sealer: StateSealer, what: bytes, data: bytes) -> bytes:
    match what:
        case b"r":
            return states.tpm_state_read(_KIND)
        case b"w":
            states.tpm_state_write(_KIND, data)
        case b"e":
            return sealer.volatile_state_enc(_KIND, data)
        case b"d":
            return sealer.volatile_state_dec(_KIND, data)
    return b""


def _keep(connection: socket.socket, control: ControlChannel) -> None:
    """A keeper's part in `tpm_state_read` and `tpm_state_write`."""
    link = Link(connection, ANSWER_TIMEOUT_S)
    with suppress(SealaneError, OSError):
        while True:
            asked = link.receive()
            if asked.what is What.WRITE:
                control.tpm_state_write(asked.blob_type, asked.data)
                link.send(Frame(What.ANSWER, asked.blob_type))
            else:
                link.send(Frame(What.ANSWER, asked.blob_type, control.tpm_state_read(asked.blob_type)))
    link.close()


def _fresh(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def _in_turns(ways: Mapping[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Microseconds of so many calls of each way, one after the other, so that a slow moment meets all; one more does not count."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(count + 1):
        for way, call in in_turn(list(ways.items()), number):
            began = perf_counter()
            call()
            if number:
                taken[way].append(round((perf_counter() - began) * 1e6, 1))
    return taken
