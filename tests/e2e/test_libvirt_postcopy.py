"""Plain libvirt's postcopy, cut after the switch: who can join the halves again. It is why domains do not go by postcopy."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from sealane.libvirt.binding import load
from sealane.testing.console import ConsoleLog
from sealane.testing.hosts import BackgroundProcess
from sealane.testing.libvirt import DomainSpec, LibvirtHost, libvirtd_works, make_libvirt_hosts
from sealane.testing.machine import POLL_S, Hardware, Workload
from sealane.testing.plainlibvirt import MEMORY_SOCKET, relay_memory
from sealane.testing.problems import RigError
from sealane.testing.qmp import Qmp

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not libvirtd_works(), reason="two libvirtd need root and Debian's libvirt-daemon-driver-qemu"),
]

# By libvirt's list of releases: came with 11.2.0, mended in 11.4.0.
CRASHES: Final = range(11_002_000, 11_004_000)
FAST: Final = 1 << 30
SPEC = DomainSpec(
    name="cut",
    hardware=Hardware(memory_mib=128),
    workload=Workload(fill_mib=32, check_all=20, rewrite_kib_per_s=64),
    monitor="/run/cut.qmp",
)


def state(host: LibvirtHost) -> str:
    """What libvirtd says of the domain, and why."""
    return host.virsh("domstate", "--reason", SPEC.name, check=False).strip()


def wait_states(hosts: list[LibvirtHost], *wanted: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (states := tuple(state(each) for each in hosts)) != wanted:
        if time.monotonic() > deadline:
            raise RigError(f"the domain is {states}, not {wanted}")
        time.sleep(POLL_S)


def words(destination: LibvirtHost, *options: str) -> tuple[str, ...]:
    """virsh(1) that migrates by postcopy, run at the source: the destination's libvirtd directly, the memory by the relay."""
    to = (SPEC.name, destination.uri, "--migrateuri", f"unix://{MEMORY_SOCKET}")
    return ("virsh", "-q", "-c", "qemu:///system", "migrate", "--live", "--postcopy", *options, *to)


def wait_end(migrating: BackgroundProcess) -> None:
    migrating.wait_until(lambda: not migrating.is_running, "its end", timeout_s=60.0)


@contextlib.contextmanager
def cut_postcopy() -> Iterator[list[LibvirtHost]]:
    """Two hosts, each with a half of the domain, and a way that can be used again."""
    with make_libvirt_hosts() as hosts:
        source, destination = hosts
        file = source.host.scratch / "domain.xml"
        file.write_text(SPEC.xml(source))
        source.virsh("create", str(file))
        SPEC.wait_ticks(source, 1)
        with relay_memory(source, destination) as relay:
            slowly = ("--bandwidth", "4", "--postcopy-bandwidth", "1")
            migrating = source.host.start(*words(destination, *slowly))
            with Qmp(source.outside(SPEC.monitor)) as monitor:
                migrating.wait_until(lambda: transferred(monitor) > 0, "its copy")
            source.virsh("migrate-postcopy", SPEC.name)
            SPEC.wait_ticks(destination, 3)
            relay.cut()
            wait_end(migrating)
            wait_states(hosts, "paused (post-copy failed)", "running (post-copy failed)")
            for host in hosts:
                wait_paused(host)
            yield hosts


def wait_paused(host: LibvirtHost) -> None:
    """libvirtd calls a postcopy failed before its QEMU has paused it, and may refuse until then what it is asked next."""
    with Qmp(host.outside(SPEC.monitor)) as monitor:
        deadline = time.monotonic() + 60.0
        while (status := monitor.execute("query-migrate")["status"]) != "postcopy-paused":
            if time.monotonic() > deadline:
                raise RigError(f"QEMU says of its migration: {status}")
            time.sleep(POLL_S)


def transferred(monitor: Qmp) -> int:
    told: dict[str, Any] = monitor.execute("query-migrate")
    return int(told.get("ram", {}).get("transferred", 0))


def join_by_qemu(source: LibvirtHost, destination: LibvirtHost) -> None:
    """What libvirt's monitor cannot be asked for: its libvirtd holds a lock on the domain."""
    with Qmp(destination.outside(SPEC.monitor)) as monitor:
        monitor.execute("migrate-recover", uri=f"unix:{MEMORY_SOCKET}")
    with Qmp(source.outside(SPEC.monitor)) as monitor:
        monitor.execute("migrate-set-parameters", max_postcopy_bandwidth=FAST)
        monitor.execute("migrate", uri=f"unix:{MEMORY_SOCKET}", resume=True)


def test_libvirt_11_3_dies_of_its_recovery_and_qemu_recovers() -> None:
    """The destination's libvirtd is started again, and then sees by itself that QEMU has finished, as the source's does."""
    with cut_postcopy() as hosts:
        source, destination = hosts
        number = load().open(destination.uri).getLibVersion()
        resumed = source.host.run(*words(destination, "--postcopy-resume", "--postcopy-bandwidth", "1000"), check=False)
        if number in CRASHES:
            assert resumed.returncode, resumed
            assert destination.daemon is not None
            wait_end(destination.daemon)
            assert destination.daemon.process.returncode == -signal.SIGSEGV
            destination.start_daemon()
            wait_states(hosts, "paused (post-copy failed)", "running (post-copy failed)")
            join_by_qemu(source, destination)
        else:
            assert not resumed.returncode, resumed
        wait_states(hosts, "", "running (migrated)")
        console = ConsoleLog(SPEC.console(source), SPEC.console(destination))
        checks = console.checks
        SPEC.wait_ticks(destination, 25)
        assert console.checks > checks
        assert console.is_contiguous
        assert not console.corruptions
