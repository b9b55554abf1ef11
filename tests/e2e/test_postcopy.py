"""A guest that writes faster than the line arrives by postcopy, through cuts too, with its memory as it was."""

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from sealane.cli.client import AgentGone
from sealane.enclave.launcher import ENCLAVE_NAME
from sealane.host.models import Migration
from sealane.testing.machine import Workload
from sealane.testing.pair import AgentHost, process_name
from sealane.testing.wiretap import Direction
from tests.e2e.rig import MIB, Attempt, Rig, make_rig
from tests.e2e.test_crashes import kill_agent, wait

pytestmark = pytest.mark.e2e

BUSY = Workload(fill_mib=32, rewrite_kib_per_s=20 * 1024)
# The rewrites outrun it; the first pass over what the guest holds takes some eight seconds.
SLOWER = {
    "max_bandwidth_bytes_per_s": 12 * MIB,
    "downtime_limit_ms": 100,
    "reduce": False,
    "on_stall": "postcopy",
    "give_up_after_s": 1,
}


@pytest.fixture(scope="module")
def busy() -> Iterator[Rig]:
    with make_rig(workload=BUSY, settings="[limits]\nstop_grace_s = 0.1\n") as rig:
        yield rig


def followed(rig: Rig, **options: object) -> list[Migration]:
    """Every word of the migration, the last one at the end."""
    begun = rig.begin(**options)
    with rig.home.client() as client:
        return [event.migration for event in client.events(begun.id)]


def untouched(_connection: int, _direction: Direction, _offset: int, data: bytes) -> bytes:
    return data


def test_arrives_though_it_writes_faster_than_the_line(busy: Rig) -> None:
    told = followed(busy, **SLOWER)
    last = told[-1]
    assert last.state == "completed", last.problem
    assert last.result is not None
    assert last.result.downtime_ms is not None
    assert last.result.copy_ms is not None
    assert last.result.downtime_ms < last.result.copy_ms
    states = list(dict.fromkeys(each.state for each in told))
    assert states[-4:] == ["copying", "switching-over", "postcopy", "completed"]
    assert any(each.progress.postcopy_requests for each in told if each.state == "postcopy")
    assert all(each.runs_at == "destination" for each in told if each.state == "postcopy")
    attempt = Attempt(last, busy.seen_by(busy.away, last.id))
    assert attempt.destination is not None
    assert attempt.destination.stream_digest == last.stream_digest is not None
    busy.arrive()
    busy.assert_arrived(attempt)


def meanwhile(rig: Rig, what: Callable[[Migration], object], **options: object) -> list[Migration]:
    """As `followed`; `what` is done at each word, and may end the agent that tells."""
    begun = rig.begin(**options)
    told = []
    with rig.home.client() as client, suppress(AgentGone):
        for event in client.events(begun.id):
            told.append(event.migration)
            what(event.migration)
    return told


def is_half_way(migration: Migration) -> bool:
    """The guest runs at the destination, and has asked for pages: QEMU is through its switch at both ends."""
    return migration.state == "postcopy" and bool(migration.progress.postcopy_requests)


def test_a_cut_half_way_is_joined_again(busy: Rig) -> None:
    with busy.wiretap([untouched]) as wire:
        assert wire is not None
        cuts: list[int] = []

        def cut_once(migration: Migration) -> None:
            if is_half_way(migration) and not cuts:
                cuts.append(migration.progress.bytes_wire)
                wire.cut()
            elif migration.state == "postcopy-paused":
                wire.mend()

        told = meanwhile(busy, cut_once, **SLOWER)
    last = told[-1]
    assert cuts
    assert "postcopy-paused" in [each.state for each in told]
    assert last.state == "completed", last.problem
    assert last.problem is None
    assert last.result is not None
    assert last.result.bytes_wire > cuts[0]
    attempt = Attempt(last, busy.seen_by(busy.away, last.id))
    busy.arrive()
    busy.assert_arrived(attempt)


def test_agents_that_are_killed_half_way_join_the_halves_when_they_are_there_again(busy: Rig) -> None:
    killed: list[str] = []

    def kill_both(migration: Migration) -> None:
        if is_half_way(migration) and not killed:
            killed.append(migration.id)
            for end in (busy.home, busy.away):
                kill_agent(end)

    told = meanwhile(busy, kill_both, **SLOWER)
    assert killed
    assert told[-1].state == "postcopy"
    for end in (busy.away, busy.home):
        end.start_agent()
    with busy.home.client() as client:
        again = [event.migration for event in client.events(killed[0])]
    last = busy.pair.await_end(busy.home, killed[0])
    assert last.state == "completed", (last, [each.detail for each in again])
    attempt = Attempt(last, busy.seen_by(busy.away, last.id))
    busy.note_descriptors()
    busy.arrive()
    busy.assert_arrived(attempt)


def has_enclave(end: AgentHost) -> bool:
    """Whether one lives there, with or without an agent."""
    return ENCLAVE_NAME in {process_name(pid) for pid in end.host.processes()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: str(how.name))
def test_the_rest_of_the_memory_comes_without_the_destinations_agent(busy: Rig, how: signal.Signals) -> None:
    home, away = busy.home, busy.away
    there = busy.guest.machines[away.name]
    ended: list[str] = []

    def end_agent(migration: Migration) -> None:
        if not is_half_way(migration) or ended:
            return
        ended.append(migration.id)
        assert away.agent is not None
        away.agent.process.send_signal(how)
        away.agent.process.wait(30)
        if how is signal.SIGKILL:  # and until all of the memory is there
            assert has_enclave(away)
            ticks = len(there.console.ticks)
            wait(lambda: len(there.console.ticks) >= ticks + 3, "the guest goes on")
            wait(lambda: not has_enclave(away), "the enclave has nothing left to do")
            with there.observe() as monitor:
                assert monitor.execute("query-migrate")["status"] == "completed"
        away.start_agent()

    told = meanwhile(busy, end_agent, **SLOWER)
    last = told[-1]
    assert ended
    for problem in (each.problem for each in told if each.problem):  # it asks, and has seen no cut
        assert "the lanes are closed" in problem.detail, problem
    assert last.state == "completed", last.problem
    attempt = Attempt(last, busy.pair.await_end(away, last.id))
    assert attempt.source.id == busy.pair.await_end(home, last.id).id
    busy.note_descriptors()
    busy.arrive()
    busy.assert_arrived(attempt)
