"""What must fit before anything stops, as tables."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sealane.errors import ControlError
from sealane.host.migration.checks import (
    NEEDED_CAPABILITIES,
    available_memory_bytes,
    check_free_memory,
    check_idle,
    check_same_machine,
    check_source,
    choose_multifd_channels,
    words_for,
)
from sealane.hypervisor.driver import VmDescription
from sealane.limits import GIB, MIB, MULTIFD_CHANNELS_DEFAULT
from tests.host.migration.test_messages import PREPARE

HERE = VmDescription(
    name="web01",
    uuid=PREPARE.uuid,
    qemu_version=(7, 2, 0),
    machine_type=PREPARE.machine_type,
    memory_bytes=PREPARE.memory_bytes,
    cpus=PREPARE.cpus,
    run_state="inmigrate",
    accelerator="tcg",
    capabilities=frozenset({*NEEDED_CAPABILITIES, "multifd"}),
    pid=1,
    migration_status="none",
)


@pytest.mark.parametrize(
    "there",
    [
        {},
        {"qemu_version": (10, 0, 2)},  # newer at the destination is what a migration is often for
        {"qemu_version": (7, 2, 19)},
        {"capabilities": NEEDED_CAPABILITIES},
        {"capabilities": NEEDED_CAPABILITIES - {"pause-before-switchover"}},  # a matter of the source
        {"uuid": "another", "accelerator": "kvm"},
    ],
)
def test_machines_that_fit(there: dict[str, Any]) -> None:
    fits = replace(HERE, **there)
    check_same_machine(PREPARE, fits)  # raises nothing
    with pytest.raises(ControlError, match="number of CPUs"):  # and was looked at
        check_same_machine(PREPARE, replace(fits, cpus=fits.cpus + 1))


@pytest.mark.parametrize(
    ("there", "code", "words"),
    [
        ({"qemu_version": (7, 1, 9)}, "check.qemu-version", "QEMU is 7.2.0 at the source and 7.1.9 at the destination"),
        ({"qemu_version": (6, 9, 0)}, "check.qemu-version", "6.9.0 at the destination"),
        (
            {"machine_type": "pc-q35-8.0"},
            "check.machine-type",
            "the machine type is pc-q35-7.2 at the source and pc-q35-8.0 at the destination",
        ),
        (
            {"memory_bytes": 2 * GIB},
            "check.memory",
            r"the memory is 1.0 GiB \(1073741824 bytes\) at the source and 2.0",
        ),
        ({"memory_bytes": GIB + 1}, "check.memory", r"1.0 GiB \(1073741825 bytes\) at the destination"),
        ({"cpus": 1}, "check.cpus", "the number of CPUs is 2 at the source and 1 at the destination"),
        ({"capabilities": frozenset({"events"})}, "check.capabilities", "the destination's QEMU lacks return-path"),
        ({"capabilities": frozenset()}, "check.capabilities", "lacks events, return-path"),
        ({"machine_type": "a", "memory_bytes": 1, "cpus": 9}, "check.machine-type", "the machine type"),
    ],
)
def test_machines_that_differ(there: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(ControlError, match=words) as raised:
        check_same_machine(PREPARE, replace(HERE, **there))
    assert raised.value.code == code


@pytest.mark.parametrize("missing", sorted(NEEDED_CAPABILITIES))
def test_a_source_needs_each_capability(missing: str) -> None:
    check_source(HERE)
    with pytest.raises(ControlError, match=f"the source's QEMU lacks {missing}") as raised:
        check_source(replace(HERE, capabilities=HERE.capabilities - {missing}))
    assert raised.value.code == "check.capabilities"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("setup", "not Sealane's"),
        ("active", "not Sealane's"),
        ("pre-switchover", "not Sealane's"),
        ("device", "one was cut in its switch"),
        ("cancelling", "one was cut in its switch"),
        ("postcopy-active", "the switch was cut"),
        ("postcopy-paused", "the switch was cut"),
        ("postcopy-recover-setup", "the switch was cut"),
        ("postcopy-recover", "the switch was cut"),
    ],
)
def test_a_qemu_that_is_in_a_migration_is_left_alone(status: str, words: str) -> None:
    runs = replace(HERE, run_state="running")
    for idle in ("none", "completed", "failed", "cancelled"):
        check_idle(replace(runs, migration_status=idle))
    with pytest.raises(ControlError, match=words) as raised:
        check_idle(replace(runs, migration_status=status))
    assert raised.value.code == "vm.busy"


def test_a_half_that_somebody_else_keeps_is_left_alone() -> None:
    with pytest.raises(ControlError, match=r"not Sealane's.*vm\.busy"):
        check_idle(replace(HERE, migration_status="postcopy-paused", run_state="finish-migrate"))


def test_free_memory_counts_what_qemu_needs_beside_the_guest() -> None:
    check_free_memory(GIB, GIB + 64 * MIB)
    with pytest.raises(ControlError, match=r"the VM has 1.0 GiB and 1.1 GiB are available there") as raised:
        check_free_memory(GIB, GIB + 64 * MIB - 1)
    assert raised.value.code == "check.free-memory"


def test_available_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:   42 kB\nSwapFree: 7 kB\n")
    assert available_memory_bytes(meminfo) == 42 * 1024
    meminfo.write_text("MemTotal:  100 kB\n")
    with pytest.raises(ControlError, match=r"check\.free-memory"):
        available_memory_bytes(meminfo)
    assert available_memory_bytes() > 0


BOTH, NONE = frozenset({"multifd", "events"}), frozenset({"events"})


@pytest.mark.parametrize(
    ("wanted", "source", "destination", "channels"),
    [
        (None, BOTH, BOTH, MULTIFD_CHANNELS_DEFAULT),
        (None, BOTH, NONE, 0),
        (None, NONE, BOTH, 0),
        (0, BOTH, BOTH, 0),
        (0, NONE, NONE, 0),
        (7, BOTH, BOTH, 7),
        (7, BOTH, NONE, None),
        (1, NONE, BOTH, None),
    ],
)
def test_multifd_channels(
    wanted: int | None, source: frozenset[str], destination: frozenset[str], channels: int | None
) -> None:
    if channels is None:
        with pytest.raises(ControlError, match="multifd was asked for") as raised:
            choose_multifd_channels(wanted, source, destination)
        assert raised.value.code == "check.capabilities"
    else:
        assert choose_multifd_channels(wanted, source, destination) == channels


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 MiB"), (96 * MIB, "96 MiB"), (GIB, "1.0 GiB"), (3 * GIB // 2, "1.5 GiB")]
)
def test_words_for_sizes(size: int, words: str) -> None:
    assert words_for(size) == words
