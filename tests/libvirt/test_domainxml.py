"""What a peer's XML may have this host's libvirtd do."""

import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import PeerError
from sealane.libvirt.domainxml import DEPTH_MAX, QEMU_NAMESPACE, check_xml
from tests.libvirt.rig import COOKIE, DOMAIN, domain_xml


@pytest.mark.parametrize(
    ("xml", "root"),
    [
        (domain_xml(), "domain"),
        (domain_xml(devices="<interface type='bridge'><source bridge='br0'/></interface>"), "domain"),
        (f"<qemu-migration><persistent/>{domain_xml()}</qemu-migration>", "qemu-migration"),
        (domain_xml(more="<metadata><l:vm xmlns:l='urn:x'><l:name>other</l:name></l:vm></metadata>"), "domain"),
    ],
)
def test_the_domains_own_xml_passes_and_no_other_domain_s(xml: str, root: str) -> None:
    check_xml(xml, DOMAIN, root=root)  # raises nothing
    for other in (replace(DOMAIN, name="other"), replace(DOMAIN, uuid=uuid.UUID(int=1))):
        with pytest.raises(PeerError, match="another domain"):
            check_xml(xml, other, root=root)


def test_a_cookie_passes_and_is_not_taken_for_a_domain() -> None:
    check_xml(COOKIE, DOMAIN, root="qemu-migration")  # raises nothing
    with pytest.raises(PeerError):
        check_xml(COOKIE, DOMAIN)


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (domain_xml("other"), "another domain"),
        (domain_xml(identity=uuid.UUID(int=1)), "another domain"),
        (domain_xml(more=f"<name>{DOMAIN.name}</name>"), "two <name>"),
        ("<domain><name>web</name></domain>", "without a name or a UUID"),
        ("<domain><name>web</name><uuid>1</uuid></domain>", "a UUID that is none"),
        (f"<domain><name>w<b/>eb</name><uuid>{DOMAIN.uuid}</uuid></domain>", "an element inside <name>"),
        (domain_xml(emulator="/tmp/evil"), "the program /tmp/evil"),
        (domain_xml(emulator="/usr/bin/../../tmp/evil"), "the program"),
        (domain_xml(emulator="/usr/bin/.."), "the program"),
        (domain_xml(emulator="qemu"), "the program qemu"),
        (domain_xml(devices="<filesystem><binary path='/tmp/evil'/></filesystem>"), "the program /tmp/evil"),
        (domain_xml(devices="<interface type='ethernet'><script path='/tmp/evil'/></interface>"), "a script"),
        (domain_xml(more=f"<q:commandline xmlns:q='{QEMU_NAMESPACE}'/>"), "qemu:commandline"),
        ("<!DOCTYPE domain [<!ENTITY e 'web'>]>" + domain_xml("&e;"), "a document type"),
        (domain_xml() + domain_xml(), "does not parse"),
        (domain_xml(more=domain_xml()), "2 domains"),
        ("<pool/>", "in place of <domain>"),
        (domain_xml(more="<a>" * DEPTH_MAX + "</a>" * DEPTH_MAX), "too deep"),
        (domain_xml("x" * 5000), "too long"),
        ("<?xml version='1.0' encoding='UTF-7'?>" + domain_xml(), "another encoding"),
        ("", "does not parse"),
        ("\ud800", "does not parse"),
    ],
)
def test_what_a_peer_may_not_have_is_refused(xml: str, words: str) -> None:
    with pytest.raises(PeerError, match=words) as raised:
        check_xml(xml, DOMAIN)
    assert raised.value.code == "libvirt.refused"


@given(st.text(max_size=200))
def test_any_text_is_refused_or_fits(text: str) -> None:
    with pytest.raises(PeerError):
        check_xml(text, DOMAIN)
    with pytest.raises(PeerError):
        check_xml(domain_xml(text + "x"), DOMAIN)
