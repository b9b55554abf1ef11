"""Two simulated hosts with real agents that trust each other, and guests that can move between them."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sealane.cli.client import AgentClient
from sealane.crypto.identity import Identity, create_identity, save_identity
from sealane.errors import SealaneError
from sealane.host.config import AGENT_FILE
from sealane.host.models import Migration, MigrationRequest, Peer, VmDefinition
from sealane.testing.accel import Accel
from sealane.testing.attested import AttestedHosts
from sealane.testing.console import ConsoleLog
from sealane.testing.hosts import BackgroundProcess, SimulatedHost, make_hosts
from sealane.testing.machine import GuestMachine, Hardware, Workload
from sealane.testing.problems import RigError
from sealane.testing.qemu import QemuBinary, find_qemu

_AGENT_START_S = 20.0
# What `sealane` is on these hosts; another one may wrap it.
PROGRAM = (sys.executable, "-m", "sealane.cli")
_HARDWARE = Hardware()
_WORKLOAD = Workload()


@dataclass
class AgentHost:
    """A simulated host and its agent; `client` speaks to it over its own socket."""

    host: SimulatedHost
    identity: Identity
    pin: str = ""
    agent: BackgroundProcess | None = None
    program: tuple[str, ...] = PROGRAM

    @property
    def name(self) -> str:
        """The host's name."""
        return self.host.name

    def start_agent(self) -> None:
        """Start the agent and return when it answers."""
        pinned = ["taskset", "-c", self.pin] if self.pin else []
        listen = f"{self.host.address}:{self.host.port}"
        self.agent = self.host.start(*pinned, *self.program, "agent", "--listen", listen)
        self.agent.wait_until(self._answers, "the agent's socket", timeout_s=_AGENT_START_S)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                client.host()
        except SealaneError:
            return False
        return True

    def descriptors(self) -> list[str]:
        """What the agent has open, as /proc tells it."""
        found = []
        for each in Path(f"/proc/{self._running().process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.append(os.readlink(each))
        return sorted(found)

    def processes(self) -> set[int]:
        """Everything that runs on this host, children of the agent included whatever their environment says."""
        agent = self._running().process.pid
        found = {*self.host.processes(), agent}
        tasks = Path(f"/proc/{agent}/task").glob("*/children")
        return found | {int(pid) for each in tasks for pid in each.read_text().split()}

    def _running(self) -> BackgroundProcess:
        if self.agent is None:
            raise RigError(f"no agent was started on {self.name}")
        return self.agent

    def client(self) -> AgentClient:
        """A client of this host's agent."""
        return AgentClient(self.host.paths.agent_socket)

    def trust(self, peer: "AgentHost", *, address: str | None = None, port: int | None = None) -> None:
        """Add a peer; another address than its own leads through a wiretap."""
        with self.client() as client:
            client.add_peer(
                Peer(
                    name=peer.name,
                    fingerprint=peer.identity.fingerprint,
                    address=address or peer.host.address,
                    port=port or peer.host.port,
                )
            )


@dataclass
class Guest:
    """One VM that lives on either host: a machine description for each, the same but for its directory."""

    name: str
    machines: dict[str, GuestMachine]
    travelled: list[str] = field(default_factory=list)

    _kept: list[Path] = field(default_factory=list)

    @property
    def console(self) -> ConsoleLog:
        """What the guest said on all the hosts it lived on, in order."""
        return ConsoleLog(
            *self._kept, *(self.machines[host].console_path for host in self.travelled[len(self._kept) :])
        )

    def forget(self) -> None:
        """What it said before it was started anew is not its console's any more."""
        self._kept.clear()

    def moved_to(self, host: str) -> None:
        """Note that the guest runs there now; what it said before is put aside, should it come back."""
        path = self.machines[self.travelled[-1]].console_path
        kept = path.with_name(f"console-{len(self._kept)}.log")
        path.rename(kept)
        self._kept.append(kept)
        self.travelled.append(host)

    def wait_ticks(self, count: int, *, timeout_s: float = 20.0) -> None:
        """Wait for `count` more ticks, wherever the guest runs; RigError where they do not come."""
        console = self.console
        wanted, deadline = len(console.ticks) + count, time.monotonic() + timeout_s
        while len(console.ticks) < wanted:
            if time.monotonic() > deadline:
                raise RigError(f"{self.name} stands still after tick {console.last_tick}")
            time.sleep(0.02)


@dataclass
class HostPair:
    """`a` and `b`, agents up, each trusting the other."""

    a: AgentHost
    b: AgentHost

    def add_guest(
        self,
        name: str = "guest",
        *,
        hardware: Hardware = _HARDWARE,
        workload: Workload = _WORKLOAD,
        qemu: QemuBinary | None = None,
        accel: Accel | None = None,
        destination_hardware: Hardware | None = None,
        vtpm: bool = False,
    ) -> Guest:
        """Register the VM at both hosts; it runs nowhere yet. With `vtpm` it has a TPM of its own."""
        machines = {}
        for end in (self.a, self.b):
            different = destination_hardware if end is self.b and destination_hardware is not None else hardware
            machine = GuestMachine(
                end.host.scratch / name,
                qemu=qemu or find_qemu(),
                accel=accel,
                hardware=different,
                workload=workload,
                name=name,
                launcher=end.host.launcher,
                environment=end.host.environment(),
                pin=end.pin,
                tpm=end.host.paths.run / "vtpm" / f"{name}.sock" if vtpm else None,
            )
            machines[end.name] = machine
            with end.client() as client:
                storage = str(end.host.scratch / "vtpm") if vtpm else None
                qmp, command = str(machine.qmp_path), machine.command()
                client.add_vm(VmDefinition(name=name, qmp=qmp, launch_incoming=command, vtpm=storage))
        return Guest(name, machines)

    def start_guest(self, guest: Guest, at: AgentHost, *, warm: bool = True) -> None:
        """Boot the guest (or wake it from a saved state) and wait until it works."""
        machine = guest.machines[at.name]
        if warm:
            machine.start_warm()
        else:
            machine.start().wait_ready()
        guest.travelled = [at.name]
        guest.forget()
        machine.wait_ticks(1)

    def migrate(self, guest: Guest, source: AgentHost, destination: AgentHost, **options: object) -> Migration:
        """Move the guest and wait for the end, whatever it is."""
        request = MigrationRequest.model_validate({"vm": guest.name, "host": destination.name, **options})
        with source.client() as client:
            last = client.start_migration(request)
            for event in client.events(last.id):
                last = event.migration
        if last.state == "completed":
            guest.moved_to(destination.name)
        return last

    def await_end(self, end: AgentHost, migration: str, *, timeout_s: float = 20.0) -> Migration:
        """How the migration ended as this host sees it."""
        deadline = time.monotonic() + timeout_s
        with end.client() as client:
            while time.monotonic() < deadline:
                found = client.migration(migration)
                if found.ended_at is not None:
                    return found
                time.sleep(0.02)
        raise RigError(f"migration {migration} has not ended on {end.name}")


def process_name(pid: int) -> str:
    """What ps(1) calls the process: a launcher and its enclaves have one command line, but two names; "" where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    return ""


@contextmanager
def make_pair(
    *,
    network: Literal["auto", "netns", "loopback"] = "auto",
    names: Sequence[str] = ("host-a", "host-b"),
    pins: Sequence[str] = ("", ""),
    lifetime_days: Sequence[int] = (30, 30),
    born: Sequence[datetime | None] = (None, None),
    settings: str | AttestedHosts = "",
    program: tuple[str, ...] | list[tuple[str, ...]] = PROGRAM,
    strangers: bool = False,
) -> Iterator[HostPair]:
    """Two hosts, agents up, trusting each other unless they are `strangers`; everything goes away at the end.

    `program` is what `sealane` is on both hosts, or on each. `born` are the moments at which the identities were made (now),
    `settings` both agents' `agent.toml`, or what gives each host a TPM.
    """
    programs = [program] * 2 if isinstance(program, tuple) else program
    with ExitStack() as stack:
        hosts = stack.enter_context(make_hosts(names, network=network))
        ends = []
        for host, pin, days, moment, called in zip(hosts, pins, lifetime_days, born, programs, strict=True):
            identity = create_identity(host.name, now=moment or datetime.now(UTC), lifetime_days=days)
            save_identity(host.paths, identity)
            text = settings if isinstance(settings, str) else settings.settings(host)
            (host.paths.config / AGENT_FILE).write_text(text)
            end = AgentHost(host, identity, pin, program=called)
            end.start_agent()
            ends.append(end)
        first, second = ends
        if not strangers:
            first.trust(second)
            second.trust(first)
        if isinstance(settings, AttestedHosts):
            settings.introduce(hosts)
        yield HostPair(first, second)
