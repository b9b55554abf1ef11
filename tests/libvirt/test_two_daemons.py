"""The two libvirtd that other tests drive: real, apart from each other, and gone afterwards."""

import pytest

from sealane.testing.libvirt import Libvirt, all_libvirts, libvirtd_works, make_libvirt_hosts

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not libvirtd_works(), reason="two libvirtd need root and Debian's libvirt-daemon-driver-qemu"),
]


@pytest.mark.parametrize("libvirt", all_libvirts() if libvirtd_works() else [], ids=lambda each: each.name)
def test_two_daemons_know_nothing_of_each_other_and_leave_nothing(libvirt: Libvirt) -> None:
    with make_libvirt_hosts(libvirt=libvirt) as (a, b):
        assert a.virsh("hostname").strip() == "host-a"
        assert b.virsh("hostname").strip() == "host-b"
        uuids = {end.virsh("capabilities").split("<uuid>")[1].split("<")[0] for end in (a, b)}
        assert len(uuids) == 2
        assert len(a.host.processes()) >= 2
    assert not a.host.processes()
    assert not b.host.processes()
