"""A domain's XML as a VM: sizes, labels, and metadata that does not fit."""

import uuid
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import PeerError
from sealane.libvirt.domains import (
    LEVEL_MAX,
    METADATA_NAMESPACE,
    DomainAddress,
    address_of,
    is_domain,
    parse_address,
    read_domain,
)
from tests.libvirt.rig import DOMAIN, domain_xml

URI: Final = "qemu:///system"


def with_metadata(inner: str, attributes: str = "") -> str:
    return domain_xml(more=f"<metadata><s:vm xmlns:s='{METADATA_NAMESPACE}' {attributes}>{inner}</s:vm></metadata>")


def test_a_domain_is_read() -> None:
    facts = read_domain(domain_xml(more="<vcpu>4</vcpu><os><type machine='pc-q35-7.2'>hvm</type></os>"), URI)
    assert (facts.name, facts.address) == (DOMAIN.name, DomainAddress(DOMAIN.uuid, URI))
    assert (facts.memory_bytes, facts.cpus, facts.machine_type, facts.is_tcg) == (256 << 20, 4, "pc-q35-7.2", False)
    assert (facts.least_level, facts.labels, facts.is_understood) == (0, {}, True)


def test_labels_and_level_come_from_the_metadata() -> None:
    facts = read_domain(with_metadata("<s:label name='tier' value='web'/>", "least-level='2'"), URI)
    assert (facts.least_level, facts.labels, facts.is_understood) == (2, {"tier": "web"}, True)


@pytest.mark.parametrize(
    ("inner", "attributes"),
    [
        ("", "least-level='9'"),
        ("", "least-level='-1'"),
        ("", "least-level='high'"),
        ("", "level='2'"),
        ("<s:label name='tier'/>", ""),
        ("<s:label name='a b' value='c'/>", ""),
        ("<s:label name='a' value='c d'/>", ""),
        ("<s:label name='a' value='b' more='c'/>", ""),
        ("<s:label name='a' value='b'/>" * 2, ""),
        ("<s:other name='a' value='b'/>", ""),
        ("".join(f"<s:label name='a{i}' value='b'/>" for i in range(33)), ""),
    ],
)
def test_metadata_that_does_not_fit_asks_for_the_highest_level(inner: str, attributes: str) -> None:
    facts = read_domain(with_metadata(inner, attributes), URI)
    assert (facts.least_level, facts.labels, facts.is_understood) == (LEVEL_MAX, {}, False)


def test_two_elements_or_another_one_ask_for_the_highest_level() -> None:
    one = f"<s:vm xmlns:s='{METADATA_NAMESPACE}'/>"
    for inner in (one + one, one.replace("s:vm", "s:host")):
        facts = read_domain(domain_xml(more=f"<metadata>{inner}</metadata>"), URI)
        assert (facts.least_level, facts.is_understood) == (LEVEL_MAX, False)


def test_addresses_are_read_back() -> None:
    address = DomainAddress(DOMAIN.uuid, URI)
    assert parse_address(str(address)) == address
    assert is_domain(str(address))
    assert not is_domain("/run/web.qmp")
    assert address_of(str(DOMAIN.uuid), URI) == str(address)


@pytest.mark.parametrize("text", ["libvirt:x:qemu:///system", f"libvirt:{uuid.UUID(int=1)}:lxc:///", "/run/x", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_address(text)


def test_a_peers_uuid_that_is_none_is_its_fault() -> None:
    with pytest.raises(PeerError):
        address_of("../..", URI)


@given(st.text(max_size=100))
def test_any_text_is_no_domain(text: str) -> None:
    with pytest.raises(ValueError):
        read_domain(text, URI)
