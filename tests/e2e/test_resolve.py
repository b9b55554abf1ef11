"""Doubt and its end, with real agents and real QEMU: asked and answered, decided by a person, and words that are refused."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sealane.host.models import Migration
from sealane.host.receipts.statement import Statement
from sealane.host.receipts.verify import verify_chain
from sealane.testing.faults import on_channel
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost
from sealane.testing.wiretap import CutConnection, Direction, Wiretap
from tests.e2e.rig import MIB, Rig, make_rig

pytestmark = pytest.mark.e2e
# The agent asks once by itself when it is in doubt, and then leaves the question to the test.
ASKS_ONCE = "[limits]\nask_first_pause_s = 3600.0\n"
HARDWARE, WORKLOAD = Hardware(memory_mib=128), Workload(fill_mib=16)
TICKET: tuple[Direction, int] = ("forward", 0)
RECEIPT: tuple[Direction, int] = ("back", 1)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with make_rig(hardware=HARDWARE, workload=WORKLOAD, settings=ASKS_ONCE) as made:
        yield made


@contextmanager
def in_doubt(rig: Rig, lost: tuple[Direction, int]) -> Iterator[tuple[Wiretap, Migration]]:
    """The word that was lost took the line with it, so that nobody can be asked until it is mended."""
    armed, wires = threading.Event(), list[Wiretap]()
    near, far = rig.home, rig.away

    def go_down(_: bytes) -> bytes:
        wires[0].go_down()
        raise CutConnection

    tamper = on_channel(armed=armed, direction=lost[0], number=lost[1], change=go_down)
    with rig.wiretap([tamper]) as wire:
        assert wire is not None
        wires.append(wire)
        begun = rig.begin(max_bandwidth_bytes_per_s=12 * MIB)
        last = rig.follow(begun, lambda _: armed.set(), "copying", 1)
        assert (last.state, last.runs_at) == ("in-doubt", "in-doubt"), last
        wait(lambda: "could not be asked" in of(rig.home, last).detail, "the agent asks by itself")
        with rig.guest.machines[rig.home.name].observe() as monitor:
            assert monitor.execute("query-status")["status"] == "postmigrate"
        yield wire, last
    near.trust(far)  # the VM may have moved meanwhile, and `wiretap` mends the way from where it is


def of(end: AgentHost, migration: Migration) -> Migration:
    with end.client() as client:
        return client.migration(migration.id)


def wait(condition: Callable[[], bool], what: str, timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def say(rig: Rig, *words: str) -> tuple[int, dict[str, Any]]:
    """`sealane resolve` at the source: its exit status and its last word."""
    done = rig.home.host.run(
        sys.executable, "-m", "sealane.cli", "resolve", rig.guest.name, *words, "--json", check=False
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def assert_back(rig: Rig, migration: Migration, by: str) -> None:
    """The VM runs on at the source, as of the switch-over, and both say so."""
    here = of(rig.home, migration)
    assert (here.state, here.runs_at) == ("aborted", "source"), here
    assert_resolution(rig, here, "own-here", by)
    assert of(rig.away, migration).state == "aborted"
    rig.assert_goes_on()


def assert_away(rig: Rig, migration: Migration, by: str) -> None:
    """The VM runs at the destination, the paused copy is gone, and both say so."""
    here = of(rig.home, migration)
    assert (here.state, here.runs_at) == ("completed", "destination"), here
    assert_resolution(rig, here, "drop-here", by)
    assert of(rig.away, migration).state == "completed"
    rig.arrive()
    rig.assert_goes_on()


def assert_resolution(rig: Rig, migration: Migration, decision: str, by: str) -> None:
    """What was decided stands in the journal and in a signed receipt, in an unbroken chain."""
    assert migration.resolution is not None
    assert (migration.resolution.decision, migration.resolution.by) == (decision, by)
    report = verify_chain(rig.home.host.paths)
    assert not report.problems, report.problems
    said = [each.statement for each in report.items if each.sequence == migration.receipt]
    assert isinstance(said[0], Statement)
    assert said[0].predicate.resolution is not None
    assert said[0].predicate.resolution.model_dump() == migration.resolution.model_dump()


def test_asked_after_the_line_is_back_it_never_arrived(rig: Rig) -> None:
    with in_doubt(rig, TICKET) as (wire, migration):
        status, said = say(rig, "--ask")
        assert (status, said["code"]) == (7, "handover.in-doubt")
        wire.mend()
        status, said = say(rig, "--ask")
        assert (status, said["runs_at"]) == (0, "source")
        assert_back(rig, migration, "destination")
        promised = of(rig.away, migration).resolution
        assert promised is not None
        assert promised.decision == "promised"
        status, said = say(rig, "--ask")
        assert (status, said["code"]) == (6, "migration.over")


def test_asked_after_the_agent_was_started_again_it_runs_there(rig: Rig) -> None:
    with in_doubt(rig, RECEIPT) as (wire, migration):
        assert rig.home.agent is not None
        rig.home.agent.process.kill()
        rig.home.agent.process.wait()
        wire.mend()
        rig.home.start_agent()
        wait(
            lambda: of(rig.home, migration).ended_at is not None and of(rig.home, migration).state == "completed",
            "asked",
        )
        rig.note_descriptors()
        assert of(rig.home, migration).peer_receipt is not None
        assert_away(rig, migration, "destination")


def test_words_against_the_answer_are_refused(rig: Rig) -> None:
    with in_doubt(rig, RECEIPT) as (wire, migration):
        wire.mend()
        status, said = say(rig, "--own-here", "--i-have-looked", "--yes")
        assert (status, said["code"]) == (6, "resolve.against-the-answer")
        assert of(rig.home, migration).state == "in-doubt"
        assert say(rig, "--drop-here", "--yes")[0] == 0
        assert_away(rig, migration, "destination")


def test_an_operator_takes_it_back(rig: Rig) -> None:
    with in_doubt(rig, TICKET) as (_, migration):
        status, said = say(rig, "--own-here")
        assert (status, said["code"]) == (2, "usage.argument")
        status, said = say(rig, "--own-here", "--yes")
        assert (status, said["code"]) == (6, "resolve.could-make-two")
        assert of(rig.home, migration).state == "in-doubt"
        assert say(rig, "--own-here", "--yes", "--i-have-looked")[0] == 0
        assert_back(rig, migration, "operator")


def test_an_operator_lets_it_go(rig: Rig) -> None:
    with in_doubt(rig, RECEIPT) as (_, migration):
        status, said = say(rig, "--drop-here", "--yes")
        assert (status, said["code"]) == (6, "resolve.could-lose-it")
        assert say(rig, "--drop-here", "--yes", "--i-have-looked")[0] == 0
        assert_away(rig, migration, "operator")


def test_afterwards_it_migrates(rig: Rig) -> None:
    rig.migrate_and_return()
