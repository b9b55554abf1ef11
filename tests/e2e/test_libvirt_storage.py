"""What a domain has beside its memory: disks that are copied with it, and a TPM; both through the lanes of two real agents."""

import random
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from sealane.host.models import Migration
from sealane.session.preface import PREFACE_BYTES, ConnectionKind, parse_preface
from sealane.testing.console import ConsoleLog
from sealane.testing.libvirt import DomainSpec, LibvirtHost, all_libvirts, libvirtd_works, make_libvirt_pair
from sealane.testing.machine import Hardware, Workload
from sealane.testing.plainlibvirt import migrate_plainly
from sealane.testing.wiretap import Direction, Recorder
from tests.e2e.domains import MIB, SLOWLY, DomainRig

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not libvirtd_works(), reason="two libvirtd need root and Debian's libvirt-daemon-driver-qemu"),
]

SECRET: Final = "a word that only this TPM knows"
SPEC: Final = DomainSpec(
    name="store",
    hardware=Hardware(memory_mib=128),
    workload=Workload(fill_mib=2, tpm_secret=SECRET),
    devices="<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>"
    + "<controller type='pci' index='0' model='pcie-root'/>"
    + "<controller type='pci' model='pcie-root-port'/>" * 4,
)
IMAGES: Final = "/var/lib/libvirt/images"
PLANTED: Final = b"written to a disk, for nobody on the way to read"
STEADILY: Final[dict[str, Any]] = {"max_bandwidth_bytes_per_s": 16 * MIB}
_USE = re.compile(r"tpm (\d+) ek=(\w+) key=(\w+) counter=(\d+) secret=(\w+)")


class StoreRig(DomainRig):
    """The domain with its TPM, and the images of its disks."""

    def image(self, name: str, *, at: LibvirtHost) -> Path:
        return at.outside(f"{IMAGES}/{name}")

    @property
    def here(self) -> LibvirtHost:
        return self.libvirt(self.home)

    @property
    def there(self) -> LibvirtHost:
        return self.libvirt(self.away)

    def uses(self) -> list[tuple[str, ...]]:
        """What the guest said of its TPM, on both hosts."""
        texts = [ConsoleLog(SPEC.console(each)).text for each in self.hosts.libvirts]
        assert not [line for text in texts for line in text.split("\n") if "TPM FAILED" in line]
        return [use for text in texts for use in _USE.findall(text)]

    def tpm_state(self, at: LibvirtHost) -> bytes:
        """libvirt's file of the TPM's lasting state."""
        (file,) = at.outside("/var/lib/libvirt/swtpm").rglob("tpm2-00.permall")
        return file.read_bytes()

    def attach(self, target: str, name: str, kind: str) -> None:
        self.here.virsh(
            "attach-disk", SPEC.name, f"{IMAGES}/{name}", target, "--subdriver", kind, "--targetbus", "virtio"
        )

    def write(self, target: str, pattern: int, offset: int) -> None:
        """QEMU writes 64 KiB to a disk, as it does for its guest."""
        device = f"/machine/peripheral/virtio-disk{'abc'.index(target[-1])}/virtio-backend"
        words = f'qemu-io -d {device} "write -P {pattern} {offset} 64k"'
        said = self.here.virsh("qemu-monitor-command", SPEC.name, "--hmp", words)
        assert not said.strip()


@dataclass
class FlipOnLane:
    """A tamper: inverts a bit of what the source sends on one lane."""

    lane: int
    offset: int
    connection: int | None = None

    def __call__(self, connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        if direction == "forward" and offset == 0:
            preface = parse_preface(data[:PREFACE_BYTES])
            if (preface.kind, preface.lane) == (ConnectionKind.LANE, self.lane):
                self.connection = connection
        at = self.offset - offset
        if direction != "forward" or connection != self.connection or not 0 <= at < len(data):
            return data
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture(scope="module")
def moving() -> Iterator[StoreRig]:
    """With the oldest libvirt that is here; `test_libvirt.py` takes the latest."""
    with make_libvirt_pair(libvirt=all_libvirts()[0]) as hosts:
        for each in hosts.libvirts:
            each.outside(IMAGES).mkdir()
        hosts.start_domain(SPEC, hosts.libvirts[0])
        yield StoreRig(hosts, hosts.pair.a, hosts.pair.b, SPEC)


@pytest.fixture(autouse=True)
def _show(moving: StoreRig) -> Iterator[None]:
    yield
    for end in (moving.home, moving.away):
        if end.agent:
            print(f"--- {end.name}\n{end.agent.output[-3000:]}")


def marks_of(state: bytes) -> list[bytes]:
    """A few pieces of a TPM's state that nothing else looks like: seeds and keys."""
    pieces = (state[at : at + 32] for at in range(0, len(state) - 32, 32))
    return [each for each in pieces if len(set(each)) > 24][::4][:16]


def test_a_tpm_crosses_in_clear_with_plain_libvirt_and_sealed_with_sealane(moving: StoreRig, tmp_path: Path) -> None:
    """libvirt starts swtpm at both ends, shares no storage, and has QEMU carry the TPM's state."""
    seen = tmp_path / "plain"
    moving.spec.wait_ticks(moving.here, 5)

    def keep(data: bytes) -> bytes:
        with seen.open("ab") as file:
            file.write(data)
        return data

    problem, _ = migrate_plainly(moving.here, moving.there, SPEC.name, memory=keep)
    assert problem is None
    moving.home, moving.away = moving.away, moving.home
    moving.assert_here()
    plain = seen.read_bytes()
    marks = [each for each in marks_of(moving.tpm_state(moving.here)) if each in plain]
    assert marks  # so this is how one finds it
    wire = Recorder(tmp_path / "wire")
    moved = moving.migrate(wire, multifd_channels=0)
    assert moved.state == "completed", moved
    moving.assert_here()
    kept = [each for each in marks if each in moving.tpm_state(moving.here)]
    assert kept
    assert not any(wire.contains(each) for each in (*kept, SECRET.encode()))
    uses = moving.uses()
    assert len({(ek, key) for _, ek, key, _, _ in uses}) == 1
    assert {secret for *_, secret in uses} == {"right"}
    assert not list(moving.there.outside("/var/lib/libvirt/swtpm").rglob("tpm2-00.permall"))


def test_disks_are_copied_through_lanes_of_their_own(moving: StoreRig, tmp_path: Path) -> None:
    content = bytearray(random.Random(1).randbytes(12 * MIB))
    content[4 * MIB : 4 * MIB + len(PLANTED)] = PLANTED
    moving.image("a.raw", at=moving.here).write_bytes(content)
    moving.attach("vda", "a.raw", "raw")
    wire = Recorder(tmp_path / "wire")
    totals: list[int] = []

    def watch(migration: Migration) -> None:
        moving.write("vda", 0x5A, 8 * MIB)  # while it is copied
        totals.append(migration.progress.disk_bytes_total)

    moved = moving.migrate(wire, during_disks=watch, multifd_channels=2, copy_storage="all", **STEADILY)
    assert moved.state == "completed", moved
    moving.assert_here()
    moving.assert_tidy()
    content[8 * MIB : 8 * MIB + 64 * 1024] = b"\x5a" * 64 * 1024
    assert moving.image("a.raw", at=moving.here).read_bytes() == content
    assert totals == [len(content)]
    assert (moved.progress.disk_bytes_total >= len(content), moved.progress.disk_bytes_remaining) == (True, 0)
    assert moved.progress.bytes_wire > len(content)
    assert not wire.contains(PLANTED)
    moving.write("vda", 0x33, 0)  # the guest's disk is the copy
    assert moving.image("a.raw", at=moving.here).read_bytes()[:1] == b"\x33"


def test_a_file_that_is_there_is_not_written_over(moving: StoreRig) -> None:
    left = moving.image("a.raw", at=moving.there)
    before = left.read_bytes()
    refused = moving.migrate(copy_storage="all")
    moving.assert_aborted(refused, "check.volume")
    assert refused.progress.bytes_wire == 0
    assert left.read_bytes() == before
    left.unlink()


def test_a_flipped_bit_of_a_disk_ends_it_and_leaves_no_file(moving: StoreRig) -> None:
    flipped = moving.migrate(FlipOnLane(lane=2, offset=6 * MIB), multifd_channels=0, copy_storage="all")
    moving.assert_aborted(flipped, "lane.integrity")
    assert not list(moving.image("", at=moving.there).iterdir())
    moving.write("vda", 0x44, 0)


def test_a_destination_that_dies_removes_its_files_when_it_is_back(moving: StoreRig) -> None:
    def kill(migration: Migration) -> None:
        assert moving.image("a.raw", at=moving.there).exists()
        assert moving.away.agent is not None
        moving.away.agent.stop(signal.SIGKILL)

    aborted = moving.migrate(during_disks=kill, multifd_channels=0, copy_storage="all", **SLOWLY)
    assert (aborted.state, aborted.runs_at) == ("aborted", "source"), aborted
    moving.away.start_agent()
    assert moving.away.agent is not None
    moving.away.agent.wait_for("roots of trust", timeout_s=60)  # before that it cannot show a peer what it is
    with moving.away.client() as client:
        last = moving.hosts.pair.await_end(moving.away, client.migrations()[0].id)
    assert (last.state, last.runs_at) == ("aborted", "source"), last
    moving.assert_here()
    assert not list(moving.image("", at=moving.there).iterdir())


def test_a_layer_is_copied_onto_a_backing_file_that_is_there(moving: StoreRig) -> None:
    base = random.Random(2).randbytes(2 * MIB)
    for each in moving.hosts.libvirts:
        moving.image("base.raw", at=each).write_bytes(base)
    make = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"{IMAGES}/base.raw", f"{IMAGES}/b.qcow2")
    moving.home.host.run(*make)
    moving.attach("vdb", "b.qcow2", "qcow2")
    moving.write("vdb", 0x77, MIB)
    refused = moving.migrate(copy_storage="all")
    moving.assert_aborted(refused, "check.disks")
    moved = moving.migrate(multifd_channels=0, copy_storage="inc")
    assert moved.state == "completed", moved
    moving.assert_here()
    layer = moving.image("b.qcow2", at=moving.here)
    assert layer.stat().st_size < MIB  # the backing file is not in it
    facts = moving.home.host.run("qemu-img", "info", "-U", f"{IMAGES}/b.qcow2").stdout
    assert f"{IMAGES}/base.raw" in facts
    moving.home.host.run("qemu-io", "-r", "-U", "-c", "read -P 0x77 1M 64k", f"{IMAGES}/b.qcow2")
    assert moving.image("base.raw", at=moving.here).read_bytes() == base


def test_nothing_is_left_open_or_running(moving: StoreRig) -> None:
    """The TPM was always good, and no image has a lock of a QEMU that is gone."""
    moving.assert_here()
    moving.assert_tidy()
    uses = moving.uses()
    assert {secret for *_, secret in uses} == {"right"}
    subprocess.run(["qemu-img", "info", str(moving.image("a.raw", at=moving.there))], check=True, capture_output=True)
