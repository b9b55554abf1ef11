"""Two agents, one warm guest, and the question that every fault ends with: does the VM go on, and is all tidy?"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sealane.enclave.launcher import ENCLAVE_NAME, LAUNCHER_NAME
from sealane.errors import SealaneError
from sealane.host.models import Migration, MigrationRequest, VmDefinition
from sealane.hypervisor.driver import MigrationSettings
from sealane.hypervisor.qmp import QmpMachine
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair, process_name
from sealane.testing.wiretap import Tamper, Wiretap

MIB = 1 << 20
HARDWARE = Hardware(memory_mib=256)
WORKLOAD = Workload(fill_mib=48)
# Slow enough that a fault meets the copy in its middle, fast enough that a whole copy takes two seconds.
SLOWLY: dict[str, Any] = {"max_bandwidth_bytes_per_s": 24 * MIB}
_TIDY_TIMEOUT_S = 60.0
_PIDFD = "anon_inode:[pidfd]"

During = Callable[[Migration], object]


@dataclass
class Attempt:
    """How a migration ended, as its source and its destination see it (None where it never had a job for it)."""

    source: Migration
    destination: Migration | None
    wire: Wiretap | None = None

    @property
    def code(self) -> str | None:
        return self.source.problem.code if self.source.problem else None

    @property
    def destination_code(self) -> str | None:
        problem = self.destination.problem if self.destination else None
        return problem.code if problem else None


@dataclass
class Rig:
    """A guest that lives on `home` and tries to go to `away`; a migration that succeeds exchanges the two."""

    pair: HostPair
    guest: Guest
    home: AgentHost
    away: AgentHost
    descriptors: dict[str, int] = field(default_factory=dict)
    settings: MigrationSettings | None = None

    # Migrations

    def attempt(
        self,
        *tampers: Tamper,
        during: During | None = None,
        at_state: str = "copying",
        at_bytes: int = 0,
        **options: Any,
    ) -> Attempt:
        """Migrate through a wiretap with these tampers; `during` is called once, in that state and past so many bytes."""
        with self.wiretap(tampers) as wire:
            last = self.follow(self.begin(**options), during, at_state, at_bytes)
            arrived = self.seen_by(self.away, last.id)
        if last.state == "completed":
            self.arrive()
        return Attempt(last, arrived, wire)

    def begin(self, **options: Any) -> Migration:
        request = {"vm": self.guest.name, "host": self.away.name, **options}
        with self.home.client() as client:
            return client.start_migration(MigrationRequest.model_validate(request))

    def follow(self, last: Migration, during: During | None, at_state: str, at_bytes: int) -> Migration:
        """The migration's last word; `during` may end the agent that tells."""
        with self.home.client() as client:
            for event in client.events(last.id):
                last = event.migration
                if during and last.state == at_state and last.progress.bytes_wire >= at_bytes:
                    meanwhile, during = during, None
                    meanwhile(last)
        assert during is None or last.state == "completed", f"it never came to {at_state}: {last.problem}"
        assert during is None, f"it was {at_state} too shortly"
        return last

    def seen_by(self, end: AgentHost, migration: str) -> Migration | None:
        try:
            return self.pair.await_end(end, migration)
        except SealaneError:
            return None

    def arrive(self) -> None:
        self.guest.moved_to(self.away.name)
        self.home, self.away = self.away, self.home

    @contextmanager
    def wiretap(self, tampers: Sequence[Tamper]) -> Iterator[Wiretap | None]:
        if not tampers:
            yield None
            return
        host = self.away.host
        with Wiretap((host.address, host.port), tampers=tampers, host=self.home.host) as wire:
            address, port = wire.address
            self.home.trust(self.away, address=address, port=port)
            try:
                yield wire
            finally:
                with suppress(SealaneError):
                    self.home.trust(self.away)

    @contextmanager
    def launched_as(self, argv: list[str] | None, *, name: str | None = None) -> Iterator[None]:
        """While it lasts, the destination knows the guest with another launch command, or none, or not at all ("")."""
        qmp = str(self.guest.machines[self.away.name].qmp_path)
        away = self.away
        self._define(away, VmDefinition(name=name or self.guest.name, qmp=qmp, launch_incoming=argv))
        try:
            yield
        finally:
            command = self.guest.machines[away.name].command()
            with away.client() as client:
                client.remove_vm(name or self.guest.name)
                client.add_vm(VmDefinition(name=self.guest.name, qmp=qmp, launch_incoming=command))

    def _define(self, end: AgentHost, vm: VmDefinition) -> None:
        with end.client() as client:
            client.remove_vm(self.guest.name)
            client.add_vm(vm)

    # Who is where

    def qemu_of(self, end: AgentHost) -> int:
        """The QEMU process on this host."""
        found = [pid for pid in end.processes() if "qemu-system" in _executable(pid)]
        assert len(found) == 1, found
        return found[0]

    def enclaves_of(self, end: AgentHost) -> list[int]:
        return [pid for pid in end.processes() if process_name(pid) == ENCLAVE_NAME]

    def enclave_of(self, end: AgentHost) -> int:
        found = self.enclaves_of(end)
        assert len(found) == 1, found
        return found[0]

    def launcher_of(self, end: AgentHost) -> int:
        found = [pid for pid in end.processes() if process_name(pid) == LAUNCHER_NAME]
        assert len(found) == 1, found
        return found[0]

    # What must hold after every fault

    def settings_of(self, end: AgentHost) -> MigrationSettings:
        """What the guest's QEMU there is set to for a migration, once the agent has let go of its socket."""

        async def look() -> MigrationSettings:
            async with QmpMachine.connect(str(self.guest.machines[end.name].qmp_path)) as machine:
                return await machine.migration_settings()

        return asyncio.run(look())

    def assert_set_back(self) -> None:
        """QEMU's settings for a migration are what they were at first, as far as another version of QEMU knows them."""
        assert self.settings is not None, "nobody noted them"
        now, before = self.settings_of(self.home), self.settings
        assert now.capabilities == before.capabilities
        both = now.parameters.keys() & before.parameters.keys()
        assert len(both) >= 10
        assert {name: now.parameters[name] for name in both} == {name: before.parameters[name] for name in both}

    def note_descriptors(self) -> None:
        self.descriptors = {end.name: len(end.descriptors()) for end in (self.home, self.away)}

    def assert_aborted(self, attempt: Attempt, *codes: str, destination: Sequence[str] | None = None) -> None:
        """The VM runs on at the source, the error is one of `codes`, and nothing is left of the attempt."""
        source = attempt.source
        assert (source.state, source.runs_at) == ("aborted", "source"), source
        assert attempt.code in codes, source.problem
        assert source.problem is not None
        assert source.problem.detail
        assert "\n" not in source.problem.detail
        if attempt.destination is not None:
            assert attempt.destination.state == "aborted", attempt.destination
            assert attempt.destination.runs_at == "source", attempt.destination
        if destination is not None:
            assert attempt.destination_code in destination, attempt.destination
        self.assert_goes_on()

    def migration_status(self, end: AgentHost) -> str:
        """What the guest's QEMU there says of its last migration."""

        async def look() -> str:
            async with QmpMachine.connect(str(self.guest.machines[end.name].qmp_path)) as machine:
                return (await machine.migration_status()).status

        return asyncio.run(look())

    def assert_goes_on(self, *, is_set_back: bool = True) -> None:
        """The guest counts on, without a gap, here and only here; nothing else is left, in QEMU's settings neither."""
        self.guest.wait_ticks(2)
        assert self.guest.console.is_contiguous
        assert not self.guest.console.corruptions
        self.assert_tidy()
        if is_set_back:
            self.assert_set_back()
        with self.home.client() as client:
            assert client.vm(self.guest.name).state == "running"
            assert client.host().migrations_active == 0

    def assert_arrived(self, attempt: Attempt) -> None:
        """The VM runs at the destination (which is `home` now), both ends agree, and nothing is left at the source."""
        assert attempt.source.state == "completed", attempt.source.problem
        assert attempt.source.runs_at == "destination"
        assert attempt.destination is not None
        assert attempt.destination.state == "completed", attempt.destination.problem
        self.assert_goes_on()

    def assert_tidy(self) -> None:
        """The agents, the one QEMU, and no process, socket, directory or descriptor more."""
        deadline = time.monotonic() + _TIDY_TIMEOUT_S
        while (untidy := self._untidy()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not untidy, "; ".join(untidy)

    def _untidy(self) -> list[str]:
        found = []
        for end, qemus in ((self.home, 1), (self.away, 0)):
            launchers = [pid for pid in end.processes() if process_name(pid) == LAUNCHER_NAME]
            words = sorted(_command(pid) for pid in end.processes() if pid not in launchers)
            machines = [each for each in words if "qemu-system" in each]
            agents = [each for each in words if "sealane.cli agent" in each]
            quoting = [each for each in words if "sealane.quoting" in each]
            tpms = [each for each in words if f"dir={end.host.scratch / 'tpm'}" in each]  # the host's own
            others = [each for each in words if each not in machines + agents + quoting + tpms]
            if len(machines) != qemus or len(agents) != 1 or len(launchers) > 1 or len(quoting) > 1 or others:
                found.append(f"{end.name} has {words}")
            if sockets := list((end.host.paths.run / "m").glob("*")):
                found.append(f"{end.name} has {sockets}")
            found += self._leaked_descriptors(end, qemus)
            if end.host.namespace and (connections := _connections(end)):
                found.append(f"{end.name} has connections {connections}")
        return found

    def _leaked_descriptors(self, end: AgentHost, qemus: int) -> list[str]:
        """More than at the beginning; an agent watches each QEMU that it launched by one pidfd."""
        now = end.descriptors()
        watched = now.count(_PIDFD)
        if watched <= qemus and len(now) - watched <= self.descriptors[end.name]:
            return []
        return [f"{end.name} had {self.descriptors[end.name]} descriptors and has {now}"]

    def migrate_and_return(self) -> None:
        """The same VM can still be migrated, there and back."""
        for _ in range(2):
            self.assert_arrived(self.attempt())


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:1000] or f"zombie {pid}"
    return "gone"


def _executable(pid: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/exe")
    return ""


def _connections(end: AgentHost) -> list[str]:
    """Established TCP connections of the host's network (state 01, proc(5))."""
    assert end.agent is not None
    lines = Path(f"/proc/{end.agent.process.pid}/net/tcp").read_text().splitlines()[1:]
    return [line for line in lines if line.split()[3] == "01"]


@contextmanager
def make_rig(
    *,
    hardware: Hardware = HARDWARE,
    workload: Workload = WORKLOAD,
    qemu: Any = None,
    **options: Any,
) -> Iterator[Rig]:
    """A pair of agents and a warm guest on the first."""
    with make_pair(**options) as pair:
        guest = pair.add_guest(hardware=hardware, workload=workload, qemu=qemu)
        pair.start_guest(guest, pair.a)
        rig = Rig(pair, guest, pair.a, pair.b)
        rig.settings = rig.settings_of(rig.home)
        for end in (pair.a, pair.b):
            with end.client() as client:
                client.vms()
        rig.note_descriptors()
        yield rig
        for end in (pair.a, pair.b):  # what went wrong inside stands in the agents' logs
            if end.agent:
                assert "Traceback" not in end.agent.output, end.agent.output[-4000:]
