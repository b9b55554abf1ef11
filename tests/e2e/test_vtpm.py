"""A VM's own TPM: real swtpm, real QEMU, hosts with a software TPM each, and a guest that uses its TPM all the time."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sealane.host.models import Migration, MigrationRequest
from sealane.testing.attested import AttestedHosts
from sealane.testing.machine import Hardware, Workload, migrate_plainly
from sealane.testing.pair import AgentHost, make_pair
from sealane.testing.problems import RigError
from sealane.testing.qemu import find_qemu
from sealane.testing.wiretap import Wiretap
from sealane.vtpm.swtpm import STATE_FILE, manufacture
from tests.e2e.tpmguest import TpmGuest

pytestmark = pytest.mark.e2e

HARDWARE = Hardware(memory_mib=128)
PLANTED = "planted where nobody should find it"
SECRET = "a word that only this TPM knows"


@pytest.fixture(scope="module")
def vm() -> Iterator[TpmGuest]:
    with make_pair(settings=AttestedHosts([find_qemu().path.resolve()])) as pair:
        workload = Workload(fill_mib=2, tpm_secret=SECRET)
        made = TpmGuest(pair, pair.add_guest(vtpm=True, workload=workload, hardware=HARDWARE))
        made.start()
        yield made
        made.assert_whole()


def test_it_goes_and_comes_back_with_all_that_was_in_it(vm: TpmGuest) -> None:
    for _ in range(2):
        before = vm.view(vm.home)
        assert "sealed in the host's TPM" in before.key
        moved = vm.pair.migrate(vm.guest, vm.home, vm.away)
        assert (moved.state, moved.problem) == ("completed", None)
        arrived = vm.pair.await_end(vm.away, moved.id)
        vm.assert_whole()
        left, here = vm.view(vm.home), vm.view(vm.away)
        assert (left.status, left.running) == ("gone", False)
        assert (here.status, here.in_use, here.migrating) == ("here", True, False)
        assert before.facts
        assert here.facts
        assert arrived.vtpm
        assert here.facts.ek_sha256 == before.facts.ek_sha256 != ""
        assert here.facts.version >= arrived.vtpm.version > before.facts.version
        assert here.epoch == before.epoch + 1
        assert receipt(vm.away, arrived)["vtpm"] == arrived.vtpm.model_dump()
        assert receipt(vm.home, moved)["vtpm"]["ek_sha256"] == before.facts.ek_sha256
        # nothing usable stays at the source: no key, no state
        assert {path.suffix for path in vm.files(vm.home)} == {".json", ".lock"}
        assert vm.refusal(vm.home, "start") == vm.refusal(vm.home, "verify") == "vtpm.gone"
        vm.exchange()


def receipt(end: AgentHost, migration: Migration) -> dict[str, Any]:
    number = migration.receipt or vm_receipt(end, migration.id)
    words = ("--json", "receipts", "show", str(number))
    done = end.host.run(sys.executable, "-m", "sealane.cli", *words)
    predicate: dict[str, Any] = json.loads(done.stdout.splitlines()[0])["statement"]["predicate"]
    return predicate


def vm_receipt(end: AgentHost, migration: str) -> int | None:
    with end.client() as client:
        return client.migration(migration).receipt


def test_a_migration_that_is_cancelled_leaves_it_as_it_was(vm: TpmGuest) -> None:
    before = vm.view(vm.home)
    with vm.home.client() as client:
        request = MigrationRequest(vm=vm.guest.name, host=vm.away.name, max_bandwidth_bytes_per_s=1 << 22)
        last = client.start_migration(request)
        for event in client.events(last.id):
            last = event.migration
            if last.state == "copying" and last.progress.bytes_wire:
                assert vm.view(vm.away).status == "incoming"
                assert vm.view(vm.home).migrating
                break
        client.cancel(last.id)
    assert vm.pair.await_end(vm.home, last.id).state == "aborted"
    vm.pair.await_end(vm.away, last.id)
    vm.assert_whole()
    after, away = vm.view(vm.home), vm.view(vm.away)
    assert (after.status, after.in_use, after.migrating, after.epoch) == ("here", True, False, before.epoch)
    assert (away.status, away.running) == ("gone", False)
    assert {path.suffix for path in vm.files(vm.away)} == {".json", ".lock"}


def test_a_destination_without_permission_for_this_vm_hears_nothing_of_it(vm: TpmGuest) -> None:
    """Its policy, or ours, says no before a TPM is prepared; one that keeps no TPM for the VM is refused as well."""
    policies = vm.away.host.paths.config / "policy"
    policies.mkdir()
    (policies / "a.cedar").write_text("forbid (principal, action, resource) when { true };\n")
    try:
        refused = vm.pair.migrate(vm.guest, vm.home, vm.away)
    finally:
        (policies / "a.cedar").unlink()
        policies.rmdir()
    assert refused.problem
    assert refused.problem.code == "policy.denied"
    vm.redefine(vm.away, vtpm=None)
    refused = vm.pair.migrate(vm.guest, vm.home, vm.away)
    vm.redefine(vm.away, vtpm=str(vm.away.host.scratch / "vtpm"))
    assert refused.problem
    assert refused.problem.code == "check.vtpm"
    vm.assert_whole()


def test_a_rotation_changes_the_key_under_a_running_vm(vm: TpmGuest) -> None:
    before = vm.view(vm.home)
    files = {path.parent for path in vm.files(vm.home) if path.suffix == ".permall"}
    with vm.home.client() as client:
        client.change_vtpm(vm.guest.name, "verify")
        after = client.change_vtpm(vm.guest.name, "rotate")
        client.change_vtpm(vm.guest.name, "verify")
    vm.assert_whole()
    assert before.facts
    assert after.facts
    assert after.facts.counter == before.facts.counter + 1
    assert len(files) == 1
    assert not files & {path.parent for path in vm.files(vm.home)}
    assert after.in_use


def test_qemu_by_hand_cannot_write_its_state_anywhere(vm: TpmGuest, tmp_path: Path) -> None:
    with vm.guest.machines[vm.home.name].observe() as monitor:
        monitor.allow_migration()
        without = ("multifd", "pause-before-switchover", "return-path")
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": n, "state": False} for n in without])
        monitor.execute("migrate", uri=f"exec:cat > {tmp_path / 'stream'}")
        with pytest.raises(RigError):
            monitor.wait_migrated()
        monitor.execute("cont")
    vm.assert_whole()


def test_secrets_are_found_in_what_is_unprotected_and_not_in_what_is_protected(vm: TpmGuest) -> None:
    """The seed's demonstration: a planted secret, and the endorsement key's private prime, in image and capture."""
    pair = vm.pair
    guest = pair.add_guest("bare", vtpm=True, workload=Workload(fill_mib=2, tpm_secret=PLANTED), hardware=HARDWARE)
    bare = TpmGuest(pair, guest)
    image, plain_wire = run_unprotected(bare)
    prime = find_private_prime(image, endorsement_modulus(image))
    for place in ([image], plain_wire.streams):
        assert any(PLANTED.encode() in each for each in place)
        assert any(prime in each for each in place)

    # the same TPM, taken over by Sealane
    storage = pair.a.host.scratch / "vtpm-bare"
    for end in (pair.a, pair.b):
        bare.redefine(end, vtpm=str(end.host.scratch / "vtpm-bare"))
    storage.mkdir()
    (storage / STATE_FILE).write_bytes(image)
    with pair.a.client() as client:
        client.start_vtpm("bare", adopt=True)
    pair.start_guest(guest, pair.a, warm=False)
    bare.wait_uses(2)
    wire = Recorder()
    with Wiretap((pair.b.host.address, pair.b.host.port), tampers=[wire], host=pair.a.host) as tap:
        pair.a.trust(pair.b, address=tap.address[0], port=tap.address[1])
        moved = pair.migrate(guest, pair.a, pair.b)
        pair.a.trust(pair.b)
    assert moved.state == "completed"
    assert moved.result
    assert wire.size >= moved.result.bytes_wire  # all of it was looked through
    bare.assert_whole()
    kept = [path for end in (pair.a, pair.b) for path in (end.host.scratch / "vtpm-bare").rglob("*") if path.is_file()]
    assert any(path.name == STATE_FILE for path in kept)
    for content in (*(path.read_bytes() for path in kept), *wire.streams):
        assert PLANTED.encode() not in content
        assert prime not in content
    guest.machines[pair.b.name].stop()


class Recorder:
    """A wiretap's tamper that changes nothing and keeps everything: each connection's bytes, in each direction, in order."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], bytearray] = {}

    def __call__(self, connection: int, direction: str, offset: int, data: bytes, /) -> bytes:
        self._kept.setdefault((connection, direction), bytearray()).extend(data)
        return data

    @property
    def streams(self) -> list[bytes]:
        return [bytes(each) for each in self._kept.values()]

    @property
    def size(self) -> int:
        return sum(map(len, self.streams))


def run_unprotected(bare: TpmGuest) -> tuple[bytes, Recorder]:
    """The guest with swtpms as their manual has them, moved by QEMU alone: the image and the capture of its migration."""
    a, b = bare.pair.a, bare.pair.b
    for end in (a, b):
        directory = end.host.scratch / "plain"
        directory.mkdir()
        if end is a:
            (directory / STATE_FILE).write_bytes(manufacture(directory))
        control = end.host.paths.run / "vtpm" / "bare.sock"
        control.unlink(missing_ok=True)
        swtpm = end.host.start(
            "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={directory}", "--ctrl", f"type=unixio,path={control}"
        )
        swtpm.wait_until(control.exists, "its control channel")
    source, destination = (bare.guest.machines[end.name] for end in (a, b))
    bare.pair.start_guest(bare.guest, a, warm=False)
    bare.wait_uses(2)
    destination.start_incoming(f"tcp:{b.host.address}:4444")
    wire = Recorder()
    with Wiretap((b.host.address, 4444), tampers=[wire], host=a.host) as tap:
        migrate_plainly(source, destination, f"tcp:{tap.address[0]}:{tap.address[1]}")
        destination.wait_ticks(1)  # the source ends its part with bytes still on their way
    for machine in (source, destination):
        machine.stop()
    for end in (a, b):
        (end.host.paths.run / "vtpm" / "bare.sock").unlink(missing_ok=True)
    return (a.host.scratch / "plain" / STATE_FILE).read_bytes(), wire


def endorsement_modulus(image: bytes) -> int:
    """The RSA endorsement key's modulus: in its public area in the image, after the exponent 0 (TPM 2.0, part 2, 12.2.3)."""
    at = image.index(
        bytes.fromhex("00060080004300100800000000000100")
    )  # AES-128-CFB, null scheme, 2048 bits, exponent 0
    return int.from_bytes(image[at + 16 : at + 16 + 256], "big")


def find_private_prime(image: bytes, modulus: int) -> bytes:
    """The 128 bytes of the image that divide the modulus: the endorsement key's secret."""
    for at in range(len(image) - 128):
        candidate = int.from_bytes(image[at : at + 128], "big")
        if 1 < candidate < modulus and modulus % candidate == 0:
            return image[at : at + 128]
    raise AssertionError("the endorsement key's private part is not in the image")
