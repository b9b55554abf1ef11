"""A domain between two real libvirtd and two real agents, which tests move to and fro, and meddle with on its way."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sealane.host.models import Migration, MigrationRequest
from sealane.testing.libvirt import DomainSpec, LibvirtHost, LibvirtPair
from sealane.testing.pair import AgentHost
from sealane.testing.wiretap import Tamper, Wiretap

MIB = 1 << 20
SLOWLY: dict[str, Any] = {"max_bandwidth_bytes_per_s": 8 * MIB}
During = Callable[[Migration], object]


@dataclass
class DomainRig:
    """A domain that lives on `home`; a migration that succeeds exchanges the hosts."""

    hosts: LibvirtPair
    home: AgentHost
    away: AgentHost
    spec: DomainSpec

    def libvirt(self, end: AgentHost) -> LibvirtHost:
        return next(each for each in self.hosts.libvirts if each.host is end.host)

    def migrate(
        self, *tampers: Tamper, during: During | None = None, during_disks: During | None = None, **options: object
    ) -> Migration:
        """Try it; with tampers, over a wire that does that to the bytes. `during` is called once in the copy."""
        request = MigrationRequest.model_validate({"vm": self.spec.name, "host": self.away.name, **options})
        target = (self.away.host.address, self.away.host.port)
        with Wiretap(target, tampers=tampers, host=self.home.host) as wire, self.home.client() as client:
            self.lead_through(*wire.address)
            last = client.start_migration(request)
            for event in client.events(last.id):
                last = event.migration
                if during is not None and last.state == "copying" and last.progress.bytes_transferred:
                    during(last)
                    during = None
                if during_disks is not None and last.progress.disk_bytes_transferred:
                    during_disks(last)
                    during_disks = None
        if last.state == "completed":
            self.home, self.away = self.away, self.home
        return last

    def lead_through(self, address: str, port: int) -> None:
        """The way from `home` to `away`."""
        with self.home.client() as client:
            client.remove_peer(self.away.name)
        self.home.trust(self.away, address=address, port=port)

    def states(self) -> dict[str, str]:
        """What each libvirtd says of the domain."""
        found = {}
        for each in self.hosts.libvirts:
            found[each.host.name] = each.virsh("domstate", self.spec.name, check=False).strip() or "absent"
        return found

    def assert_here(self) -> None:
        """The domain runs on `home` and nowhere else, and its guest goes on."""
        deadline = time.monotonic() + 15.0
        while (states := self.states())[self.away.name] not in {"absent", "shut off"} and time.monotonic() < deadline:
            # it never runs: its agent is about to destroy it, and libvirtd shows a domain so whose QEMU it is ending
            assert states[self.away.name] in {"paused", "in shutdown"}
            time.sleep(0.1)
        assert states[self.home.name] == "running"
        assert states[self.away.name] in {"absent", "shut off"}
        self.spec.wait_ticks(self.libvirt(self.home), 2)

    def assert_aborted(self, migration: Migration, code: str) -> None:
        assert (migration.state, migration.runs_at) == ("aborted", "source"), migration
        assert migration.problem is not None
        assert migration.problem.code == code, migration.problem
        self.assert_here()
        self.assert_tidy()

    def assert_tidy(self) -> None:
        """No socket of a migration is left; the agents' jobs may still be at it."""
        deadline = time.monotonic() + 15.0
        while (left := self.left_over()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left

    def left_over(self) -> list[Path]:
        places = (each.outside("/run/sealane-migrate") for each in self.hosts.libvirts)
        return [path for place in places for path in place.glob("*")]
