"""Two hosts with a TPM each are paired by a code and nothing else: each knows the other's hardware and software from then on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from sealane.host.config import AGENT_FILE
from sealane.testing.attested import AttestedHosts
from sealane.testing.hosts import SimulatedHost
from sealane.testing.pair import AgentHost
from sealane.testing.qemu import find_qemu
from tests.e2e.rig import Rig, make_rig

pytestmark = pytest.mark.e2e

QEMU = find_qemu()
PAIR = (sys.executable, "-m", "sealane.cli", "--json", "pair")


class Strangers(AttestedHosts):
    """Hosts with TPMs and without any file of reference values."""

    def settings(self, host: SimulatedHost) -> str:
        kept = [line for line in super().settings(host).splitlines() if not line.startswith("reference_values")]
        # 2: what files ran is not known without reference values for IMA
        return "\n".join(line.replace("least_level = 3", "least_level = 2") for line in kept) + "\n"

    def introduce(self, hosts: Sequence[SimulatedHost]) -> None:
        for host in hosts:
            self.values_of(host)  # which waits until it has measured itself


HOSTS = Strangers([QEMU.path.resolve()])


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with make_rig(qemu=QEMU, settings=HOSTS, strangers=True) as made:
        yield made


def pair(inviter: AgentHost, joiner: AgentHost) -> dict[str, Any]:
    inviting = inviter.host.start(*PAIR)
    inviting.wait_for("waiting")
    code = json.loads(inviting.output.splitlines()[0])["code"]
    done = joiner.host.run(*PAIR, f"{inviter.host.address}:{inviter.host.port}", code, check=False)
    inviting.wait_until(lambda: not inviting.is_running, "the end of `sealane pair`")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def restart(end: AgentHost) -> None:
    assert end.agent is not None
    end.agent.stop()
    end.start_agent()


def test_hosts_that_were_paired_know_each_other_s_hardware(rig: Rig) -> None:
    home, away = rig.home, rig.away
    assert pair(home, away)["state"] == "paired"
    for one, other in ((home, away), (away, home)):
        (known,) = json.loads((one.host.paths.state / "known-hosts.json").read_text())["paired"].values()
        assert known["hardware_keys"] == []  # a software TPM, which never counts as hardware
        with one.client() as client:
            (seen,) = client.hosts()
        assert seen.hardware == [f"ak:{HOSTS._tpms[other.name].key}"]

    attempt = rig.attempt()
    rig.assert_arrived(attempt)
    trust = attempt.source.peer_trust
    assert trust is not None
    assert (trust.level, trust.production_level) == (2, 1)
    assert trust.identities == [f"ak:{HOSTS._tpms[away.name].key}"]

    # the VM is at `away` now, which gets another attestation key: it is not the host that was paired any more
    changed = rig.home
    environment = {**os.environ, "TPM2TOOLS_TCTI": HOSTS.tcti(changed.host)}
    subprocess.run(["tpm2_evictcontrol", "-c", "0x81015ea1"], env=environment, check=True, capture_output=True)
    restart(changed)
    rig.note_descriptors()
    refused = rig.attempt()
    assert refused.code == "attest.hardware-changed", refused.source.problem
    rig.assert_goes_on()

    # nor is one that leaves its TPM out
    path = changed.host.paths.config / AGENT_FILE
    path.write_text(path.read_text().replace('drivers = ["tpm2"]', 'drivers = ["software"]'))
    restart(changed)
    rig.note_descriptors()
    refused = rig.attempt()
    assert refused.code == "attest.hardware-changed", refused.source.problem
    rig.assert_goes_on()
