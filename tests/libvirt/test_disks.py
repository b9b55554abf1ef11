"""Which of a domain's disks libvirt would copy, and which of those Sealane lets it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import SealaneError
from sealane.libvirt.disks import TARGET_PATTERN, CopiedDisk, DiskFile, read_copied_disks
from tests.libvirt.rig import domain_xml

RAW = "<driver name='qemu' type='raw'/><source file='/images/a.raw'/><target dev='vda'/>"
LAYER = (
    "<driver name='qemu' type='qcow2'/><source file='/images/b.qcow2'/><backingStore type='file'><format type='raw'/>"
    "<source file='/images/base.raw'/></backingStore><target dev='vdb'/>"
)


def disk(inside: str, *, kind: str = "file", device: str = "disk") -> str:
    return f"<disk type='{kind}' device='{device}'>{inside}</disk>"


def test_what_is_copied_is_libvirts_own_rule() -> None:
    kept = (
        disk("<source file='/images/iso'/><target dev='sda'/><readonly/>", device="cdrom"),
        disk("<target dev='sdb'/>", device="cdrom"),
        disk(f"{RAW}<shareable/>"),
        disk("<source protocol='rbd' name='p/i'/><target dev='vdc'/><shareable/>", kind="network"),
    )
    xml = domain_xml(devices="".join(kept) + disk(RAW) + disk(LAYER))
    raw = CopiedDisk("vda", DiskFile("/images/a.raw", "raw"))
    layer = CopiedDisk("vdb", DiskFile("/images/b.qcow2", "qcow2"), DiskFile("/images/base.raw", "raw"))
    assert read_copied_disks(xml, "inc") == [raw, layer]
    assert read_copied_disks(xml, "none") == []
    assert read_copied_disks(domain_xml(devices="".join(kept) + disk(RAW)), "all") == [raw]


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (disk(LAYER), "vdb has a backing file"),
        (disk("<source dev='/dev/sda1'/><target dev='vda'/>", kind="block"), "not a plain file"),
        (disk("<source protocol='rbd' name='p/i'/><target dev='vda'/>", kind="network"), "not a plain file"),
        (disk(RAW.replace("/images/a.raw", "images/a.raw")), "not a plain file"),
        (disk(RAW.replace("/images/a.raw", "/images/../a.raw")), "not a plain file"),
        (disk(RAW.replace("/images/a.raw", "/images/a&#10;b")), "not a plain file"),
        (disk(RAW.replace("'raw'", "'vmdk'")), "the format vmdk"),
        (disk(RAW.replace("vda", "VDA/..")), "the disk VDA"),
        (disk(RAW, device="lun"), "is a lun"),
        (disk(RAW, device="floppy"), "is a floppy"),
        (disk(f"{RAW}<encryption format='luks'/>"), "encrypted"),
        (
            disk(RAW.replace("<source file='/images/a.raw'/>", "<source file='/images/a.raw'><encryption/></source>")),
            "encrypted",
        ),
    ],
)
def test_a_disk_that_sealane_does_not_let_libvirt_copy_is_refused(xml: str, words: str) -> None:
    with pytest.raises(SealaneError, match=words) as raised:
        read_copied_disks(domain_xml(devices=xml), "all")
    assert raised.value.code == "check.disks"


def test_a_backing_file_that_is_no_plain_file_is_refused() -> None:
    xml = LAYER.replace("<backingStore type='file'>", "<backingStore type='block'>")
    with pytest.raises(SealaneError, match="not a plain file"):
        read_copied_disks(domain_xml(devices=disk(xml)), "inc")


@given(st.text(max_size=100))
def test_any_text_is_disks_or_one_of_two_errors(text: str) -> None:
    for each in (text, domain_xml(devices=text), domain_xml(devices=disk(text))):
        try:
            found = read_copied_disks(each, "all")
        except SealaneError as error:
            assert error.code == "check.disks"  # noqa: PT017
        except ValueError as error:
            assert "does not parse" in str(error)  # noqa: PT017
        else:
            assert all(re.fullmatch(TARGET_PATTERN, one.target) for one in found)
