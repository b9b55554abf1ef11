"""A postcopy whose halves stay parted: a person has them joined again, or ends the half whose other half is lost.

The agents give up after two tries, where others try for ten minutes.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sealane.errors import SealaneError
from sealane.host.models import Migration, ResolveRequest
from sealane.host.receipts.statement import Statement
from sealane.host.receipts.verify import verify_chain
from sealane.testing.pair import AgentHost
from tests.e2e.held import held_agent
from tests.e2e.rig import MIB, Attempt, Rig, make_rig
from tests.e2e.test_crashes import kill_agent, wait
from tests.e2e.test_postcopy import BUSY, SLOWER, is_half_way, meanwhile, untouched

pytestmark = pytest.mark.e2e

# The agents give up soon.
IMPATIENT = "from sealane import limits; limits.REJOIN_PAUSES_S = (0.2, 0.5)"

QUICKER = {**SLOWER, "max_bandwidth_bytes_per_s": 16 * MIB}
# A QEMU that itself waits for a page answers its agent nothing more, however long the agent waits.
SETTINGS = "[limits]\nqmp_timeout_s = 5.0\n"


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("halves") / "hold"


@pytest.fixture(scope="module")
def busy(hold: Path) -> Iterator[Rig]:
    with make_rig(workload=BUSY, program=held_agent(hold, IMPATIENT), settings=SETTINGS) as rig:
        yield rig


def say(rig: Rig, end: AgentHost, *words: str) -> tuple[int, str]:
    """`sealane resolve` on that host: its exit status, and the error's code or where the VM runs now."""
    done = end.host.run(sys.executable, "-m", "sealane.cli", "resolve", rig.guest.name, *words, "--json", check=False)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, said.get("code") or said["runs_at"]


def refused(end: AgentHost, migration: Migration, decision: str, *, looked: bool = False) -> str:
    """The code with which the agent refuses the word."""
    request = ResolveRequest.model_validate({"decision": decision, "i_have_looked": looked})
    with end.client() as client, pytest.raises(SealaneError) as raised:
        client.resolve(migration.id, request)
    return raised.value.code


def of(end: AgentHost, migration: Migration) -> Migration:
    with end.client() as client:
        return client.migration(migration.id)


def half_way(rig: Rig, what: Callable[[], object]) -> Migration:
    """The source's last word on a postcopy that `what` befell in its middle."""
    happened: list[bool] = []

    def once(migration: Migration) -> None:
        if is_half_way(migration) and not happened:
            happened.append(True)
            what()

    last = meanwhile(rig, once, **QUICKER)[-1]
    assert happened
    return last


def kill_host(rig: Rig, end: AgentHost) -> None:
    """Agent, enclaves and QEMU; what the agent could have noted of it is not noted."""
    qemu = rig.qemu_of(end)
    kill_agent(end)
    os.kill(qemu, signal.SIGKILL)


def assert_lost(end: AgentHost, migration: Migration, *, by: str | None) -> None:
    """Nothing of the VM is left on that host, which says so; the receipt names who decided it."""
    now = of(end, migration)
    assert (now.state, now.runs_at) == ("completed", "nowhere"), now
    assert now.ended_at is not None
    with end.client() as client:
        assert client.vm(now.vm).state == "absent"
        assert client.host().migrations_active == 0
    report = verify_chain(end.host.paths)
    assert not report.problems, report.problems
    (said,) = [each.statement for each in report.items if each.sequence == now.receipt]
    assert isinstance(said, Statement)
    assert said.predicate.outcome.runs_at == "nowhere"
    assert (said.predicate.resolution and said.predicate.resolution.by) == by


def test_a_person_has_them_joined_again(busy: Rig) -> None:
    home, away = busy.home, busy.away
    with busy.wiretap([untouched]) as wire:
        assert wire is not None
        last = half_way(busy, wire.cut)
        assert (last.state, last.ended_at) == ("postcopy-paused", None), last
        assert say(busy, home, "--ask") == (7, "resolve.parted")
        assert refused(home, last, "own-here", looked=True) == "resolve.half"
        assert refused(home, last, "drop-here") == "resolve.could-lose-it"
        wait(lambda: "times tried" in of(home, last).detail, "the agent gives up again")
        wire.mend()
        assert refused(home, last, "drop-here", looked=True) == "resolve.against-the-answer"
        assert refused(away, last, "ask") == "resolve.parted"
        assert refused(away, last, "drop-here") == "resolve.could-lose-it"
        assert say(busy, home, "--ask") == (0, "destination")
        done = busy.pair.await_end(home, last.id)
        arrived = busy.seen_by(away, last.id)
    busy.arrive()
    busy.assert_arrived(Attempt(done, arrived))


def test_the_destinations_host_is_lost(busy: Rig) -> None:
    home, away = busy.home, busy.away
    last = half_way(busy, lambda: kill_host(busy, away))
    assert (last.state, last.ended_at) == ("postcopy-paused", None), last
    qemu = busy.qemu_of(home)
    assert say(busy, home, "--drop-here", "--yes") == (6, "resolve.could-lose-it")
    assert of(home, last).state == "postcopy-paused"
    assert os.path.exists(f"/proc/{qemu}")
    assert say(busy, home, "--drop-here", "--yes", "--i-have-looked") == (0, "nowhere")
    wait(lambda: qemus(home) == 0, "the source's half is ended")
    assert_lost(home, last, by="operator")
    away.start_agent()
    busy.pair.await_end(away, last.id)
    assert_lost(away, last, by=None)


def test_the_sources_host_is_lost(busy: Rig) -> None:
    home, away = busy.home, busy.away
    busy.guest.machines[home.name].stop()
    busy.pair.start_guest(busy.guest, home)
    last = half_way(busy, lambda: kill_host(busy, home))
    wait(lambda: of(away, last).state == "postcopy-paused", "the destination sees the cut")
    assert refused(away, last, "drop-here") == "resolve.could-lose-it"
    assert say(busy, away, "--drop-here", "--yes", "--i-have-looked") == (0, "nowhere")
    wait(lambda: qemus(away) == 0, "the destination's half is ended")
    assert_lost(away, last, by="operator")
    home.start_agent()  # it keeps its word of the VM, though its QEMU is gone: only the destination can tell
    wait(lambda: of(home, last).state == "postcopy-paused", "recovery looks at it")
    assert say(busy, home, "--drop-here", "--yes") == (0, "nowhere")
    assert_lost(home, last, by="operator")


def test_the_destinations_host_is_lost_within_the_switch(busy: Rig, hold: Path) -> None:
    """The source's QEMU finds its lanes gone when it is told to switch: the VM is whole there."""
    home, away = busy.home, busy.away
    busy.guest.machines[home.name].stop()
    busy.pair.start_guest(busy.guest, home)
    hold.touch()

    def once(migration: Migration) -> None:
        if migration.state == "postcopy" and hold.exists():
            kill_host(busy, away)
            # its lanes are gone for QEMU too: a switch into one that is still open it would believe in
            wait(lambda: not busy.enclaves_of(home), "the source's enclave has ended")
            hold.unlink()

    last = meanwhile(busy, once, **QUICKER)[-1]
    assert not hold.exists()
    assert (last.state, last.ended_at) == ("postcopy-paused", None), last
    assert say(busy, home, "--own-here", "--yes") == (6, "resolve.could-make-two")
    assert say(busy, home, "--own-here", "--yes", "--i-have-looked") == (0, "source")
    away.start_agent()
    assert busy.pair.await_end(away, last.id).state == "aborted"
    # a QEMU that was stranded takes no settings any more
    busy.assert_goes_on(is_set_back=busy.migration_status(home) not in {"device", "cancelling"})


def qemus(end: AgentHost) -> int:
    found = 0
    for pid in end.processes():
        try:
            found += "qemu-system" in os.readlink(f"/proc/{pid}/exe")
        except OSError:
            continue
    return found
