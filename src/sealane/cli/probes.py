"""What the kernel, the processor and QEMU say of themselves, asked in the way that costs least. No probe changes anything."""

import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

# Linux UAPI: include/uapi/asm-generic/unistd.h; the two are the same on all architectures.
_SYS_LANDLOCK_CREATE_RULESET: Final = 444
_SYS_MEMFD_SECRET: Final = 447
_SYS_USERFAULTFD: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1  # include/uapi/linux/landlock.h
_KVM_GET_API_VERSION: Final = 0xAE00  # include/uapi/linux/kvm.h
_STA_UNSYNC: Final = 0x40  # include/uapi/linux/timex.h
_QEMU_PATIENCE_S: Final = 15


@dataclass(frozen=True)
class Qemu:
    """A QEMU binary: its version and its migration capabilities (None where it would not tell)."""

    path: str
    version: tuple[int, int, int]
    capabilities: frozenset[str] | None

    @property
    def shown_version(self) -> str:
        """Such as `10.0.2`."""
        return ".".join(str(part) for part in self.version)


def qemu_binaries() -> list[str]:
    """SEALANE_QEMU first, then this architecture's system emulator on PATH; each once."""
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine(), platform.machine())
    wanted = [os.environ.get("SEALANE_QEMU"), shutil.which(f"qemu-system-{machine}")]
    found = [path for path in wanted if path]
    return list(dict.fromkeys(os.path.realpath(path) if os.path.exists(path) else path for path in found))


def ask_qemu(path: str) -> Qemu:
    """Run the binary for its version and, without a machine, for its capabilities. Raises OSError, ValueError."""
    told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_QEMU_PATIENCE_S, check=False)
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", told.stdout)
    if match is None:
        raise ValueError("it is not a QEMU, or it does not start")
    major, minor, micro = (int(part or 0) for part in match.groups())
    return Qemu(path, (major, minor, micro), _capabilities(path))


def _capabilities(path: str) -> frozenset[str] | None:
    commands = "".join(
        json.dumps({"execute": name}) for name in ("qmp_capabilities", "query-migrate-capabilities", "quit")
    )
    arguments = [path, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-S", "-qmp", "stdio"]
    try:
        told = subprocess.run(
            arguments, input=commands, capture_output=True, text=True, timeout=_QEMU_PATIENCE_S, check=False
        )
        answers = [json.loads(line) for line in told.stdout.splitlines() if line]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    for answer in answers:
        listed = answer.get("return")
        if isinstance(listed, list):
            return frozenset(entry["capability"] for entry in listed)
    return None


def kvm_problem() -> str | None:
    """Why /dev/kvm cannot be used; None where it opens and answers with the API that QEMU needs (12)."""
    try:
        descriptor = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm does not open: {os.strerror(error.errno or 0).lower()}"
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION)
        return None if version == 12 else f"/dev/kvm speaks API {version}"
    except OSError as error:
        return f"/dev/kvm does not answer: {os.strerror(error.errno or 0).lower()}"
    finally:
        os.close(descriptor)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _descriptor_from(number: int, *arguments: int) -> str | None:
    """Make a system call that gives a descriptor, and close it; the reason where it gave none."""
    given = int(_libc().syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments)))
    if given < 0:
        return os.strerror(ctypes.get_errno()).lower()
    os.close(given)
    return None


def landlock_abi() -> int:
    """The ABI that Landlock has here; 0 where it is absent or switched off."""
    given = int(
        _libc().syscall(
            ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET),
            ctypes.c_void_p(None),
            ctypes.c_size_t(0),
            ctypes.c_long(_LANDLOCK_CREATE_RULESET_VERSION),
        )
    )
    return max(given, 0)


def memfd_secret_problem() -> str | None:
    """Why memory cannot be hidden from the kernel's own map; None where it can."""
    return _descriptor_from(_SYS_MEMFD_SECRET, 0)


def userfaultfd_problem() -> str | None:
    """Why page faults cannot be served from user space, which post-copy needs; None where they can.

    QEMU takes /dev/userfaultfd, and else the system call; it needs faults of the kernel's too (util/userfaultfd.c, uffd_open),
    which is more than an unprivileged process gets by default.
    """
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return None
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        return f"not known for {platform.machine()}"
    return _descriptor_from(number, os.O_CLOEXEC)


def pidfd_problem() -> str | None:
    """Why a process cannot be held by a descriptor; None where it can."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return str(error).lower()
    return None


def seccomp_problem() -> str | None:
    """Why system calls cannot be filtered; None where they can."""
    try:
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text(encoding="ascii").split()
    except OSError:
        return "not in this kernel"
    return None if "kill_process" in actions else "the kernel cannot kill on a forbidden call"


def tun_problem() -> str | None:
    """Why a tap device cannot be made; None where /dev/net/tun opens."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/net/tun does not open: {os.strerror(error.errno or 0).lower()}"
    return None


def port_holder(host: str, port: int) -> str | None:
    """None where the port can be opened; else why not, in the kernel's words."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0).lower()
    return None


def processor_flags() -> frozenset[str]:
    """The first processor's flags (x86) or features (Arm)."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            label, _, value = line.partition(":")
            if label.strip() in {"flags", "Features"}:
                return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


class _Timex(ctypes.Structure):
    """struct timex of include/uapi/linux/timex.h up to `status`, and room for the rest."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    ]


def clock_is_synchronised() -> bool | None:
    """Whether the kernel's clock is disciplined by a time service; None where it does not say."""
    state = _Timex()
    if int(_libc().adjtimex(ctypes.byref(state))) < 0:
        return None
    return not state.status & _STA_UNSYNC


KERNEL_PROBES: Final[dict[str, Callable[[], str | None]]] = {
    "seccomp": seccomp_problem,
    "userfaultfd": userfaultfd_problem,
    "pidfd": pidfd_problem,
    "tun": tun_problem,
}
