"""Several hosts on one machine: each with its own network, its own directories and its own processes.

With root's rights a host is a network namespace; two are joined by a veth pair, more by a bridge. Namespaces have no
names: each lives as long as the idle process that holds it, and that dies with the test run, whatever becomes of it.
Without root's rights hosts are loopback addresses with free ports.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sealane.limits import DEFAULT_PORT
from sealane.paths import RUN_VARIABLE, Paths
from sealane.testing.problems import RigError

INTERFACE = "lane0"
HOSTS_MAX = 4
_READY_TIMEOUT_S = 10.0
_NETWORK = "10.83.77"
_SBIN = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}  # where ip and tcpdump may be


@dataclass
class BackgroundProcess:
    """A process that a host runs beside the test; what it says goes to `log`."""

    argv: list[str]
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether it is alive."""
        return self.process.poll() is None

    def wait_for(self, text: str, *, timeout_s: float = 20.0) -> None:
        """Waits until it has said `text`; RigError with its output where it ends or stays silent."""
        self.wait_until(lambda: text in self.output, repr(text), timeout_s=timeout_s)

    def wait_until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 20.0) -> None:
        """Waits for `condition` while the process lives; RigError with its output otherwise."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.is_running or time.monotonic() > deadline:
                state = "still runs" if self.is_running else f"ended with {self.process.returncode}"
                raise RigError(f"{self.argv[0]} ({state}) never came to {what}; it said: {self.output[-4000:]}")
            time.sleep(0.01)

    def stop(self, signal_number: int = signal.SIGTERM, *, timeout_s: float = 10.0) -> int:
        """Asks it to end, makes it end after `timeout_s`, and gives its exit status."""
        if self.is_running:
            self.process.send_signal(signal_number)
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout_s)
            self.process.kill()
        return self.process.wait()


@dataclass
class SimulatedHost:
    """One host: `address` and `port` for its agent, `interface` between it and the others, private directories.

    `namespace` is the path of its network namespace, or None in loopback mode; `inside` the words that bring a command into
    more namespaces than that, once there are some.
    """

    name: str
    address: str
    port: int
    interface: str
    directory: Path
    namespace: Path | None = None
    inside: tuple[str, ...] = ()
    _started: list[BackgroundProcess] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for path in (self.paths.state, self.paths.run, self.paths.config, self.scratch):
            path.mkdir(parents=True, mode=0o700)

    @property
    def paths(self) -> Paths:
        """Where this host's agent keeps its things."""
        return Paths(self.directory / "state", self.directory / "run", self.directory / "etc")

    @property
    def scratch(self) -> Path:
        """A place for machines, logs and captures; short enough for unix sockets two levels below."""
        return self.directory / "tmp"

    @property
    def launcher(self) -> tuple[str, ...]:
        """The words before a command that bring it onto this host's network."""
        if self.inside:
            return self.inside
        return () if self.namespace is None else ("nsenter", f"--net={self.namespace}", "--")

    def environment(self) -> dict[str, str]:
        """The environment of processes on this host."""
        return dict(os.environ) | _SBIN | self.paths.environment()

    def run(
        self, *argv: str | Path, timeout_s: float = 60.0, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host to its end. RigError with its words where it fails and `check` is set."""
        try:
            done = subprocess.run(
                [*self.launcher, *map(str, argv)],
                env=self.environment(),
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RigError(f"{argv[0]} on {self.name} took longer than {timeout_s:.0f} s") from error
        if check and done.returncode:
            raise RigError(f"{argv[0]} on {self.name} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def start(self, *argv: str | Path) -> BackgroundProcess:
        """Starts a command on this host, in its own session, with its output in a log below `scratch`."""
        words = [str(word) for word in argv]
        log = self.scratch / f"{len(self._started)}-{Path(words[0]).name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.launcher, "setpriv", "--pdeathsig", "KILL", "--", *words],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started = BackgroundProcess(words, log, process)
        self._started.append(started)
        return started

    def processes(self) -> list[int]:
        """All processes of this host, by its run directory in their environment or by its network namespace.

        The one that only holds the namespace does not count: while it lives, the namespace's identity is not given anew.
        """
        marker = f"{RUN_VARIABLE}={self.paths.run}".encode()
        holder, network = None, None
        if self.namespace is not None:
            holder = int(self.namespace.parts[2])
            with suppress(OSError):
                network = os.readlink(self.namespace)
        return [pid for pid in _pids() if pid != holder and _belongs(pid, marker, network)]

    def close(self) -> None:
        """Ends every process of this host, also those that its processes started and left behind."""
        for started in reversed(self._started):
            started.stop(timeout_s=3.0)
        for pid in self.processes():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.01)


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _belongs(pid: int, marker: bytes, network: str | None) -> bool:
    process = Path("/proc") / str(pid)
    with suppress(OSError):
        # a zombie has an empty environment and no namespace: it is not counted
        if marker in (process / "environ").read_bytes().split(b"\0"):
            return True
        return network is not None and os.readlink(process / "ns/net") == network
    return False


@contextmanager
def make_hosts(
    names: Sequence[str], *, network: Literal["auto", "netns", "loopback"] = "auto"
) -> Iterator[list[SimulatedHost]]:
    """Two to four hosts that reach one another; all of it goes away at the end, also after a failure.

    `auto` takes namespaces where they can be made, and loopback addresses otherwise.
    """
    if not 1 <= len(names) <= HOSTS_MAX or len(set(names)) != len(names):
        raise ValueError(f"one to {HOSTS_MAX} different names, not {names!r}")
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        if network == "netns" or (network == "auto" and namespaces_work()):
            hosts = _namespaced(names, root, stack)
        else:
            hosts = _on_loopback(names, root)
        for host in hosts:
            stack.callback(host.close)
        yield hosts


def namespaces_work() -> bool:
    """Whether this process may make network namespaces."""
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0
    )


def _on_loopback(names: Sequence[str], root: Path) -> list[SimulatedHost]:
    hosts = []
    for index, name in enumerate(names):
        address = f"127.0.0.{index + 2}"
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        hosts.append(SimulatedHost(name, address, port, "lo", root / name))
    return hosts


def _namespaced(names: Sequence[str], root: Path, stack: ExitStack) -> list[SimulatedHost]:
    holders = [_hold_namespace(stack) for _ in names]
    if len(names) == 2:
        _ip(holders[0], "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(holders[1]))
    else:
        _join_by_bridge(holders, _hold_namespace(stack))
    hosts = []
    for index, (name, holder) in enumerate(zip(names, holders, strict=True)):
        address = f"{_NETWORK}.{index + 1}"
        _ip(holder, "link", "set", "lo", "up")
        _ip(holder, "address", "add", f"{address}/24", "dev", INTERFACE)
        _ip(holder, "link", "set", INTERFACE, "up")
        namespace = Path(f"/proc/{holder}/ns/net")
        hosts.append(SimulatedHost(name, address, DEFAULT_PORT, INTERFACE, root / name, namespace))
    return hosts


def _join_by_bridge(holders: Sequence[int], switch: int) -> None:
    _ip(switch, "link", "add", "switch", "type", "bridge")
    _ip(switch, "link", "set", "switch", "up")
    for index, holder in enumerate(holders):
        port = f"port{index}"
        _ip(switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(holder))
        _ip(switch, "link", "set", port, "master", "switch", "up")


def _hold_namespace(stack: ExitStack) -> int:
    """Starts the idle process that holds one new network namespace, and gives its process id."""
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--net", "--", "sleep", "infinity"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    stack.callback(holder.wait)
    stack.callback(holder.kill)
    ours = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while os.readlink(f"/proc/{holder.pid}/ns/net") == ours:
        if holder.poll() is not None or time.monotonic() > deadline:
            raise RigError("a network namespace cannot be made here")
        time.sleep(0.002)
    return holder.pid


def _ip(holder: int, *words: str) -> None:
    argv = ["nsenter", f"--net=/proc/{holder}/ns/net", "--", "ip", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ | _SBIN)
    if done.returncode:
        raise RigError(f"ip {' '.join(words)}: {done.stderr.strip()}")
