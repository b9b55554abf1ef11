"""Three hosts and a CA: two that never paired move a VM, a revoked one is refused, and the VM runs on."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from sealane.crypto.identity import create_identity, save_identity
from sealane.host.config import AGENT_FILE
from sealane.testing.hosts import make_hosts
from sealane.testing.pair import AgentHost, HostPair
from tests.e2e.rig import HARDWARE, WORKLOAD

pytestmark = pytest.mark.e2e

SEALANE = (sys.executable, "-m", "sealane.cli", "--json")
# The CA's host is told by the tests when there is something to hear.
SETTINGS = "[authority]\nnews_every_s = 86400\n"


@pytest.fixture(scope="module")
def fleet() -> Iterator[list[AgentHost]]:
    with ExitStack() as stack:
        ends = []
        for host in stack.enter_context(make_hosts(["ca-host", "host-b", "host-c"])):
            identity = create_identity(host.name, now=datetime.now(UTC))
            save_identity(host.paths, identity)
            (host.paths.config / AGENT_FILE).write_text(SETTINGS)
            end = AgentHost(host, identity)
            end.start_agent()
            ends.append(end)
        yield ends
        for end in ends:
            assert end.agent is not None
            assert "Traceback" not in end.agent.output, end.agent.output[-4000:]


def told(end: AgentHost, *words: str) -> list[dict[str, Any]]:
    done = end.host.run(*SEALANE, "ca", *words, check=False)
    return [{**json.loads(line), "status": done.returncode} for line in done.stdout.splitlines()]


def join(end: AgentHost, office: AgentHost) -> dict[str, Any]:
    inviting = office.host.start(*SEALANE, "ca", "invite")
    inviting.wait_for("waiting")
    code = json.loads(inviting.output.splitlines()[0])["code"]
    joined = told(end, "join", f"{office.host.address}:{office.host.port}", code)[0]
    inviting.wait_until(lambda: not inviting.is_running, "the end of `sealane ca invite`")
    last = json.loads(inviting.output.splitlines()[-1])
    assert (last["state"], last["words"]) == ("paired", joined.get("words")), (last, joined)
    return joined


def test_two_that_never_paired_move_a_vm_and_a_revoked_one_is_refused(fleet: list[AgentHost]) -> None:
    office, b, c = fleet
    assert told(b, "status")[0]["code"] == "ca.none"
    assert told(office, "init", "--name", "fleet")[0]["encrypted"] is False
    assert told(office, "init")[0]["code"] == "ca.exists"
    for end in (b, c):
        assert join(end, office)["peer"]["name"] == "ca-host"
    assert {(one["name"], one["state"], one["level"]) for one in told(office, "list")} == {
        ("host-b", "approved", 1),
        ("host-c", "approved", 1),
    }
    assert told(b, "renew")[0]["hosts"] == ["host-c"]  # which joined after it
    with b.client() as client:
        assert client.peers() == []
        assert [(one.name, one.port) for one in client.hosts()] == [("host-c", c.host.port)]

    pair = HostPair(b, c)
    guest = pair.add_guest(hardware=HARDWARE, workload=WORKLOAD)
    pair.start_guest(guest, b)
    last = pair.migrate(guest, b, c)
    assert last.state == "completed", last.problem
    assert last.peer_trust is not None
    assert last.peer_trust.vouched_by == "fleet"
    arrived = pair.await_end(c, last.id)
    assert arrived.peer == "host-b"
    guest.wait_ticks(1)

    # host-c is revoked while the VM is there; host-b hears of it, and takes nothing from it
    assert told(office, "revoke", "host-c")[0]["certificates"] == 1
    assert told(b, "renew")[0]["revoked"] == 1
    refused = pair.migrate(guest, c, b)
    assert (refused.state, refused.runs_at) == ("aborted", "source")
    assert refused.problem is not None
    assert refused.problem.code == "ca.revoked", refused.problem
    assert told(c, "renew")[0]["code"] == "ca.revoked"
    guest.wait_ticks(2)
    assert guest.console.is_contiguous

    # and nobody sends it anything either: it is no more among the fleet's hosts
    with b.client() as client:
        assert client.hosts() == []

    # approved again, it gets a new certificate, and the VM may go home
    assert told(office, "approve", "host-c")[0]["approved"] == "host-c"
    assert told(c, "renew")[0]["status"] == 0
    home = pair.migrate(guest, c, b)
    assert home.state == "completed", home.problem
    guest.machines[b.name].stop()
