"""The guest that holds secrets (guest/canaries.c), and what the experimenter knows of them."""

import os
import shutil
import stat
from dataclasses import dataclass
from functools import cache
from gzip import compress
from hashlib import sha256
from pathlib import Path
from typing import Final

from sealane.testing.cache import build_once
from sealane.testing.guest.build import compile_static, newc_entry
from sealane.testing.machine import GuestMachine, Hardware, Workload
from sealane.testing.problems import RigError

READY: Final = "LAB READY"
SENTENCE: Final = b"pay 100 to alice"
NAME: Final = "root"
HARDWARE: Final = Hardware(memory_mib=160, devices=("-device", "VGA"))
# The places in the order of canaries.c's `enum place`; the last two are not canaries but parts of a document and of a key.
PLACES: Final = (
    "heap",
    "stack",
    "environment",
    "mapped file",
    "page cache of a closed file",
    "file in tmpfs",
    "pipe",
    "unix socket",
    "TCP socket",
    "input buffer of a terminal",
    "kernel keyring",
    "memory of an ended process",
    "kernel log",
    "System V message",
    "registers of a sleeping process",
    "name of a file",
)
READ: Final = "password typed and read by a program"
UNREAD: Final = "password typed and not read yet"
USERS: Final = frozenset((*PLACES[:4], READ))  # what lies in pages that a process has mapped
_DOCUMENT, _PEM, _TYPED = len(PLACES), len(PLACES) + 1, 1 << 20
_SOURCE: Final = Path(__file__).parents[1] / "guest" / "canaries.c"
_MASK: Final = (1 << 64) - 1


def _mixed(x: int) -> int:
    """splitmix64, as in canaries.c."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


@dataclass(frozen=True)
class Secrets:
    """All secrets of one guest, by its seed."""

    seed: int

    def word(self, number: int) -> str:
        """The sixteen digits of one of them."""
        return f"{_mixed((_mixed(self.seed) + number) & _MASK):016x}"

    @property
    def canaries(self) -> dict[str, str]:
        """Each place and what was planted there; the typed passwords are the last."""
        planted = {place: self.word(number) for number, place in enumerate(PLACES)}
        return planted | {READ: self.passwords[0], UNREAD: self.passwords[1]}

    @property
    def passwords(self) -> tuple[str, str]:
        """What is typed at the console: to log in, and behind that."""
        return self.word(_TYPED), self.word(_TYPED + 1)

    @property
    def document_word(self) -> str:
        """A word of the document that is open in a process."""
        return self.word(_DOCUMENT)

    @property
    def pem_line(self) -> str:
        """The first line of the private key that a process has loaded."""
        return "".join(self.word(_PEM + part * 256) for part in range(4))


@cache
def lab_initrd() -> Path:
    """The initramfs: canaries.c and a busybox that it maps."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise RigError("no busybox here: install the Debian package busybox-static")
    ingredients = [_SOURCE, Path(__file__), Path(busybox)]
    digest = sha256(b"".join(sha256(path.read_bytes()).digest() for path in ingredients)).hexdigest()
    return build_once(f"lab-{digest[:20]}", lambda made: _build(made, Path(busybox))) / "initrd.gz"


def _build(directory: Path, busybox: Path) -> None:
    archive = b"".join(
        (
            *(newc_entry(name, mode=stat.S_IFDIR | 0o755) for name in ("bin", "dev")),
            newc_entry("dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1)),
            newc_entry("init", mode=stat.S_IFREG | 0o755, data=compile_static(_SOURCE)),
            newc_entry("bin/busybox", mode=stat.S_IFREG | 0o755, data=busybox.read_bytes()),
            newc_entry("TRAILER!!!", mode=0),
        )
    )
    (directory / "initrd.gz").write_bytes(compress(archive, compresslevel=1, mtime=0))


@dataclass(frozen=True)
class LabWorkload(Workload):
    """The guest of guest/canaries.c. The root file system is ramfs: its files are page cache and nothing else."""

    seed: int = 1
    read_kib_per_s: int = 0

    @property
    def initrd(self) -> Path:
        """The guest's initramfs."""
        return lab_initrd()

    def command_line(self) -> str:
        """The kernel's command line that asks for it."""
        return (
            f"console=tty0 console=ttyS0 quiet panic=-1 rootfstype=ramfs lab.seed={self.seed:016x} lab.fill_mib={self.fill_mib} "
            f"lab.rewrite_kib_per_s={self.rewrite_kib_per_s} lab.read_kib_per_s={self.read_kib_per_s}"
        )


def new_seed() -> int:
    """A seed that nobody has had before."""
    return int.from_bytes(os.urandom(8), "big") | 1


def log_in(machine: GuestMachine, secrets: Secrets) -> None:
    """Types a name and two passwords at the guest's console, key by key, as a person would."""
    said = {"LAB LOGIN": NAME, "LAB PASSWORD": secrets.passwords[0], "LAB SUDO": secrets.passwords[1]}
    for prompt, words in said.items():
        machine.wait_for(prompt)
        with machine.observe() as monitor:
            for key in (*words, "ret"):
                monitor.execute("send-key", keys=[{"type": "qcode", "data": key}], hold_time=10)
    machine.wait_for("LAB TYPED")
