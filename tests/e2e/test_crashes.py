"""Processes that die in the middle: enclaves, agents, QEMU. The VM runs on where it was, or is told to be gone."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from sealane.cli.client import AgentGone
from sealane.errors import SealaneError
from sealane.host.models import Migration, MigrationRequest
from sealane.testing.pair import AgentHost
from tests.e2e.rig import MIB, SLOWLY, Rig, make_rig

pytestmark = pytest.mark.e2e

MIDDLE = 8 * MIB


def test_source_enclave_killed(rig: Rig) -> None:
    attempt = rig.attempt(during=lambda _: kill(rig.enclave_of(rig.home)), at_bytes=MIDDLE, **SLOWLY)
    rig.assert_aborted(attempt, "enclave.died", destination=["peer.closed", "lane.cut", "lane.truncated"])


def test_destination_enclave_killed(rig: Rig) -> None:
    attempt = rig.attempt(during=lambda _: kill(rig.enclave_of(rig.away)), at_bytes=MIDDLE, **SLOWLY)
    rig.assert_aborted(attempt, "peer.closed", "lane.cut", "lane.truncated", destination=["enclave.died"])


def test_launchers_killed(rig: Rig) -> None:
    """Enclaves that are there go on, and the next migration finds new launchers."""

    def kill_both(_: Migration) -> None:
        for end in (rig.home, rig.away):
            kill(rig.launcher_of(end))

    attempt = rig.attempt(during=kill_both, at_bytes=MIDDLE, **SLOWLY)
    rig.assert_arrived(attempt)
    rig.assert_arrived(rig.attempt())


def test_destination_agent_killed(rig: Rig) -> None:
    """Its enclave dies with it, so its QEMU loses its stream and ends: nothing waits for the restart."""
    away = rig.away
    attempt = crash(rig, away, lambda: kill_agent(away))
    assert (attempt.state, attempt.runs_at) == ("aborted", "source"), attempt
    assert attempt.problem is not None
    assert attempt.problem.code in {"peer.closed", "lane.cut", "lane.truncated"}
    rig.guest.wait_ticks(2)
    wait(lambda: not away.host.processes(), "the destination's processes end without their agent")
    recovered = restarted(rig, away, attempt.id)
    assert (recovered.state, recovered.runs_at) == ("aborted", "source"), recovered
    assert recovered.problem is not None
    assert recovered.problem.code == "agent.restarted"
    rig.assert_goes_on()
    rig.assert_arrived(rig.attempt())


def test_source_qemu_hangs_when_it_should_take_the_vm_back() -> None:
    """Bounded tries, then the truth in `status`, and the VM runs again as soon as QEMU answers: no person is needed."""
    with make_rig(settings="[limits]\nqmp_timeout_s = 0.5\n") as rig:
        qemu = rig.qemu_of(rig.home)

        def hang(migration: Migration) -> None:
            os.kill(qemu, signal.SIGSTOP)
            with rig.home.client() as client, suppress(SealaneError):
                client.cancel(migration.id)

        begun = rig.begin(**SLOWLY)
        try:
            last = rig.follow(begun, hang, "copying", MIDDLE)
            assert (last.state, last.runs_at, last.ended_at) == ("aborted", "nowhere", None), last
            assert "may be paused here" in last.detail
            with rig.home.client() as client, pytest.raises(SealaneError, match=r"vm\.busy"):
                client.start_migration(MigrationRequest(vm=rig.guest.name, host=rig.away.name))
        finally:
            os.kill(qemu, signal.SIGCONT)
        settled = rig.pair.await_end(rig.home, begun.id)
        assert (settled.state, settled.runs_at) == ("aborted", "source"), settled
        assert settled.problem
        assert settled.problem.code in {"migration.cancelled", "vm.unreachable"}
        rig.assert_goes_on()


def test_source_agent_killed(rig: Rig) -> None:
    home, away = rig.home, rig.away
    begun = rig.begin(**SLOWLY)
    follow_until(home, begun.id, MIDDLE)
    kill_agent(home)
    rig.guest.wait_ticks(2)
    seen = rig.pair.await_end(away, begun.id)
    assert (seen.state, seen.runs_at) == ("aborted", "source"), seen
    assert seen.problem is not None
    assert seen.problem.code in {"peer.closed", "lane.cut", "lane.truncated"}
    assert len(home.host.processes()) == 1, "only QEMU goes on without its agent"
    recovered = restarted(rig, home, begun.id)
    assert (recovered.state, recovered.runs_at) == ("aborted", "source"), recovered
    assert recovered.problem is not None
    assert recovered.problem.code == "agent.restarted"
    rig.assert_goes_on()
    rig.assert_arrived(rig.attempt())


@pytest.mark.parametrize("end", ["source", "destination"])
def test_agent_killed_while_preparing(rig: Rig, end: str) -> None:
    killed = rig.home if end == "source" else rig.away
    begun = rig.begin()
    wait(lambda: any("qemu" in name for name in executables(rig.away)), "the destination's QEMU is launched")
    kill_agent(killed)
    if end == "destination":
        rig.pair.await_end(rig.home, begun.id)
    recovered = restarted(rig, killed, begun.id)
    assert (recovered.state, recovered.runs_at) == ("aborted", "source"), recovered
    rig.assert_goes_on()


@pytest.mark.parametrize("end", ["source", "destination"])
def test_agent_stopped_in_the_middle(end: str) -> None:
    """SIGTERM: what can end within the grace does, the rest is aborted; the agent ends by itself with status 0."""
    with make_rig(settings="[limits]\nstop_grace_s = 0.5\n") as rig:
        stopped = rig.home if end == "source" else rig.away
        begun = rig.begin(max_bandwidth_bytes_per_s=4 * MIB)
        follow_until(rig.home, begun.id, 2 * MIB)
        assert stopped.agent is not None
        assert stopped.agent.stop(timeout_s=8.0) == 0
        if end == "destination":
            seen = rig.pair.await_end(rig.home, begun.id)
            assert seen.problem is not None
            assert seen.problem.code in {"agent.stopping", "migration.cancelled"}, seen
        stopped.start_agent()
        for host in (rig.home, rig.away):
            ended = rig.pair.await_end(host, begun.id)
            assert (ended.state, ended.runs_at) == ("aborted", "source"), ended
        rig.note_descriptors()
        rig.assert_goes_on()
        rig.assert_arrived(rig.attempt())


def test_destination_agent_stopped_between_prepare_and_lanes(rig: Rig) -> None:
    away = rig.away
    begun = rig.begin()
    wait(lambda: any("qemu" in name for name in executables(away)), "the destination's QEMU is launched")
    assert away.agent is not None
    away.agent.process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    away.agent.process.send_signal(signal.SIGCONT)
    last = rig.pair.await_end(rig.home, begun.id)
    assert last.state == "completed", last.problem
    rig.arrive()
    rig.assert_goes_on()


def test_source_qemu_killed() -> None:
    """Nothing can bring the VM back: this is said, and nothing else is left behind."""
    with make_rig() as rig:
        attempt = rig.attempt(during=lambda _: kill(rig.qemu_of(rig.home)), at_bytes=MIDDLE, **SLOWLY)
        assert (attempt.source.state, attempt.source.runs_at) == ("aborted", "nowhere"), attempt.source
        assert attempt.code == "vm.unreachable", attempt.source.problem
        assert attempt.destination is not None
        assert attempt.destination.state == "aborted"
        codes = {"vm.unreachable", "migration.destination-died"}
        assert attempt.destination_code in codes, attempt.destination.problem
        wait(
            lambda: len(rig.home.processes()) == len(rig.away.processes()) == 3,
            "only agents, launchers and quoting processes are left",
        )
        with rig.home.client() as client:
            assert client.vm(rig.guest.name).state == "absent"
        rig.guest.machines[rig.home.name].stop()
        rig.pair.start_guest(rig.guest, rig.home)
        rig.assert_arrived(rig.attempt())


def test_afterwards_it_migrates(rig: Rig) -> None:
    rig.migrate_and_return()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def kill_agent(end: AgentHost) -> None:
    assert end.agent is not None
    end.agent.process.kill()
    end.agent.process.wait()


def crash(rig: Rig, end: AgentHost, break_it: Callable[[], None]) -> Migration:
    """The source's last word on a migration in whose middle something is broken."""
    return rig.follow(rig.begin(**SLOWLY), lambda _: break_it(), "copying", MIDDLE)


def restarted(rig: Rig, end: AgentHost, migration: str) -> Migration:
    end.start_agent()
    found = rig.pair.await_end(end, migration)
    rig.note_descriptors()
    return found


def follow_until(end: AgentHost, migration: str, wire_bytes: int) -> None:
    try:
        with end.client() as client:
            for event in client.events(migration):
                if event.migration.progress.bytes_wire >= wire_bytes:
                    return
    except (AgentGone, SealaneError):
        pass
    raise AssertionError(f"it never came to {wire_bytes} bytes")


def executables(end: AgentHost) -> list[str]:
    found = []
    for pid in end.processes():
        try:
            found.append(os.readlink(f"/proc/{pid}/exe"))
        except OSError:
            continue
    return found


def wait(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
