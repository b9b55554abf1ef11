"""An eavesdropper: tcpdump on a host's interface, and a search in what it caught."""

import mmap
import os
import re
import secrets
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sealane.testing.hosts import BackgroundProcess, SimulatedHost
from sealane.testing.problems import RigError

_START_TIMEOUT_S = 10.0
# What the kernel keeps for tcpdump: bursts of a migration must not be lost, or an absence would prove nothing.
_BUFFER_KIB = 128 * 1024
# The discard service's port (RFC 863): the packet that marks a capture's end goes there.
_DISCARD = 9
_SEND_MARK = """
import socket, sys
mark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
mark.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
mark.sendto(sys.argv[1].encode(), (sys.argv[2], int(sys.argv[3])))
"""


@dataclass(frozen=True)
class CaptureRefused:
    """This user may not listen on the interface; `reason` is tcpdump's."""

    reason: str


@dataclass
class Capture:
    """Packets being caught, or caught, in `path` (pcap). A context manager that stops at its end."""

    path: Path
    host: SimulatedHost
    _tcpdump: BackgroundProcess

    def __enter__(self) -> "Capture":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> "Capture":
        """Writes out what has been caught and ends. RigError where the kernel lost packets: absence proves nothing then."""
        if self._tcpdump.is_running:
            self._await_mark()
            self._tcpdump.stop(signal.SIGINT)
        lost = re.search(r"(\d+) packets? dropped by kernel", self._tcpdump.output)
        if lost and int(lost[1]):
            raise RigError(f"the capture lost {lost[1]} packets")
        return self

    def _await_mark(self) -> None:
        """Sends a packet of its own and waits until it is in the file: then all that came before is there too.

        The kernel hands packets on in blocks, up to a second late, and tcpdump leaves the last block behind when it ends.
        """
        mark = secrets.token_hex(16)
        address = self.host.address
        if self.host.namespace is not None:
            address = address.rpartition(".")[0] + ".255"
        self.host.run(sys.executable, "-c", _SEND_MARK, mark, address, str(_DISCARD))
        self._tcpdump.wait_until(
            lambda: self.contains(mark.encode()), "the end of the capture", timeout_s=_START_TIMEOUT_S
        )

    @property
    def packets(self) -> int:
        """How many packets were caught; known after `stop`."""
        match = re.search(r"(\d+) packets? captured", self._tcpdump.output)
        return int(match[1]) if match else 0

    @property
    def size_bytes(self) -> int:
        """How much was caught."""
        return self.path.stat().st_size

    def count(self, needle: bytes) -> int:
        """How often `needle` stands in the packets as they were on the wire (where none is cut by a packet's end)."""
        if not self.size_bytes:
            return 0
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found, at = 0, data.find(needle)
            while at >= 0:
                found, at = found + 1, data.find(needle, at + len(needle))
            return found

    def contains(self, needle: bytes) -> bool:
        """Whether `needle` stands anywhere in the packets (where it is not cut by a packet's end)."""
        if not self.size_bytes:
            return False
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(needle) >= 0


def start_capture(host: SimulatedHost, *, name: str = "wire", port: int | None = None) -> Capture | CaptureRefused:
    """Begins to catch what passes the host's interface, and returns when tcpdump really listens.

    Only packets from or to the TCP port `port`, where one is given; in loopback mode the host's own by default, for
    everything else on the machine is there too.
    """
    if port is None and host.namespace is None:
        port = host.port
    path = host.scratch / f"{name}.pcap"
    user = () if os.geteuid() else ("-Z", "root")  # else tcpdump gives up root's rights and cannot write here
    words = ["tcpdump", "-i", host.interface, "-n", "-s", "0", "-U", "-B", str(_BUFFER_KIB), *user, "-w", str(path)]
    filters = [] if port is None else [f"tcp port {port} or udp port {_DISCARD}"]
    try:
        tcpdump = host.start(*words, *filters)
    except OSError as error:
        return CaptureRefused(f"tcpdump does not start: {error}")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while "listening on" not in tcpdump.output:
        if not tcpdump.is_running:
            return CaptureRefused(tcpdump.output.strip())
        if time.monotonic() > deadline:
            tcpdump.stop(signal.SIGKILL)
            raise RigError("tcpdump did not begin to listen")
        time.sleep(0.01)
    return Capture(path, host, tcpdump)
