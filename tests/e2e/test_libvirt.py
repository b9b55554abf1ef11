"""Domains of two real libvirtd, moved by two real agents: libvirt's own migration, and one port between the hosts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sealane.host.models import Migration, MigrationRequest
from sealane.libvirt.domains import METADATA_NAMESPACE
from sealane.testing.libvirt import DomainSpec, LibvirtHost, LibvirtPair, libvirtd_works, make_libvirt_pair
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost
from sealane.testing.wiretap import Tamper, Wiretap
from tests.e2e.test_policy import policy

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not libvirtd_works(), reason="two libvirtd need root and Debian's libvirt-daemon-driver-qemu"),
]

MIB = 1 << 20
METADATA = f"<sealane:vm xmlns:sealane='{METADATA_NAMESPACE}' least-level='1'><sealane:label name='tier' value='web'/></sealane:vm>"
SPEC = DomainSpec(name="web", hardware=Hardware(memory_mib=192), workload=Workload(fill_mib=32), metadata=METADATA)


@dataclass
class Rig:
    """A domain that lives on `home`; a migration that succeeds exchanges the hosts."""

    hosts: LibvirtPair
    home: AgentHost
    away: AgentHost
    wire: list[int] = field(default_factory=list)

    def libvirt(self, end: AgentHost) -> LibvirtHost:
        return next(each for each in self.hosts.libvirts if each.host is end.host)

    def migrate(self, *tampers: Tamper, **options: object) -> Migration:
        """Try it; with tampers, over a wire that does that to the bytes."""
        request = MigrationRequest.model_validate({"vm": SPEC.name, "host": self.away.name, **options})
        target = (self.away.host.address, self.away.host.port)
        with Wiretap(target, tampers=tampers, host=self.home.host) as wire, self.home.client() as client:
            client.remove_peer(self.away.name)
            self.home.trust(self.away, address=wire.address[0], port=wire.address[1])
            last = client.start_migration(request)
            for event in client.events(last.id):
                last = event.migration
        if last.state == "completed":
            self.home, self.away = self.away, self.home
        return last

    def states(self) -> dict[str, str]:
        """What each libvirtd says of the domain."""
        found = {}
        for each in self.hosts.libvirts:
            found[each.host.name] = each.virsh("domstate", SPEC.name, check=False).strip() or "absent"
        return found

    def assert_here(self) -> None:
        """The domain runs on `home` and nowhere else, and its guest goes on."""
        states = self.states()
        assert states[self.home.name] == "running"
        assert states[self.away.name] in {"absent", "shut off"}
        SPEC.wait_ticks(self.libvirt(self.home), 2)

    def assert_aborted(self, migration: Migration, code: str) -> None:
        assert (migration.state, migration.runs_at) == ("aborted", "source"), migration
        assert migration.problem is not None
        assert migration.problem.code == code, migration.problem
        self.assert_here()
        self.assert_tidy()

    def assert_tidy(self) -> None:
        for each in self.hosts.libvirts:
            sockets: Path = each.socket.parents[1] / "sealane-migrate"
            assert not list(sockets.glob("*")), each.host.name


@pytest.fixture(scope="module")
def moving() -> Iterator[Rig]:
    with make_libvirt_pair() as hosts:
        hosts.start_domain(SPEC, hosts.libvirts[0], persistent=True)
        yield Rig(hosts, hosts.pair.a, hosts.pair.b)


@pytest.fixture(autouse=True)
def _show(moving: Rig) -> Iterator[None]:
    yield
    for end in (moving.home, moving.away):
        if end.agent:
            print(f"--- {end.name}\n{end.agent.output[-3000:]}")


def test_domains_are_vms_with_the_labels_of_their_metadata(moving: Rig) -> None:
    with moving.home.client() as client:
        (vm,) = client.vms()
    assert (vm.name, vm.driver, vm.source, vm.state) == (SPEC.name, "libvirt", "libvirt", "running")
    assert (vm.labels, vm.least_level) == ({"tier": "web"}, 1)
    assert (vm.memory_bytes, vm.cpus) == (192 * MIB, 1)


@pytest.mark.parametrize("refusing", ["home", "away"])
def test_a_policy_on_the_label_refuses_before_the_domain_stops(moving: Rig, refusing: str) -> None:
    rule = 'permit (principal, action, resource); forbid (principal, action, resource in Label::"tier=web");'
    with policy(getattr(moving, refusing), rule):
        refused = moving.migrate()
    moving.assert_aborted(refused, "policy.denied")
    assert refused.progress.bytes_wire == 0


@pytest.mark.parametrize("channels", [0, 2])
def test_a_domain_moves_through_the_lanes_and_goes_on(moving: Rig, channels: int) -> None:
    moved = moving.migrate(multifd_channels=channels, undefine_source=True)
    assert (moved.state, moved.runs_at, moved.multifd_channels) == ("completed", "destination", channels), moved
    moving.assert_here()
    moving.assert_tidy()
    assert moving.states()[moving.away.name] == "absent"
    assert moving.libvirt(moving.home).virsh("dominfo", SPEC.name).split("Persistent:")[1].split()[0] == "yes"
    assert moved.result is not None
    assert moved.result.bytes_wire > 32 * MIB
    with moving.home.client() as client:
        (arrived,) = client.vms()
    assert (arrived.state, arrived.epoch, arrived.labels) == ("running", moved.epoch, {"tier": "web"})
