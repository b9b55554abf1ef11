"""Simulated hosts with a real libvirtd each, in network, mount, UTS, IPC and PID namespaces of their own.

What libvirtd keeps lies in the host's own directories, bound over the system's; so does all of /run, with the directory of
the migration sockets: libvirt uses one path at both ends. The first process of the PID namespace reaps what daemons leave,
and dies with the test run; the kernel then ends all the others, QEMUs included. Needs root and Debian's
libvirt-daemon-driver-qemu.

Which libvirt: `all_libvirts`. One that is not the system's lies unpacked in a directory, and is bound over it file by file.
"""

import os
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Final

from sealane.crypto.identity import create_identity, save_identity
from sealane.host.config import AGENT_FILE
from sealane.testing.accel import choose_accel
from sealane.testing.console import ConsoleLog
from sealane.testing.hosts import BackgroundProcess, SimulatedHost, make_hosts, namespaces_work
from sealane.testing.machine import POLL_S, Hardware, Workload
from sealane.testing.packages import kernel, private_libvirt
from sealane.testing.pair import AgentHost, HostPair
from sealane.testing.problems import RigError
from sealane.testing.qemu import QemuBinary, all_qemus, find_qemu

USER: Final = 1000
_RUNTIME: Final = f"/run/user/{USER}"
# what libvirtd, QEMU and swtpm keep outside /run
_PRIVATE: Final = (
    "/etc/libvirt",
    "/var/lib/libvirt",
    "/var/cache/libvirt",
    "/var/log/libvirt",
    "/var/lib/swtpm-localca",
    "/var/log/swtpm",
)
_HARDWARE: Final = Hardware()
_WORKLOAD: Final = Workload()
_DAEMON_CONF: Final = """\
host_uuid = "{uuid}"
auth_unix_ro = "none"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 0
"""
_QEMU_CONF: Final = """\
security_driver = "none"
cgroup_controllers = []
stdio_handler = "file"
namespaces = []
remember_owner = 0
"""
_ROOTS_QEMU_CONF: Final = """\
user = "root"
group = "root"
dynamic_ownership = 0
swtpm_user = "root"
swtpm_group = "root"
"""
_QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
LIBVIRT_VARIABLE: Final = "SEALANE_LIBVIRT"
_SYSTEM: Final = Path("/")
# of a libvirt that lies unpacked somewhere
_PARTS: Final = (
    "usr/sbin/libvirtd",
    "usr/bin/virsh",
    "usr/lib/*/libvirt*.so.0",
    "usr/lib/*/libvirt",
    "usr/lib/libvirt",
    "usr/share/libvirt",
)
_EMULATOR: Final = Path("usr/bin/qemu-system-x86_64")
# of a QEMU in `bin` of some prefix, below that prefix: its modules, what it loads into guests
_QEMU_PARTS: Final = ("lib/*/qemu", "share/qemu", "share/seabios")
# libvirtd asks for its user before it reads which one it shall take; Debian's libvirt-daemon-system would make it
_ACCOUNTS: Final = {
    "passwd": "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin",
    "group": "libvirt-qemu:x:64055:",
}


@dataclass(frozen=True)
class Libvirt:
    """A libvirt below `root`, and the QEMU that its domains get."""

    root: Path
    emulator: QemuBinary

    @property
    def name(self) -> str:
        """For the names of tests."""
        return "system" if self.root == _SYSTEM else "later"

    @property
    def emulator_path(self) -> Path:
        """Where its domains find that QEMU, once `mounts` are there."""
        inside = _SYSTEM / _EMULATOR
        return inside if inside.exists() else self.emulator.path

    def mounts(self) -> list[str]:
        """What puts it, and that QEMU, in place of the system's: commands of mount(8)."""
        emulator = self.emulator.path
        binds = emulator_binds(emulator)
        if self.root != _SYSTEM:
            found = _bound_over(_SYSTEM, self.root, _PARTS)
            if not found:
                raise RigError(f"{self.root} holds no libvirt")
            binds = found + binds
        hidden = [f"mount -t tmpfs none {shlex.quote(str(each))}" for each in modules_to_hide(emulator)]
        return [f"mount --bind {shlex.quote(str(each))} {shlex.quote(str(target))}" for each, target in binds] + hidden


def emulator_binds(emulator: Path, system: Path = _SYSTEM) -> list[tuple[Path, Path]]:
    """What to bind over what, so that the QEMU of the system below `system` is `emulator`; nothing where it is, or has none.

    libvirtd asks that one too. What lies beside the emulator goes along where it has such a layout; it itself always does.
    """
    emulator, inside = emulator.resolve(), system / _EMULATOR
    if not inside.exists() or emulator == inside.resolve():
        return []
    prefix = emulator.parents[1] if emulator.parent.name == "bin" else None
    parts = [] if prefix is None else _bound_over(system / "usr", prefix, _QEMU_PARTS)
    return [(emulator, inside), *parts]


def modules_to_hide(emulator: Path, system: Path = _SYSTEM) -> list[Path]:
    """The system's directories of modules, where a QEMU without its own takes its place: at another build's it ends."""
    binds = emulator_binds(emulator, system)
    bound = {target for _, target in binds}
    there = sorted((system / "usr").glob(_QEMU_PARTS[0])) if binds else []
    return [each for each in there if each not in bound and any(each.glob("*.so"))]


def _bound_over(system: Path, root: Path, patterns: Sequence[str]) -> list[tuple[Path, Path]]:
    found = [each for pattern in patterns for each in sorted(root.glob(pattern))]
    targets = ((each, system / each.relative_to(root)) for each in found)
    return [(each, target) for each, target in targets if target.exists() and target.resolve() != each.resolve()]


@cache
def all_libvirts() -> tuple[Libvirt, ...]:
    """Every libvirt that is here, oldest first; with SEALANE_LIBVIRT (a root directory, `/` for the system's) only that one.

    The system's has the system's QEMU: libvirt 9.0 cannot talk to a QEMU of 2025. Where that QEMU's migrations cannot be trusted
    here (it loses pages under TCG), a later libvirt is fetched, which has `find_qemu`'s. With SEALANE_QEMU there is no other QEMU:
    one that is not the system's has the later libvirt alone, and the system's where none is to be had.
    """
    if named := os.environ.get(LIBVIRT_VARIABLE):
        return (Libvirt(Path(named), find_qemu() if Path(named) != _SYSTEM else _system_qemu() or find_qemu()),)
    system, wanted = _system_qemu(), find_qemu()
    found = [Libvirt(_SYSTEM, system)] if system else []
    if wanted != system:
        with suppress(RigError):  # none to be had for this release
            found.append(Libvirt(private_libvirt(), wanted))
    return tuple(found or [Libvirt(_SYSTEM, wanted)])


def _system_qemu() -> QemuBinary | None:
    """The system's, unless SEALANE_QEMU names another."""
    inside = (_SYSTEM / _EMULATOR).resolve()
    return next((each for each in all_qemus() if each.source == "system" or each.path.resolve() == inside), None)


def libvirtd_works() -> bool:
    """Whether two libvirtd can be had on this machine."""
    return namespaces_work() and shutil.which("libvirtd", path="/usr/sbin:/usr/bin:/sbin") is not None


@dataclass
class LibvirtHost:
    """A simulated host with its libvirtd; `host` starts processes inside all of its namespaces."""

    host: SimulatedHost
    libvirt: Libvirt
    is_session: bool = False
    daemon: BackgroundProcess | None = None
    _holder: BackgroundProcess | None = field(default=None, repr=False)

    @property
    def socket(self) -> Path:
        """libvirtd's socket as seen from outside."""
        return self.outside(f"{_RUNTIME if self.is_session else '/run'}/libvirt/libvirt-sock")

    @property
    def uri(self) -> str:
        """A URI that reaches this host's libvirtd from outside its namespaces, as a test does."""
        return f"qemu+unix:///{self._mode}?socket={self.socket}"

    @property
    def _mode(self) -> str:
        return "session" if self.is_session else "system"

    def virsh(self, *words: str, check: bool = True) -> str:
        """Run virsh(1) on this host; RigError with what it said where it fails and `check` is set."""
        return self.host.run("virsh", "-q", "-c", f"qemu:///{self._mode}", *words, check=check).stdout

    def start_daemon(self) -> None:
        """Start libvirtd and return when it answers."""
        self.daemon = self.host.start("libvirtd")
        self.daemon.wait_until(self._answers, "its socket")

    def _answers(self) -> bool:
        return (
            self.socket.exists()
            and self.host.run("virsh", "-c", f"qemu:///{self._mode}", "version", check=False).returncode == 0
        )

    def outside(self, path: str) -> Path:
        """Where a path of this host, in one of its private directories, lies as seen from outside."""
        for each in (*_PRIVATE, "/run"):
            if Path(path).is_relative_to(each):
                return self._bound(each) / Path(path).relative_to(each)
        raise RigError(f"{path} is not private to {self.host.name}")

    def _bound(self, path: str) -> Path:
        return self.host.directory / "bound" / path.strip("/").replace("/", "-")

    def enter_namespaces(self) -> None:
        """Make the namespaces, bind the private directories, and have all later processes start inside."""
        binds = []
        for path in (*_PRIVATE, "/run"):
            private = self._bound(path)
            private.mkdir(parents=True)
            Path(path).mkdir(parents=True, exist_ok=True)
            binds.append(f"mount --bind {private} {path}")
        for name, line in _ACCOUNTS.items():
            mine = self.host.directory / "bound" / name
            system = Path("/etc") / name
            mine.write_text(f"{system.read_text().rstrip()}\n{line}\n")
            binds.append(f"mount --bind {mine} {system}")
        for name in ("libvirt", "lock"):
            (self._bound("/run") / name).mkdir()
        binds += self.libvirt.mounts()
        etc = self._bound("/etc/libvirt")
        (etc / "libvirtd.conf").write_text(_DAEMON_CONF.format(uuid=uuid.uuid5(uuid.NAMESPACE_DNS, self.host.name)))
        (etc / "qemu.conf").write_text(_QEMU_CONF + _ROOTS_QEMU_CONF)
        ready = self.host.scratch / "namespaces"
        words = ["set -e", *binds, f"hostname {self.host.name}", f"echo ready > {ready}", "sleep infinity & wait"]
        kinds = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._holder = self.host.start("unshare", *kinds, "--", "sh", "-c", "\n".join(words))
        self._holder.wait_until(ready.exists, "its namespaces")
        self.host.inside = ("nsenter", f"--target={self._first_process()}", "--all", "--")
        if self.is_session:
            self._become_user(etc)

    def _become_user(self, etc: Path) -> None:
        """Have all later processes be another user's, with a session of its own: a user namespace in which root is that user.

        So they may read what root may, which tests need, and have none of root's powers.
        """
        home = self.host.directory / "home"
        shutil.copytree(etc, home / ".config/libvirt")
        (home / ".config/libvirt/qemu.conf").write_text(_QEMU_CONF)
        self.outside(_RUNTIME).mkdir(parents=True)
        environment = (f"HOME={home}", f"XDG_RUNTIME_DIR={_RUNTIME}", f"XDG_CONFIG_HOME={home}/.config")
        number = self.host.scratch / "user"
        words = ("unshare", "--user", f"--map-user={USER}", f"--map-group={USER}", "--")
        # one namespace for all: across two of them nobody may look at the other's processes, though both are the same user's
        holder = self.host.start(*words, "sh", "-c", f"echo $$ >{number}; exec sleep infinity")
        holder.wait_until(lambda: number.exists() and number.read_text().endswith("\n"), "its user")
        user = ("nsenter", f"--target={number.read_text().strip()}", "--user", "--preserve-credentials", "--")
        self.host.inside = (*self.host.inside, *user, "env", f"XDG_CACHE_HOME={home}/.cache", *environment)

    def _first_process(self) -> int:
        assert self._holder is not None  # noqa: S101 - enter_namespaces has just started it
        outer = self._holder.process.pid
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        if len(children) != 1:
            raise RigError(f"unshare has children {children}")
        return int(children[0])


@dataclass(frozen=True)
class DomainSpec:
    """A guest of `sealane.testing.guest` as a libvirt domain; QEMU has a monitor of the test's own at the path `monitor`."""

    name: str = "domain"
    hardware: Hardware = _HARDWARE
    workload: Workload = _WORKLOAD
    metadata: str = ""
    devices: str = ""
    monitor: str = ""

    def xml(self, host: LibvirtHost) -> str:
        """The domain's description for this host; its console goes to `console(host)`."""
        emulator = host.libvirt.emulator
        kind = choose_accel("auto", emulator).name
        cpu = "<cpu mode='host-passthrough'/>" if kind == "kvm" else "<cpu mode='custom'><model>qemu64</model></cpu>"
        return f"""\
<domain type='{"kvm" if kind == "kvm" else "qemu"}' xmlns:qemu='{_QEMU_NAMESPACE}'>
  <name>{self.name}</name>
  <uuid>{uuid.uuid5(uuid.NAMESPACE_DNS, self.name)}</uuid>
  <metadata>{self.metadata}</metadata>
  <memory unit='MiB'>{self.hardware.memory_mib}</memory>
  <vcpu>{self.hardware.cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{self.hardware.machine}'>hvm</type>
    <kernel>{kernel()}</kernel>
    <initrd>{self.workload.initrd}</initrd>
    <cmdline>{self.workload.command_line()}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>{host.libvirt.emulator_path}</emulator>
    <serial type='file'><source path='/run/{self.name}.log' append='on'/><target port='0'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {self.devices}
  </devices>
  {self._words()}
</domain>
"""

    def _words(self) -> str:
        if not self.monitor:
            return ""
        listen = f"unix:{self.monitor},server=on,wait=off"
        return f"<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='{listen}'/></qemu:commandline>"

    def console(self, host: LibvirtHost) -> Path:
        """The serial console's file on this host, as seen from outside."""
        return host.outside(f"/run/{self.name}.log")

    def wait_ticks(self, host: LibvirtHost, count: int, *, timeout_s: float = 60.0) -> None:
        """Wait for `count` more ticks of the guest on this host; RigError where they do not come."""
        console = ConsoleLog(self.console(host))
        wanted, deadline = len(console.ticks) + count, time.monotonic() + timeout_s
        while len(console.ticks) < wanted:
            if time.monotonic() > deadline:
                raise RigError(f"{self.name} stands still on {host.host.name} after tick {console.last_tick}")
            time.sleep(POLL_S)


@contextmanager
def make_libvirt_hosts(
    names: Sequence[str] = ("host-a", "host-b"), *, libvirt: Libvirt | None = None, is_session: bool = False
) -> Iterator[list[LibvirtHost]]:
    """Hosts that reach one another, libvirtd up on each (the latest that is here), a user's where `is_session`; all of it goes
    away at the end, also after a failure."""
    if not libvirtd_works():
        raise RigError(f"no libvirtd, or no right to make namespaces (uid {os.geteuid()})")
    with ExitStack() as stack:
        ends = []
        for host in stack.enter_context(make_hosts(names, network="netns")):
            end = LibvirtHost(host, libvirt or all_libvirts()[-1], is_session)
            end.enter_namespaces()
            end.start_daemon()
            ends.append(end)
        yield ends


@dataclass
class LibvirtPair:
    """Two hosts with libvirtd and an agent each, the agents trusting each other."""

    libvirts: tuple[LibvirtHost, LibvirtHost]
    pair: HostPair

    def start_domain(self, spec: DomainSpec, at: LibvirtHost, *, persistent: bool = False) -> None:
        """Start the guest and wait until it works."""
        file = at.host.scratch / f"{spec.name}.xml"
        file.write_text(spec.xml(at))
        if persistent:
            at.virsh("define", str(file))
            at.virsh("start", spec.name)
        else:
            at.virsh("create", str(file))
        spec.wait_ticks(at, 1)


@contextmanager
def make_libvirt_pair(
    settings: str = "", *, libvirt: Libvirt | None = None, is_session: bool = False
) -> Iterator[LibvirtPair]:
    """Two libvirtd and two agents, a user's where `is_session`; everything goes away at the end."""
    with make_libvirt_hosts(libvirt=libvirt, is_session=is_session) as (first, second):
        ends = []
        for each in (first, second):
            identity = create_identity(each.host.name, now=datetime.now(UTC), lifetime_days=30)
            save_identity(each.host.paths, identity)
            (each.host.paths.config / AGENT_FILE).write_text(settings)
            end = AgentHost(each.host, identity)
            end.start_agent()
            ends.append(end)
        ends[0].trust(ends[1])
        ends[1].trust(ends[0])
        yield LibvirtPair((first, second), HostPair(*ends))
