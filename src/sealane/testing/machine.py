"""One VM as tests use it: a QEMU process with the guest of `sealane.testing.guest` in it."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Literal

from sealane.testing import packages
from sealane.testing.accel import Accel, choose_accel
from sealane.testing.cache import build_once, cache_dir, forget_unused
from sealane.testing.console import ConsoleLog
from sealane.testing.guest.build import guest_initrd
from sealane.testing.guest.files import Files, initrd_with_files
from sealane.testing.guest.tpm import tpm_initrd
from sealane.testing.problems import RigError
from sealane.testing.qemu import QemuBinary, find_qemu
from sealane.testing.qmp import Qmp

POLL_S = 0.01
BOOT_TIMEOUT_S = 60.0
_UNIX_PATH_MAX = 107  # sockaddr_un.sun_path holds 108 bytes with the final zero (unix(7))


@dataclass(frozen=True)
class Workload:
    """What the guest does; see `guest/worker.c` for each.

    `files` are real files of this machine in the guest's page cache; freed memory is zeroed then, so that what the files
    were unpacked from is not there twice. `tpm_secret` is sealed in the VM's own TPM, which is then used once a tick.
    """

    fill_mib: int = 8
    fill: Literal["random", "text", "zero", "mixed"] = "random"
    rewrite_kib_per_s: int = 0
    tick_ms: int = 100
    check_all: int = 0
    canary: str = ""
    touch_kib_per_s: int = 0
    touch_mib: int = 0
    files: Files | None = None
    tpm_secret: str = ""

    @property
    def initrd(self) -> Path:
        """The guest's initramfs."""
        if self.tpm_secret:
            return tpm_initrd()
        return guest_initrd() if self.files is None else initrd_with_files(self.files)

    def command_line(self) -> str:
        """The kernel's command line that asks for it."""
        words = [
            "console=ttyS0 quiet panic=-1",
            f"sealane.fill_mib={self.fill_mib} sealane.fill={self.fill}",
            f"sealane.rewrite_kib_per_s={self.rewrite_kib_per_s}",
            f"sealane.tick_ms={self.tick_ms} sealane.check_all={self.check_all}",
        ]
        if self.touch_kib_per_s:
            words.append(f"sealane.touch_kib_per_s={self.touch_kib_per_s}")
        if self.touch_mib:
            words.append(f"sealane.touch_mib={self.touch_mib}")
        if self.files is not None:
            words.append("init_on_free=1")
        if self.tpm_secret:
            words.append(f"sealane.tpm_secret={self.tpm_secret.encode().hex()}")
        if self.canary:
            words.append(f"sealane.canary_hex={self.canary.encode().hex()}")
        return " ".join(words)


@dataclass(frozen=True)
class Hardware:
    """What the virtual machine looks like; source and destination must agree in all of it.

    `machine` may be versioned (`pc-q35-7.2`), which lets different QEMU versions agree; `cpu` follows the accelerator
    where it is empty. `devices` are QEMU's words for more devices.
    """

    memory_mib: int = 256
    cpus: int = 1
    machine: str = "q35"
    cpu: str = ""
    devices: tuple[str, ...] = ()


@dataclass
class GuestMachine:
    """A VM with its files in `directory`: `qmp.sock` (for the agent), `observer.sock` (for the test), `console.log`.

    `launcher` goes before QEMU's own words: a way into a network namespace, for one. `pin` is a list of host CPUs as
    taskset(1) takes it; `tpm` is the control channel of the VM's own TPM. Start it from a thread that outlives it: the kernel
    kills QEMU when that thread ends, so that nothing stays behind a test run that was killed.
    """

    directory: Path
    qemu: QemuBinary = field(default_factory=find_qemu)
    accel: Accel | None = None
    hardware: Hardware = Hardware()
    workload: Workload = Workload()
    name: str = "guest"
    launcher: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None
    pin: str = ""
    tpm: Path | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if len(bytes(self.directory / "observer.sock")) > _UNIX_PATH_MAX:
            raise RigError(f"the path is too long for unix sockets: {self.directory}")
        self.accel = self.accel or choose_accel("auto", self.qemu)

    def __enter__(self) -> "GuestMachine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def qmp_path(self) -> Path:
        """The monitor socket that the agent is given."""
        return self.directory / "qmp.sock"

    @property
    def observer_path(self) -> Path:
        """The second monitor socket, for the test itself."""
        return self.directory / "observer.sock"

    @property
    def console_path(self) -> Path:
        """The serial console of this QEMU process; begun anew at each start."""
        return self.directory / "console.log"

    @property
    def console(self) -> ConsoleLog:
        """What the guest has said in this process."""
        return ConsoleLog(self.console_path)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        if self._process is None:
            raise RigError(f"{self.name} was not started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the QEMU process that `start` began is alive."""
        return self._process is not None and self._process.poll() is None

    def _devices(self) -> list[str]:
        """The part that source, destination and saved state share."""
        kvm = self.accel is not None and self.accel.name == "kvm"
        return [
            *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot"),
            *("-name", self.name, "-machine", self.hardware.machine, "-accel", "kvm" if kvm else "tcg"),
            *("-cpu", self.hardware.cpu or ("host" if kvm else "qemu64")),
            *("-smp", str(self.hardware.cpus), "-m", str(self.hardware.memory_mib)),
            *("-kernel", str(packages.kernel()), "-initrd", str(self.workload.initrd)),
            *("-append", self.workload.command_line()),
            *self.hardware.devices,
        ]

    def _tpm_devices(self) -> list[str]:
        if self.tpm is None:
            return []
        chardev = f"socket,id=chrtpm,path={self.tpm}"
        return ["-chardev", chardev, *("-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-tis,tpmdev=tpm0")]

    def command(self) -> list[str]:
        """QEMU's command line; with `-incoming defer -S` after it, the same machine waits for a migration.

        Pinned where `pin` says so, without `launcher`: who starts it is where it should be already.
        """
        pinned = ["taskset", "-c", self.pin] if self.pin else []
        return [
            *pinned,
            str(self.qemu.path),
            *self._devices(),
            *self._tpm_devices(),
            *("-serial", f"file:{self.console_path}"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *("-qmp", f"unix:{self.observer_path},server=on,wait=off"),
        ]

    def start(self, *extra: str) -> "GuestMachine":
        """Starts QEMU (with `extra` words after its command line) and returns when it answers."""
        if self.is_running:
            raise RigError(f"{self.name} runs already")
        for path in (self.qmp_path, self.observer_path, self.console_path):
            path.unlink(missing_ok=True)
        with (self.directory / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*self.launcher, "setpriv", "--pdeathsig", "KILL", "--", *self.command(), *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=None if self.environment is None else dict(self.environment),
            )
        self._wait(self._monitors_listen, "its monitors", 20.0)
        # a command is answered only when QEMU's main loop runs, and by then it listens for a migration too
        self.observe().close()
        return self

    def _monitors_listen(self) -> bool:
        # QEMU makes the sockets in the order of its command line; the observer's is the last
        return self.observer_path.exists()

    def start_incoming(self, uri: str = "defer") -> "GuestMachine":
        """Starts QEMU as a migration's destination, which goes on by itself when the migration has come."""
        return self.start("-incoming", uri)

    def start_warm(self) -> "GuestMachine":
        """Starts QEMU with the state of a guest that has booted and filled its memory, saved once and kept.

        The guest goes on at its next tick; the console begins there. Needs as much space in the cache as the guest has
        content; what nobody used for two weeks is removed.
        """
        state = self._saved_state()
        self.start("-S", "-incoming", f"exec:cat {state}")
        with self.observe() as monitor:
            self._wait(lambda: bool(monitor.execute("query-status")["status"] == "paused"), "the saved state", 60.0)
            monitor.execute("cont")
        return self

    def _saved_state(self) -> Path:
        # its name is no part of a machine's state: guests that differ in nothing else share one
        words = [str(self.qemu.path), str(self.qemu.version), *(word for word in self._devices() if word != self.name)]
        key = sha256("\0".join(words).encode()).hexdigest()[:20]
        forget_unused("warm-", days=14)
        directory = build_once(f"warm-{key}", self._save_state)
        os.utime(directory)
        return directory / "state"

    def _save_state(self, into: Path) -> None:
        # unix socket paths are short, so the saving machine does not live in `into`
        scratch = self.directory / "w"
        model = GuestMachine(
            scratch, self.qemu, self.accel, self.hardware, self.workload, name=self.name, environment=self.environment
        )
        try:
            with model:
                model.start().wait_ticks(1)
                with model.observe() as monitor:
                    # stopped first: nothing is written meanwhile, so every QEMU saves it right under TCG too
                    monitor.execute("stop")
                    monitor.allow_migration()
                    monitor.execute("migrate", uri=f"exec:cat > {into / 'state'}")
                    monitor.wait_migrated()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def observe(self) -> Qmp:
        """A connection to the second monitor (one at a time)."""
        return Qmp(self.observer_path)

    def wait_for(self, text: str, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Waits until the guest has said `text`; RigError with the console's end where it does not come."""
        self._wait(lambda: text in self.console.text, repr(text), timeout_s)

    def wait_ready(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> "GuestMachine":
        """Waits until the guest has filled its memory and counts."""
        return self.wait_ticks(1, timeout_s=timeout_s)

    def wait_ticks(self, count: int, *, timeout_s: float = BOOT_TIMEOUT_S) -> "GuestMachine":
        """Waits for `count` ticks more than were said in this process when it was called."""
        before = len(self.console.ticks)
        self._wait(lambda: len(self.console.ticks) >= before + count, f"{count} more ticks", timeout_s)
        return self

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Polls, because a serial file and another process's sockets raise no event that is cheaper to follow."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.is_running:
                raise RigError(f"QEMU ended while {self.name} was waited for ({what}): {self._last_words()}")
            if time.monotonic() > deadline:
                raise RigError(f"{self.name}: {what} did not come in {timeout_s:.0f} s: {self._last_words()}")
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        log = self.directory / "qemu.log"
        said = log.read_text(errors="replace").strip() if log.exists() else ""
        return f"{said or 'QEMU said nothing'}; console: {' | '.join(self.console.lines[-5:]) or 'empty'}"

    def stop(self) -> None:
        """Ends the QEMU process, at once and for certain. The files stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def saved_states_bytes() -> int:
    """How much the kept states of warm starts take in the cache."""
    return sum(path.stat().st_size for path in cache_dir().glob("warm-*/state"))


def migrate_plainly(source: GuestMachine, destination: GuestMachine, uri: str) -> dict[str, object]:
    """QEMU's own unprotected live migration: the yardstick. The destination must wait for `uri` already.

    Gives `query-migrate`'s answer of the source, which is stopped and stays so.
    """
    with source.observe() as monitor:
        monitor.allow_migration()
        monitor.execute("migrate", uri=uri)
        return monitor.wait_migrated()
