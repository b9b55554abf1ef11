"""What the paper's bench needs besides Sealane: a guest under stress-ng, and a tunnel of OpenSSH that QEMU goes through."""

import platform
from contextlib import ExitStack

import pytest

from sealane.bench.movers import PLAIN_PORT, move
from sealane.bench.paper_kvm import method_of
from sealane.bench.tunnel import SshTunnel
from sealane.testing import packages
from sealane.testing.guest.stress import READY, StressWorkload, stress_version
from sealane.testing.hosts import namespaces_work
from sealane.testing.machine import Hardware
from sealane.testing.pair import make_pair

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        packages.release()[0] != "debian" or platform.machine() != "x86_64", reason="stress-ng and OpenSSH are Debian's"
    ),
    pytest.mark.skipif(not namespaces_work(), reason="the benches' ports are fixed, and need a network of their own"),
]


def test_a_guest_under_load_goes_through_ssh() -> None:
    assert stress_version()[0].isdigit()
    with make_pair() as pair:
        workload = StressWorkload(load="write", load_mib=8, load_percent=30)
        guest = pair.add_guest(hardware=Hardware(memory_mib=128), workload=workload)
        pair.start_guest(guest, pair.a, warm=False)
        guest.machines[pair.a.name].wait_for(READY)
        with ExitStack() as stack:
            for machine in guest.machines.values():
                stack.callback(machine.stop)
            tunnel = stack.enter_context(SshTunnel(pair.a.host, pair.b.host, PLAIN_PORT))
            assert tunnel.version.startswith("OpenSSH_")
            assert "@" in tunnel.cipher or "-" in tunnel.cipher
            run = move(pair, guest, pair.a, pair.b, method_of("ssh", tunnel.uri))
            assert run.completed
            assert run.iterations > 1, "what the load wrote meanwhile was sent again"
            guest.wait_ticks(2)
            assert "LOAD ENDED" not in guest.console.text
