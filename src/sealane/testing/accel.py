"""KVM or TCG: decided by trying, because a /dev/kvm that opens may still not run a guest (nested virtualisation)."""

import json
import os
import select
import subprocess
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sealane.testing import packages
from sealane.testing.cache import build_once
from sealane.testing.guest.build import READY_MARKER, guest_initrd
from sealane.testing.problems import RigError

if TYPE_CHECKING:
    from sealane.testing.qemu import QemuBinary

_KVM = Path("/dev/kvm")
TRIAL_S = 6.0


@dataclass(frozen=True)
class Accel:
    """An accelerator and, in plain words, why it was taken."""

    name: Literal["kvm", "tcg"]
    reason: str


def choose_accel(requested: Literal["auto", "kvm", "tcg"], qemu: "QemuBinary") -> Accel:
    """The accelerator to run guests with. `auto` takes KVM only after a guest has booted with it.

    The trial is made once per boot of this machine and QEMU version, takes at most TRIAL_S and is remembered.
    """
    if requested != "auto":
        return Accel(requested, "asked for")
    try:
        os.close(os.open(_KVM, os.O_RDWR))
    except OSError as error:
        return Accel("tcg", f"{_KVM} does not open: {error.strerror}")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    key = sha256(f"{boot} {qemu.path} {qemu.version} {os.getuid()}".encode()).hexdigest()[:20]
    try:
        directory = build_once(f"accel-{key}", lambda made: _remember(made, _trial(qemu)))
    except PermissionError:  # a cache that another user has prepared: tried anew each time
        return _trial(qemu)
    return Accel(**json.loads((directory / "accel.json").read_text()))


def _remember(directory: Path, accel: Accel) -> None:
    (directory / "accel.json").write_text(json.dumps(asdict(accel)))


def _trial(qemu: "QemuBinary") -> Accel:
    """Boots the guest with KVM and waits for its marker, for TRIAL_S at most."""
    argv = [
        str(qemu.path), "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot",
        "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256", "-serial", "stdio",
        "-kernel", str(packages.kernel()), "-initrd", str(guest_initrd()), "-append", "console=ttyS0 quiet panic=-1",
    ]  # fmt: skip
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        return _judge(process)
    finally:
        process.kill()
        process.wait()


def _judge(process: subprocess.Popen[bytes]) -> Accel:
    if process.stdout is None:
        raise RigError("no pipe to the trial guest")
    output = b""
    started = time.monotonic()
    while (left := started + TRIAL_S - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            break
        chunk = os.read(process.stdout.fileno(), 4096)
        output += chunk
        if READY_MARKER in output:
            return Accel("kvm", f"a trial guest booted in {time.monotonic() - started:.1f} s")
        if not chunk:
            last = output.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            return Accel("tcg", f"QEMU refuses KVM: {last[0]}")
    return Accel("tcg", f"{_KVM} opens, but a trial guest did not boot within {TRIAL_S:.0f} s")
