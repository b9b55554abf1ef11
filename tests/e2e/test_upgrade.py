"""An agent is stopped and a newer one started, while VMs run and while they move: VMs, sockets and migrations are found again."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sealane.testing.hosts import BackgroundProcess
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import PROGRAM, AgentHost
from tests.e2e.rig import MIB, Rig, make_rig
from tests.e2e.test_crashes import follow_until
from tests.e2e.test_evacuation import lines_of

pytestmark = pytest.mark.e2e

SMALL, LITTLE = Hardware(memory_mib=128), Workload(fill_mib=24)
NEWER = "99.0.0"
# What the next version's package would be: the same program, which calls itself newer.
NEWER_PROGRAM = (
    *(sys.executable, "-c"),
    f"'sealane.cli agent'; import sealane; sealane.__version__ = {NEWER!r}; from sealane.cli.application import main; main()",
)


def upgrade(end: AgentHost) -> None:
    """SIGTERM, the new program, start; what a package's upgrade does by `systemctl restart`."""
    assert end.agent is not None
    assert end.agent.stop(timeout_s=120.0) == 0
    assert not end.host.paths.agent_socket.exists()
    end.program = NEWER_PROGRAM
    end.start_agent()
    with end.client() as client:
        assert client.host().version == NEWER


@contextmanager
def stays_up(rig: Rig, end: AgentHost) -> Iterator[None]:
    """The VM's QEMU is the same process afterwards, and the guest has missed no tick."""
    qemu = rig.qemu_of(end)
    yield
    assert os.path.exists(f"/proc/{qemu}")
    rig.note_descriptors()
    rig.assert_goes_on()


def test_upgrade_while_vms_run_and_while_one_leaves() -> None:
    """The VM came by the agent that is upgraded, which launched its QEMU. What can end within the grace does."""
    with make_rig(settings="[limits]\nstop_grace_s = 90\n", hardware=SMALL, workload=LITTLE) as rig:
        rig.assert_arrived(rig.attempt())
        host_b = rig.home
        with host_b.client() as client:
            before = client.vm(rig.guest.name)
        with stays_up(rig, host_b):
            upgrade(host_b)
        with host_b.client() as client:
            assert client.vm(rig.guest.name) == before
        begun = rig.begin(max_bandwidth_bytes_per_s=12 * MIB)
        follow_until(host_b, begun.id, 4 * MIB)
        upgrade(host_b)
        for end in (rig.home, rig.away):
            ended = rig.pair.await_end(end, begun.id)
            assert (ended.state, ended.runs_at) == ("completed", "destination"), ended
        rig.arrive()
        rig.note_descriptors()
        rig.assert_goes_on()


def test_upgrade_in_the_middle_of_an_evacuation() -> None:
    """What cannot end within the grace is aborted, the VM runs on; the evacuation finds the new agent and asks again."""
    slowly = "[limits]\nstop_grace_s = 0.2\nrate_max_bytes_per_s = 1048576\n"
    with make_rig(settings=slowly, hardware=SMALL, workload=LITTLE) as rig:
        home = rig.home
        process = home.host.start(*PROGRAM, "evacuate", rig.away.name, "--all", "--json")
        try:
            first = _the_one_that_copies(process)
            follow_until(home, first, MIB)
            (home.host.paths.config / "agent.toml").write_text("[limits]\nstop_grace_s = 0.2\n")
            upgrade(home)
            assert process.process.wait(150) == 0, process.output[-3000:]
        finally:
            process.stop()
        told = json.loads(process.output.splitlines()[-1])
        assert (told["type"], told["arrived"]) == ("summary", 1)
        ended = rig.pair.await_end(home, first)
        assert (ended.state, ended.runs_at, ended.problem and ended.problem.code) == (
            *("aborted", "source"),
            "agent.stopping",
        )
        rig.arrive()
        rig.note_descriptors()
        rig.assert_goes_on()


def _the_one_that_copies(process: BackgroundProcess) -> str:
    """As the evacuation itself tells it; an evacuation that ends before is heard of at once."""
    copying: list[str] = []

    def heard() -> bool:
        for line in lines_of(process):
            migration = line.get("migration", {})
            if migration.get("state") == "copying":
                copying.append(migration["id"])
        return bool(copying)

    process.wait_until(heard, "a copy", timeout_s=90.0)
    return copying[0]
