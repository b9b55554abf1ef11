"""A domain of a user's own libvirtd (qemu:///session), moved by agents that are that user's and have none of root's powers."""

import pytest

from sealane.testing.libvirt import DomainSpec, Libvirt, all_libvirts, libvirtd_works, make_libvirt_pair
from sealane.testing.machine import Hardware, Workload
from tests.e2e.domains import DomainRig

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not libvirtd_works(), reason="two libvirtd need root and Debian's libvirt-daemon-driver-qemu"),
]

SPEC = DomainSpec(name="mine", hardware=Hardware(memory_mib=96), workload=Workload(fill_mib=8))
SETTINGS = 'libvirt = ["qemu:///session"]\n'


@pytest.mark.parametrize("libvirt", all_libvirts() if libvirtd_works() else [], ids=lambda each: each.name)
def test_a_domain_of_a_session_moves(libvirt: Libvirt) -> None:
    with make_libvirt_pair(SETTINGS, libvirt=libvirt, is_session=True) as hosts:
        assert hosts.libvirts[0].host.run("id", "-u").stdout.strip() == "1000"
        hosts.start_domain(SPEC, hosts.libvirts[0])
        rig = DomainRig(hosts, hosts.pair.a, hosts.pair.b, SPEC)
        moved = rig.migrate(multifd_channels=2)
        assert moved.state == "completed", moved
        rig.assert_here()
        rig.assert_tidy()
        with rig.home.client() as client:
            (vm,) = client.vms()
        assert vm.qmp.endswith(":qemu:///session")
