"""Two fresh agents are paired by the command line, and then a VM moves between them."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from sealane.testing.hosts import BackgroundProcess
from sealane.testing.pair import AgentHost, HostPair, make_pair
from tests.e2e.rig import HARDWARE, WORKLOAD

pytestmark = pytest.mark.e2e

PAIR = (sys.executable, "-m", "sealane.cli", "--json", "pair")


@pytest.fixture(scope="module")
def pair() -> Iterator[HostPair]:
    with make_pair(strangers=True) as made:
        yield made


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def shown_code(end: AgentHost) -> tuple[BackgroundProcess, str]:
    """`sealane pair` there, and the code that it shows."""
    process = end.host.start(*PAIR)
    process.wait_for("waiting")
    return process, objects(process.output)[0]["code"]


def join(end: AgentHost, other: AgentHost, code: str) -> dict[str, Any]:
    done = end.host.run(*PAIR, f"{other.host.address}:{other.host.port}", code, check=False)
    (answer,) = objects(done.stdout)
    return {**answer, "status": done.returncode}


def test_wrong_codes_then_the_right_one_then_a_migration(pair: HostPair) -> None:
    inviting, code = shown_code(pair.a)
    number, *words = code.split("-")
    wrong = join(pair.b, pair.a, "-".join([str(int(number) % 99 + 1), *words]))
    assert (wrong["code"], wrong["status"]) == ("pairing.code", 3)
    with pair.b.client() as client:
        assert client.peers() == []
    joined = join(pair.b, pair.a, code)
    assert (joined["state"], joined["status"]) == ("paired", 0), joined
    inviting.wait_until(lambda: not inviting.is_running, "the end of `sealane pair`")
    invited = objects(inviting.output)[-1]
    assert invited["state"] == "paired"
    assert invited["words"] == joined["words"]
    assert invited["peer"]["fingerprint"] == pair.b.identity.fingerprint
    assert joined["peer"]["fingerprint"] == pair.a.identity.fingerprint
    # each can reach the other now
    guest = pair.add_guest(hardware=HARDWARE, workload=WORKLOAD)
    pair.start_guest(guest, pair.a)
    for source, destination in ((pair.a, pair.b), (pair.b, pair.a)):
        last = pair.migrate(guest, source, destination)
        assert last.state == "completed", last.problem
        guest.wait_ticks(1)
    assert guest.console.is_contiguous
    guest.machines[pair.a.name].stop()


def test_nobody_pairs_uninvited(pair: HostPair) -> None:
    answer = join(pair.a, pair.b, "7-orchid-tempo")
    assert (answer["code"], answer["status"]) == ("pairing.closed", 3)
