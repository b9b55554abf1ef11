"""A trusted peer that asks for what it is refused, over and over: it fills neither journal nor table, and its VM runs on."""

import re

import pytest

from sealane.host.models import VmDefinition
from sealane.testing.machine import Hardware, Workload
from tests.e2e.rig import make_rig

pytestmark = pytest.mark.e2e

LIMITS = "[limits]\nwishes_per_peer_per_minute = 4\nrefusals_per_peer_per_hour = 2\n"


def test_refused_wishes_fill_nothing() -> None:
    small = Hardware(memory_mib=128)
    with make_rig(settings=LIMITS, hardware=small, workload=Workload(fill_mib=16, tick_ms=250)) as rig:
        away = rig.away
        with away.client() as client:
            known = client.vm(rig.guest.name)
            client.remove_vm(known.name)
            client.add_vm(VmDefinition(name=known.name, qmp=known.qmp))
        codes: list[str | None] = []
        while "peer.rate" not in codes and len(codes) < 30:  # a slow machine may ask more slowly than it is allowed
            last = rig.follow(rig.begin(), None, "", 0)
            assert (last.state, last.runs_at) == ("aborted", "source"), last
            codes.append(last.problem.code if last.problem else None)
        refused = codes.count("check.no-launch")
        assert refused >= 4
        assert codes == ["check.no-launch"] * refused + ["peer.rate"]
        with away.client() as client:
            assert len(client.migrations()) == 2
            metrics = client.metrics()
        told = dict(re.findall(r'^sealane_refused_wishes_total\{code="([a-z.-]+)"\} ([0-9.]+)$', metrics, re.MULTILINE))
        assert told == {"check.no-launch": f"{refused}.0", "peer.rate": "1.0"}
        assert f"sealane_refused_wishes_unjournalled_total {refused - 1}.0" in metrics
        receipts = sorted((away.host.paths.state / "receipts").glob("*.dsse"))
        assert len(receipts) == 2
        rig.assert_goes_on()
