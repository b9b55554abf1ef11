"""Real guests: they boot, count, notice bad memory, keep their secret out of the command line, and survive migration."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealane.testing import accel as accel_module
from sealane.testing.accel import choose_accel
from sealane.testing.console import ConsoleLog
from sealane.testing.guest.build import guest_initrd
from sealane.testing.machine import GuestMachine, Hardware, Workload, migrate_plainly
from sealane.testing.problems import RigError
from sealane.testing.qemu import QemuBinary, all_qemus, find_qemu

pytestmark = pytest.mark.e2e
CANARY = "a canary that only the worker's pages hold"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Short, for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(params=all_qemus(), ids=str)
def qemu(request: pytest.FixtureRequest) -> QemuBinary:
    binary: QemuBinary = request.param
    return binary


def test_boots_counts_and_checks_its_pages(scratch: Path, qemu: QemuBinary) -> None:
    workload = Workload(fill_mib=4, fill="text", rewrite_kib_per_s=1024, tick_ms=10, check_all=5)
    with GuestMachine(scratch, qemu, workload=workload) as machine:
        machine.start().wait_for("SEALANE-GUEST READY")
        machine.wait_for("checked 1024 pages ok")
        assert machine.console.is_contiguous
        assert machine.console.ticks[0] == 1
        assert machine.console.corruptions == []
    assert not machine.is_running


def test_the_worker_notices_a_changed_page(scratch: Path) -> None:
    with GuestMachine(scratch, workload=Workload(fill_mib=1, fill="text", tick_ms=10, canary=CANARY)) as machine:
        machine.start().wait_ready()
        with machine.observe() as monitor:
            monitor.execute("stop")
            monitor.execute("migrate-set-parameters", max_bandwidth=100 << 30)
            state = scratch / "state"
            monitor.execute("migrate", uri=f"exec:cat > {state}")
            while monitor.execute("query-migrate")["status"] != "completed":
                pass
    saved = state.read_bytes()
    page = (CANARY.encode() * 200)[:4096]
    assert saved.count(page) == 256
    state.write_bytes(saved.replace(page, page[:100] + b"X" + page[101:]))
    with GuestMachine(scratch, machine.qemu, workload=machine.workload) as tampered:
        tampered.start_incoming(f"exec:cat {state}")
        with tampered.observe() as monitor:
            while (status := monitor.execute("query-status")["status"]) == "inmigrate":
                pass
            assert status == "paused"
            monitor.execute("cont")
        tampered.wait_for("CORRUPT page canary")
        assert tampered.console.corruptions


def test_the_canary_is_in_memory_and_not_on_the_command_line(scratch: Path) -> None:
    with GuestMachine(scratch, workload=Workload(canary=CANARY)) as machine:
        machine.start_warm().wait_ticks(1)
        assert CANARY not in " ".join(machine.command())
        dump = scratch / "dump"
        with machine.observe() as monitor:
            monitor.execute("stop")
            monitor.execute("pmemsave", val=0, size=machine.hardware.memory_mib << 20, filename=str(dump))
        memory = dump.read_bytes()
    page = (CANARY.encode() * 200)[:4096]
    aligned = sum(memory[at : at + 4096] == page for at in range(0, len(memory), 4096))
    assert aligned == 256


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
def test_a_plain_migration_keeps_the_count_and_the_memory(scratch: Path, machine_type: str) -> None:
    hardware = Hardware(machine=machine_type)
    workload = Workload(fill_mib=16, rewrite_kib_per_s=2048, tick_ms=20, check_all=10, canary=CANARY)
    if not find_qemu().tracks_dirty_pages_under_tcg:
        workload = Workload(fill_mib=16, tick_ms=20, check_all=10)
    source = GuestMachine(scratch / "a", hardware=hardware, workload=workload)
    destination = GuestMachine(scratch / "b", hardware=hardware, workload=workload)
    socket = scratch / "lane.sock"
    with source, destination:
        source.start_warm().wait_ticks(2)
        destination.start_incoming(f"unix:{socket}")
        answer = migrate_plainly(source, destination, f"unix:{socket}")
        assert answer["status"] == "completed"
        destination.wait_ticks(2 * workload.check_all)  # at least one check of all pages begins after the migration
        assert destination.console.checks >= 1
        console = ConsoleLog(source.console_path, destination.console_path)
        assert console.is_contiguous
        assert console.last_tick > source.console.last_tick > 0
        assert console.corruptions == []


def test_a_warm_start_goes_on_where_the_state_was_saved(scratch: Path) -> None:
    machine = GuestMachine(scratch)
    with machine:
        machine.start_warm().wait_ticks(3)
        first = machine.console.ticks[0]
    with machine:
        machine.start_warm().wait_ticks(3)
        assert machine.console.ticks[:3] == [first, first + 1, first + 2]


def test_a_machine_that_cannot_start_says_why(scratch: Path) -> None:
    machine = GuestMachine(scratch, hardware=Hardware(machine="no-such-machine"))
    with pytest.raises(RigError, match="no-such-machine"):
        machine.start()
    assert not machine.is_running


def test_paths_too_long_for_sockets_are_refused(scratch: Path) -> None:
    with pytest.raises(RigError, match="too long"):
        GuestMachine(scratch / ("x" * 100))


def test_the_image_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = guest_initrd().read_bytes()
    monkeypatch.setenv("SEALANE_CACHE_DIR", str(tmp_path))
    guest_initrd.cache_clear()
    assert guest_initrd().is_relative_to(tmp_path)
    assert guest_initrd().read_bytes() == first
    guest_initrd.cache_clear()


def test_auto_falls_back_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel_module, "_KVM", tmp_path / "kvm")
    chosen = choose_accel("auto", find_qemu())
    assert chosen.name == "tcg"
    assert chosen.reason.endswith("does not open: No such file or directory")
    assert choose_accel("kvm", find_qemu()).name == "kvm"


def test_auto_gives_up_on_a_guest_that_does_not_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEALANE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(accel_module, "_KVM", Path("/dev/null"))
    monkeypatch.setattr(accel_module, "_trial", lambda qemu: accel_module.Accel("tcg", "tried"))
    assert choose_accel("auto", find_qemu()).reason == "tried"
    monkeypatch.setattr(accel_module, "_trial", None)
    assert choose_accel("auto", find_qemu()).reason == "tried"
