"""The launcher of keepers: a process that has all that one needs loaded, and becomes one by each fork.

    agent --socket--> launcher    one packet an order, with descriptors: where to answer, the keeper's log, QEMU's listener
    agent <-answer--- keeper      one line of JSON: {"ok": …}, or {"error": …} and its end

An interpreter and its libraries cost 0.3 s, which a migration would wait for at its destination; a fork costs some ms. The
launcher holds no key, has one thread, and ends with the agent; the keepers that it made go on.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Final, NoReturn

from sealane.errors import make_error
from sealane.limits import VTPM_START_TIMEOUT_S
from sealane.paths import isolated_module
from sealane.vtpm.keeper import PACKET_MAX, serve_vm
from sealane.vtpm.order import Order

KEEPER_NAME: Final = "sealane-vtpm"  # as ps(1) shows it, in 15 characters at most
_ATTEMPTS: Final = 2
_END_WAIT_S: Final = 5.0
# systemd's words to the agent are not for its children.
_OURS_ALONE: Final = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"})


# ---- the agent's side


class KeeperLauncher:
    """`start` it early, `launch` as often as wanted, from any thread, `stop` it at the end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the launcher unless it is there; it loads its libraries meanwhile, and orders wait. Raises `vtpm.keeper`."""
        with self._lock:
            self._start()

    def _start(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    isolated_module("sealane.vtpm", theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={name: value for name, value in os.environ.items() if name not in _OURS_ALONE},
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                ours.close()
                raise make_error("vtpm.keeper", f"the launcher could not be started: {error.strerror}") from error
        self._control = ours
        return ours

    def launch(self, order: Order, log: IO[bytes] | int, listener: socket.socket | None = None) -> None:
        """Start a keeper; returns when it serves. `listener` listens at the control path already, and is only lent.

        Raises what its start did, and `vtpm.keeper`.
        """
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(VTPM_START_TIMEOUT_S)
            with theirs:
                lent = [theirs, log] if listener is None else [theirs, log, listener]
                self._give(order, [each if isinstance(each, int) else each.fileno() for each in lent])
            try:
                line = _line(ours)
            except OSError:
                raise make_error(
                    "vtpm.keeper", f"the TPM of {order.vm} did not start in {VTPM_START_TIMEOUT_S:.0f} s"
                ) from None
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise make_error(
                "vtpm.keeper", f"the keeper of {order.vm}'s TPM ended without a word; its log says more"
            ) from None
        if "error" in answer:
            raise make_error(str(answer["error"]["code"]), str(answer["error"]["detail"]))

    def _give(self, order: Order, descriptors: list[int]) -> None:
        """The order to a launcher that is there; another takes the place of one that ended."""
        for attempt in range(_ATTEMPTS):
            with self._lock:
                try:
                    socket.send_fds(self._start(), [order.encode()], descriptors)
                    return
                except OSError as error:
                    self._let_go()
                    if attempt + 1 == _ATTEMPTS:
                        raise make_error("vtpm.keeper", f"the launcher took no order: {error}") from error

    def _let_go(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_WAIT_S)
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    def stop(self) -> None:
        """End the launcher; the keepers go on."""
        with self._lock:
            self._let_go()


def _line(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        data = connection.recv(PACKET_MAX)
        if not data:
            break
        found += data
    return found


# ---- the launcher


def main() -> None:
    """Fork a keeper for each order until the agent closes its end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the agent's end is ours
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's wards, and leave no zombies
    gc.collect()
    gc.freeze()  # no collection touches, and so copies, what all share
    while True:
        try:
            packet, descriptors, _, _ = socket.recv_fds(control, PACKET_MAX, 3)
        except OSError:
            return
        if not packet:
            return
        if len(descriptors) >= 2 and os.fork() == 0:
            control.close()
            _become_keeper(packet, descriptors)
        for each in descriptors:
            os.close(each)


def _become_keeper(packet: bytes, descriptors: list[int]) -> NoReturn:
    """Never back into the launcher's frames, whatever happens: the process ends here."""
    status = 1
    try:
        os.setsid()
        Path("/proc/self/comm").write_text(KEEPER_NAME)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in descriptors:
            os.set_inheritable(each, False)
        answering, log, *listening = descriptors
        os.dup2(log, 2)
        os.close(log)
        order = Order(**json.loads(packet))
        with ExitStack() as stack:
            answer = stack.enter_context(socket.socket(fileno=answering))
            listener = stack.enter_context(socket.socket(fileno=listening[0])) if listening else None
            serve_vm(order, answer, listener)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
