"""Domains of two real libvirtd, moved by two real agents: libvirt's own migration, and one port between the hosts."""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sealane.errors import SealaneError
from sealane.host.models import Migration
from sealane.libvirt.domains import METADATA_NAMESPACE
from sealane.session.preface import PREFACE_BYTES, ConnectionKind, parse_preface
from sealane.testing.libvirt import DomainSpec, libvirtd_works, make_libvirt_pair
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost
from sealane.testing.plainlibvirt import flip_bit_at, lose_the_answer_to_finish, migrate_plainly
from sealane.testing.wiretap import CutConnection, Direction, flip_bit
from tests.e2e.domains import MIB, SLOWLY, DomainRig
from tests.e2e.test_policy import policy

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not libvirtd_works(), reason="two libvirtd need root and Debian's libvirt-daemon-driver-qemu"),
]

METADATA = f"<sealane:vm xmlns:sealane='{METADATA_NAMESPACE}' least-level='1'><sealane:label name='tier' value='web'/></sealane:vm>"
SPEC = DomainSpec(name="web", hardware=Hardware(memory_mib=192), workload=Workload(fill_mib=32), metadata=METADATA)


@dataclass
class LibvirtsAnswers:
    """A tamper: counts what goes back on lane 0, where the answer to Finish is the last 1.2 KB, or cuts it at `cut_at`."""

    cut_at: int | None = None
    count: int = 0
    lane: int | None = None

    def __call__(self, connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        if direction == "forward" and offset == 0:
            preface = parse_preface(data[:PREFACE_BYTES])
            if (preface.kind, preface.lane) == (ConnectionKind.LANE, 0):
                self.lane = connection
        elif direction == "back" and connection == self.lane:
            self.count = offset + len(data)
            if self.cut_at is not None and self.count >= self.cut_at:
                raise CutConnection(data[: max(0, self.cut_at - offset)])
        return data


@pytest.fixture(scope="module")
def moving() -> Iterator[DomainRig]:
    with make_libvirt_pair() as hosts:
        hosts.start_domain(SPEC, hosts.libvirts[0], persistent=True)
        yield DomainRig(hosts, hosts.pair.a, hosts.pair.b, SPEC)


@pytest.fixture(autouse=True)
def _show(moving: DomainRig) -> Iterator[None]:
    yield
    for end in (moving.home, moving.away):
        if end.agent:
            print(f"--- {end.name}\n{end.agent.output[-3000:]}")


def test_domains_are_vms_with_the_labels_of_their_metadata(moving: DomainRig) -> None:
    with moving.home.client() as client:
        (vm,) = client.vms()
    assert (vm.name, vm.driver, vm.source, vm.state) == (SPEC.name, "libvirt", "libvirt", "running")
    assert (vm.labels, vm.least_level) == ({"tier": "web"}, 1)
    assert (vm.memory_bytes, vm.cpus) == (192 * MIB, 1)


@pytest.mark.parametrize("refusing", ["home", "away"])
def test_a_policy_on_the_label_refuses_before_the_domain_stops(moving: DomainRig, refusing: str) -> None:
    rule = 'permit (principal, action, resource); forbid (principal, action, resource in Label::"tier=web");'
    with policy(getattr(moving, refusing), rule):
        refused = moving.migrate()
    moving.assert_aborted(refused, "policy.denied")
    assert refused.progress.bytes_wire == 0


@pytest.mark.parametrize("channels", [0, 2])
def test_a_domain_moves_through_the_lanes_and_goes_on(moving: DomainRig, channels: int) -> None:
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


def test_one_flipped_bit_ends_it_and_the_domain_runs_on(moving: DomainRig) -> None:
    flipped = moving.migrate(flip_bit("forward", offset=8 * MIB), multifd_channels=0)
    moving.assert_aborted(flipped, "lane.integrity")


def test_a_cancel_leaves_the_domain_where_it_is(moving: DomainRig) -> None:
    def cancel(migration: Migration) -> None:
        with moving.home.client() as client:
            client.cancel(migration.id)

    moving.assert_aborted(moving.migrate(during=cancel, multifd_channels=0, **SLOWLY), "migration.cancelled")


def test_the_answer_to_finish_is_lost_and_one_copy_runs(moving: DomainRig) -> None:
    """What makes two running domains of plain libvirt: its connection dies after Finish, before the answer."""
    answers = LibvirtsAnswers()
    moved = moving.migrate(answers, multifd_channels=0, undefine_source=True)
    assert moved.state == "completed", moved
    cut = moving.migrate(LibvirtsAnswers(cut_at=answers.count - 500), multifd_channels=0)
    assert cut.progress.bytes_wire > 32 * MIB
    moving.assert_aborted(cut, "lane.truncated")


@pytest.mark.parametrize("status", [1, 0])
def test_the_hook_is_asked_while_the_domain_is_paused_at_both_ends(
    moving: DomainRig, status: int, tmp_path: Path
) -> None:
    """A hook that says no leaves the domain where it was."""
    seen = tmp_path / "states"
    asking = " ".join(f"virsh -q -c '{each.uri}' domstate {SPEC.name} >>{seen};" for each in moving.hosts.libvirts)
    hook = ["sh", "-c", f"{asking} echo no; exit {status}"]
    moved = moving.migrate(multifd_channels=0, undefine_source=True, switchover_hook=hook)
    assert seen.read_text().split() == ["paused", "paused"]
    if status:
        moving.assert_aborted(moved, "migration.hook-failed")
    else:
        assert moved.state == "completed", moved
        moving.assert_here()


def test_what_no_domain_can_do_is_refused_before_it_stops(moving: DomainRig) -> None:
    refusals: dict[str, dict[str, Any]] = {
        "check.postcopy": {"on_stall": "postcopy"},
        "usage.argument": {"copy_storage": "all", "client": "other"},
    }
    for code, options in refusals.items():
        refused = moving.migrate(**options)
        moving.assert_aborted(refused, code)
        assert refused.progress.bytes_wire == 0


def test_virsh_migrates_through_an_open_lane(moving: DomainRig) -> None:
    home, away = moving.home, moving.away
    moving.lead_through(away.host.address, away.host.port)
    opened = home.host.start(*home.program, "--json", "lane", "open", SPEC.name, away.name)
    opened.wait_for('"type":"lane"')
    lane = next(each for line in opened.output.splitlines() if (each := json.loads(line))["type"] == "lane")
    words = ("migrate", "--live", "--suspend", "--persistent", "--undefinesource", SPEC.name, lane["desturi"])
    home.host.run("virsh", "-q", "-c", lane["connect"], *words, "--migrateuri", lane["migrateuri"])
    opened.wait_until(lambda: not opened.is_running or '"end"' in opened.output, "its end")
    assert opened.process.wait(20) == 0, opened.output
    moving.home, moving.away = away, home
    moving.assert_here()
    moving.assert_tidy()


def test_plain_libvirt_lets_both_run_and_does_not_see_the_flipped_bit(moving: DomainRig) -> None:
    """The same two faults without Sealane, so that what the tests above show is no accident of the rig."""
    first, second = moving.hosts.libvirts
    spec = replace(SPEC, name="plain", metadata="")
    moving.hosts.start_domain(spec, first)

    def states() -> list[str]:
        return [each.virsh("domstate", spec.name, check=False).strip() for each in (first, second)]

    problem, carried = migrate_plainly(first, second, spec.name, memory=flip_bit_at(8 * MIB))
    assert carried > 32 * MIB
    assert (problem, states()) == (None, ["", "running"])
    problem, carried = migrate_plainly(second, first, spec.name, answers=lose_the_answer_to_finish())
    assert carried > 32 * MIB
    assert problem is not None
    assert states() == ["running", "running"]
    for each in (first, second):
        each.virsh("destroy", spec.name)


@pytest.mark.parametrize("dying", ["home", "away"])
def test_an_agent_is_killed_in_mid_copy(moving: DomainRig, dying: str) -> None:
    end: AgentHost = getattr(moving, dying)

    def kill(migration: Migration) -> None:
        assert end.agent is not None
        end.agent.stop(signal.SIGKILL)

    if dying == "away":
        aborted = moving.migrate(during=kill, multifd_channels=0, **SLOWLY)
        assert (aborted.state, aborted.runs_at) == ("aborted", "source"), aborted
    else:
        with pytest.raises(SealaneError):
            moving.migrate(during=kill, multifd_channels=0, **SLOWLY)
    end.start_agent()
    with end.client() as client:
        last = moving.hosts.pair.await_end(end, client.migrations()[0].id)
    assert (last.state, last.runs_at) == ("aborted", "source"), last
    moving.assert_here()
    moving.assert_tidy()
