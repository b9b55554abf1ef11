"""Two simulated hosts, the guest with secrets, somebody on the wire, and every way to move the guest from one to the other."""

import secrets as randomness
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, Literal

from sealane.errors import SealaneError
from sealane.host.models import Migration, MigrationRequest
from sealane.lab.pcap import Conversation, Flow, read_capture
from sealane.lab.sight import Sight, look
from sealane.seal.protect import PROTECTIONS, SEALED
from sealane.testing.capture import Capture, start_capture
from sealane.testing.hosts import SimulatedHost
from sealane.testing.lab.guest import HARDWARE, LabWorkload, Secrets, log_in, new_seed
from sealane.testing.machine import GuestMachine, Hardware
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair
from sealane.testing.problems import RigError
from sealane.testing.qmp import Qmp
from sealane.testing.wiretap import Address, Recorder, Tamper, Wiretap

QEMU_WAYS: Final = ("plain", "tls")
WAYS: Final = (*QEMU_WAYS, *PROTECTIONS)
WAY_NAMES: Final = {"plain": "QEMU plain", "tls": "QEMU TLS"}
VM: Final = "guest"
_WAIT_S: Final = 90.0
_SETTINGS: Final = f"allowed_protections = {list(PROTECTIONS)!r}\n"
_STATES: Final = {"return-path": True, "multifd": False, "pause-before-switchover": False}
_CAPABILITIES: Final = [{"capability": name, "state": state} for name, state in _STATES.items()]
_PERMIT_ALL: Final = '@id("lab") permit (principal, action, resource);'


def plain_port(host: SimulatedHost) -> int:
    """Where a QEMU of that host waits for a migration: below the ports that connections get by chance."""
    return 4444 if host.namespace is not None else _free_port(host.address)


@cache
def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def way_name(way: str) -> str:
    """What tables call a way to move a guest."""
    return WAY_NAMES.get(way, way)


@dataclass
class Overheard:
    """What somebody on the wire heard: `address` is where to connect to, so that it hears; then `conversations`."""

    how: Literal["tcpdump", "relay"]
    address: Address
    path: Path
    conversations: list[Conversation] = field(default_factory=list)


@contextmanager
def overhear(host: SimulatedHost, port: int, *, name: str, tampers: tuple[Tamper, ...] = ()) -> Iterator[Overheard]:
    """tcpdump on the host's interface; a relay in front of the port where that is not permitted, or where it shall tamper."""
    capture = None if tampers else start_capture(host, name=name, port=port)
    if isinstance(capture, Capture):
        heard = Overheard("tcpdump", (host.address, port), capture.path)
        with capture:
            yield heard
        heard.conversations = read_capture(capture.path, port=port)
        return
    directory = host.scratch / name
    recorder = Recorder(directory)
    with Wiretap((host.address, port), tampers=[recorder, *tampers], listen=(host.address, 0), host=host) as relay:
        heard = Overheard("relay", relay.address, directory)
        yield heard
    for number in range(relay.connections):
        flows = [directory / f"{number}-{way}.bin" for way in ("forward", "back")]
        said = [Flow(path.read_bytes() if path.exists() else b"") for path in flows]
        heard.conversations.append(Conversation(("relay", number), (host.address, port), said[0], said[1]))


@dataclass
class Take:
    """One attempt to move the guest, as the attacker and as the experimenter saw it.

    `completed` says whether it runs at the destination; `problem` is what was said where it does not.
    """

    way: str
    completed: bool
    seconds: float
    conversations: list[Conversation]
    capture: Path
    problem: str = ""
    code: str = ""
    migration: Migration | None = None
    memory_before: Path | None = None
    _sight: Sight | None = None

    @cached_property
    def clear_bytes(self) -> bytes:
        """All pages that crossed in clear."""
        return self.sight.clear.tobytes()

    @property
    def sight(self) -> Sight:
        """What the capture shows; looked at once."""
        if self._sight is None:
            self._sight = look(self.conversations)
        return self._sight


@dataclass
class Stage:
    """The hosts, and the guest that lives on `home` and goes to `away`; a move that succeeds exchanges the two."""

    pair: HostPair
    guest: Guest
    secrets: Secrets
    home: AgentHost
    away: AgentHost
    takes: int = 0

    @property
    def machine(self) -> GuestMachine:
        """The guest's machine where it runs now."""
        return self.guest.machines[self.home.name]

    def boot(self) -> None:
        """Start the guest, wait until all is planted, and log in at its console."""
        self.machine.start().wait_for("LAB READY")
        self.guest.travelled = [self.home.name]
        log_in(self.machine, self.secrets)

    def dump_memory(self, name: str = "memory.bin") -> Path:
        """All of the guest's memory now, in a file; the guest stands still meanwhile."""
        path = self.home.host.scratch / name
        with self.machine.observe() as monitor:
            monitor.execute("stop")
            monitor.execute("pmemsave", val=0, size=self.machine.hardware.memory_mib << 20, filename=str(path))
            monitor.execute("cont")
        return path

    def move(self, way: str, *, tampers: tuple[Tamper, ...] = (), dump: bool = False, **options: Any) -> Take:
        """Move the guest by QEMU itself (`plain`, `tls`) or under a protection of Sealane, overheard."""
        self.takes += 1
        before = self.dump_memory(f"memory-{self.takes}.bin") if dump else None
        host = self.away.host
        port = host.port if way in PROTECTIONS else plain_port(host)
        started = time.monotonic()
        with overhear(host, port, name=f"take-{self.takes}", tampers=tampers) as heard:
            mover = self._move_by_qemu if way in QEMU_WAYS else self._move_by_sealane
            problem, code, migration = mover(way, heard, options)
        seconds = time.monotonic() - started
        if not problem:
            self.guest.moved_to(self.away.name)
            self.home, self.away = self.away, self.home
        return Take(way, not problem, seconds, heard.conversations, heard.path, problem, code, migration, before)

    def move_overheard_by_nobody(self, way: str) -> Take:
        """By Sealane to where the home's list of peers says, with no eavesdropper."""
        started = time.monotonic()
        problem, code, migration = self._move_by_sealane(way, None, {})
        return Take(way, not problem, time.monotonic() - started, [], Path(), problem, code, migration)

    def wait_ticks(self, count: int = 2) -> None:
        """The guest counts on, where it lives now."""
        self.guest.wait_ticks(count, timeout_s=30.0)

    # the ways

    def _move_by_sealane(
        self, way: str, heard: Overheard | None, options: dict[str, Any]
    ) -> tuple[str, str, Migration | None]:
        if heard is not None and heard.how == "relay":
            self.home.trust(self.away, address=heard.address[0], port=heard.address[1])
        wanted = {"protection": way, "i_know_this_is_weak": way != SEALED, "multifd_channels": 0, **options}
        try:
            # `Guest.moved_to` is ours to call, so the pair's own wait is not taken
            last = self._follow(wanted)
        finally:
            if heard is not None and heard.how == "relay":
                self.home.trust(self.away)
        if last.state == "completed":
            self.pair.await_end(self.away, last.id)
            return "", "", last
        with suppress(SealaneError):  # it may never have heard of it
            self.pair.await_end(self.away, last.id)
        problem = last.problem
        return (problem.detail if problem else last.state) or last.state, problem.code if problem else "", last

    def _follow(self, wanted: dict[str, Any]) -> Migration:
        with self.home.client() as client:
            request = MigrationRequest.model_validate({"vm": self.guest.name, "host": self.away.name, **wanted})
            last = client.start_migration(request)
            for event in client.events(last.id):
                last = event.migration
        return last

    def _move_by_qemu(self, way: str, heard: Overheard, options: dict[str, Any]) -> tuple[str, str, None]:
        there, here = self.machine, self.guest.machines[self.away.name]
        here.start_incoming()
        problem = "the attempt could not be made"
        try:
            problem = send_by_qemu(there, here, heard.address, self.away.host, tls=way == "tls")
            if not problem and not _is_loaded(here):
                problem = f"the destination's QEMU: {(here.directory / 'qemu.log').read_text().strip()[-300:]}"
        finally:
            if problem:
                here.stop()
        if problem:
            return problem, "", None
        with there.observe() as monitor:
            monitor.execute("quit")
        _wait(lambda: not _answers(there), "the source's QEMU to end")
        return "", "", None


def send_by_qemu(
    there: GuestMachine,
    here: GuestMachine,
    address: Address,
    host: SimulatedHost,
    *,
    tls: bool,
    other_key: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> str:
    """QEMU's own migration, to a QEMU that waits with `-incoming defer`; gives what went wrong, or nothing.

    With `other_key` the one that waits does not have the sender's TLS key. `meanwhile` is called when it listens.
    """
    with here.observe() as receiving, there.observe() as sending:
        for monitor, endpoint in ((receiving, "server"), (sending, "client")):
            monitor.allow_migration()
            # an agent may have asked for something else before
            monitor.execute("migrate-set-capabilities", capabilities=_CAPABILITIES)
            name = f"psk{randomness.token_hex(4)}" if tls else ""
            if tls:
                key = _psk(host, "psk-other" if other_key and endpoint == "server" else "psk")
                monitor.execute("object-add", qom_type="tls-creds-psk", id=name, dir=str(key), endpoint=endpoint)
            monitor.execute("migrate-set-parameters", tls_creds=name, tls_hostname="")
        receiving.execute("migrate-incoming", uri=f"tcp:{host.address}:{plain_port(host)}")
        meanwhile()
        sending.execute("migrate", uri=f"tcp:{address[0]}:{address[1]}")
        try:
            sending.wait_migrated(timeout_s=_WAIT_S)
        except RigError as error:
            return str(error)
    return ""


def _psk(host: SimulatedHost, name: str) -> Path:
    """A directory with a key for QEMU's TLS, made once."""
    directory = host.scratch / name
    directory.mkdir(exist_ok=True, mode=0o700)
    path = directory / "keys.psk"
    if not path.exists():
        path.write_text(f"qemu:{randomness.token_hex(32)}\n")
    return directory


def wake(machine: GuestMachine) -> None:
    """Lets a source run again whose guest has left; QEMU says no until it has put the migration away."""

    def woken() -> bool:
        with suppress(RigError), machine.observe() as monitor:
            monitor.execute("cont")
            return True
        return False

    _wait(woken, "the source to run again")


def _is_loaded(machine: GuestMachine) -> bool:
    """Waits until the guest runs there: without a return path, a source is done when all is on its way."""
    with suppress(RigError), machine.observe() as monitor:
        _wait(lambda: bool(monitor.execute("query-status")["status"] == "running"), "the guest to run")
        return True
    return False


def _answers(machine: GuestMachine) -> bool:
    try:
        Qmp(machine.observer_path, timeout_s=5.0).close()
    except RigError:
        return False
    return True


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise RigError(f"in vain waited for {what}")
        time.sleep(0.02)


@contextmanager
def make_stage(
    *,
    network: Literal["auto", "netns", "loopback"] = "auto",
    hardware: Hardware = HARDWARE,
    fill_mib: int = 8,
    rewrite_kib_per_s: int = 0,
    read_kib_per_s: int = 0,
) -> Iterator[Stage]:
    """Hosts that allow every protection, and a guest with secrets that runs on the first; all gone at the end."""
    seed = new_seed()
    workload = LabWorkload(
        fill_mib=fill_mib, seed=seed, rewrite_kib_per_s=rewrite_kib_per_s, read_kib_per_s=read_kib_per_s
    )
    with make_pair(network=network, settings=_SETTINGS) as pair:
        for end in (pair.a, pair.b):
            directory = end.host.paths.config / "policy"
            directory.mkdir(exist_ok=True)
            (directory / "lab.cedar").write_text(_PERMIT_ALL)
        guest = pair.add_guest(VM, hardware=hardware, workload=workload)
        stage = Stage(pair, guest, Secrets(seed), pair.a, pair.b)
        try:
            stage.boot()
            yield stage
        finally:
            for machine in guest.machines.values():
                machine.stop()
