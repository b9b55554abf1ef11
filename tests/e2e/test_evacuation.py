"""A host is emptied: eight VMs leave at once, or stay and say why; and what an evacuation does when it is disturbed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from sealane.host.models import VmDefinition
from sealane.testing.hosts import BackgroundProcess
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import PROGRAM, AgentHost, Guest, HostPair, make_pair

pytestmark = pytest.mark.e2e

HARDWARE = Hardware(memory_mib=128)
# The guests tick seldom: eight of them share the machine's cores.
WORKLOAD = Workload(fill_mib=16, tick_ms=250)
# So slow that a copy lasts until it is cancelled.
SLOW = 1 << 18


@dataclass
class Fleet:
    """Guests that all run on `a`."""

    pair: HostPair
    guests: dict[str, Guest]

    def evacuate(self, *arguments: str, expect: int = 0) -> list[dict[str, Any]]:
        """Run `sealane evacuate host-b … --json` on host-a to its end; its lines."""
        host = self.pair.a.host
        done = subprocess.run(
            [*host.launcher, *PROGRAM, "evacuate", "host-b", *arguments, "--json"],
            env=host.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == expect, (done.stdout[-3000:], done.stderr[-3000:])
        return [json.loads(line) for line in done.stdout.splitlines()]

    def assert_runs(self, name: str, end: AgentHost) -> None:
        """The guest counts on without a gap there, and only there."""
        guest = self.guests[name]
        if guest.travelled[-1] != end.name:
            guest.moved_to(end.name)
        guest.wait_ticks(2, timeout_s=30.0)
        assert guest.console.is_contiguous
        assert not guest.console.corruptions
        other = self.pair.b if end is self.pair.a else self.pair.a
        with end.client() as here, other.client() as there:
            assert here.vm(name).state == "running"
            deadline = time.monotonic() + 30.0
            while there.vm(name).state != "absent":  # a destination that was told to give up tidies up meanwhile
                assert time.monotonic() < deadline, there.vm(name)
                time.sleep(0.05)


@contextmanager
def fleet_of(count: int, settings: str = "") -> Iterator[Fleet]:
    with make_pair(settings=settings) as pair:
        fleet = Fleet(pair, {})
        for number in range(1, count + 1):
            guest = pair.add_guest(f"web{number:02}", hardware=HARDWARE, workload=WORKLOAD)
            pair.start_guest(guest, pair.a)
            fleet.guests[guest.name] = guest
        yield fleet
        for end in (pair.a, pair.b):
            if end.agent:
                assert "Traceback" not in end.agent.output, end.agent.output[-4000:]
                lines = [json.loads(line) for line in end.agent.output.splitlines() if line.startswith("{")]
                assert not [line for line in lines if "vm" in line and "migration" not in line]


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return next(line for line in lines if line["type"] == "summary")


def test_eight_vms_leave_at_once() -> None:
    """One of them has no launch command at the destination: it stays, says why, and the others arrive all the same."""
    with fleet_of(8) as fleet:
        pair = fleet.pair
        stays = fleet.guests["web05"]
        with pair.b.client() as client:
            client.remove_vm(stays.name)
            client.add_vm(VmDefinition(name=stays.name, qmp=str(stays.machines["host-b"].qmp_path)))
        lines = fleet.evacuate("--all", expect=6)
        told = summary(lines)
        assert (told["arrived"], told["stayed"], told["in-doubt"]) == (7, 1, 0), told
        by_name = {each["vm"]: each for each in told["vms"]}
        assert by_name["web05"]["code"] == "check.no-launch"
        for name in fleet.guests:
            fleet.assert_runs(name, pair.a if name == "web05" else pair.b)
        states = [line["migration"] for line in lines if line["type"] in {"state", "progress", "end"}]
        queued = [one for one in states if one["state"] == "queued"]
        assert {one["vm"] for one in queued} == {"web05", "web06", "web07", "web08"}
        assert all("limits.outgoing_max" in one["queue"]["why"] for one in queued)
        with pair.b.client() as client:
            client.remove_vm(stays.name)
            definition = VmDefinition(
                name=stays.name,
                qmp=str(stays.machines["host-b"].qmp_path),
                launch_incoming=stays.machines["host-b"].command(),
            )
            client.add_vm(definition)
        assert summary(fleet.evacuate("--all"))["arrived"] == 1
        fleet.assert_runs("web05", pair.b)
        assert summary(fleet.evacuate("--all"))["vms"] == []


@contextmanager
def evacuating(fleet: Fleet) -> Iterator[BackgroundProcess]:
    process = fleet.pair.a.host.start(*PROGRAM, "evacuate", "host-b", "--all", "--parallel", "1", "--json")
    try:
        yield process
    finally:
        process.stop()


def until(process: BackgroundProcess, found: Callable[[list[dict[str, Any]]], bool]) -> None:
    process.wait_until(lambda: found(lines_of(process)), "the evacuation's progress", timeout_s=30.0)


def lines_of(process: BackgroundProcess) -> list[dict[str, Any]]:
    found = []
    for line in process.output.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # half a line, so far
    return found


def is_copying(lines: list[dict[str, Any]]) -> bool:
    return any(line.get("migration", {}).get("state") == "copying" for line in lines)


def test_ctrl_c_keeps_what_waits_and_then_what_moves() -> None:
    settings = f"[limits]\nrate_max_bytes_per_s = {SLOW}\n"
    with fleet_of(3, settings) as fleet:
        with evacuating(fleet) as process:
            until(process, is_copying)
            os.kill(process.process.pid, signal.SIGINT)
            until(process, lambda lines: sum(line["type"] == "end" for line in lines) == 2)
            os.kill(process.process.pid, signal.SIGINT)
            assert process.process.wait(30) == 6
            told = summary(lines_of(process))
        assert (told["arrived"], told["stayed"]) == (0, 3), (told, process.output)
        assert {each["code"] for each in told["vms"]} == {"migration.cancelled"}
        for name in fleet.guests:
            fleet.assert_runs(name, fleet.pair.a)
