"""A guest that tells which of its frames are the user's, and how well a classifier does against that."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from gzip import compress
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sealane.guest import PAGE_BYTES, RamLayout
from sealane.testing.cache import build_once
from sealane.testing.guest.build import compile_static, newc_entry
from sealane.testing.machine import Workload
from sealane.testing.problems import RigError

READY: Final = "PAGES READY"
FAILED: Final = "PAGES FAILED"
HUGE_PROT_NONE: Final = "PAGES HUGE PROT_NONE"
_SOURCE: Final = Path(__file__).parent / "guest" / "pages.c"
_MAGIC: Final = b"SLPAGES1"


@cache
def pages_initrd() -> Path:
    """The initramfs with guest/pages.c as its only program."""
    digest = sha256(_SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    return build_once(f"pages-{digest[:20]}", _build) / "initrd.gz"


def _build(directory: Path) -> None:
    archive = b"".join(
        (
            newc_entry("dev", mode=stat.S_IFDIR | 0o755),
            newc_entry("dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1)),
            newc_entry("init", mode=stat.S_IFREG | 0o755, data=compile_static(_SOURCE)),
            newc_entry("TRAILER!!!", mode=0),
        )
    )
    (directory / "initrd.gz").write_bytes(compress(archive, compresslevel=1, mtime=0))


@dataclass(frozen=True)
class PagesWorkload(Workload):
    """The guest of guest/pages.c; `kernel` has more words for the kernel's command line."""

    huge_2m: int = 0
    huge_1g: int = 0
    high: bool = False
    kernel: str = ""

    @property
    def initrd(self) -> Path:
        """The guest's initramfs."""
        return pages_initrd()

    def command_line(self) -> str:
        """The kernel's command line that asks for it."""
        gibibytes = f" hugepagesz=1G hugepages={self.huge_1g}" if self.huge_1g else ""
        return (
            f"console=ttyS0 quiet panic=-1 secretmem.enable=1 pages.fill_mib={self.fill_mib} "
            f"pages.huge_2m={self.huge_2m} pages.huge_1g={self.huge_1g}{' pages.high=1' if self.high else ''}"
            f"{gibibytes} {self.kernel}"
        )


def truth_options(path: Path) -> list[str]:
    """QEMU's options that let the guest write what it knows into that file."""
    return ["-chardev", f"file,id=truth,path={path}", "-device", "isa-debugcon,iobase=0xe9,chardev=truth"]


def read_truth(said: bytes, layout: RamLayout) -> NDArray[np.bool_]:
    """Which pages of the layout processes map, as the guest has told; RigError where it was not heard to the end."""
    if not said.startswith(_MAGIC):
        raise RigError("the guest has told nothing of its pages")
    user = np.zeros(layout.page_count, np.bool_)
    numbers = _numbers(said[len(_MAGIC) :])
    at = 0
    while True:
        skipped, mapped = next(numbers, None), next(numbers, None)
        if skipped is None or mapped is None:
            raise RigError("the guest was cut short while it told of its pages")
        if not mapped:
            return user
        pages = layout.pages_of(np.arange(at + skipped, at + skipped + mapped))
        user[pages[pages >= 0]] = True
        at += skipped + mapped


def _numbers(said: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in said:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield value
            value = shift = 0


@dataclass(frozen=True)
class Score:
    """Pages that are the user's, those that were called so, and those that are both."""

    truth: int
    found: int
    both: int

    @property
    def recall(self) -> float:
        """The share of the user's pages that was found."""
        return self.both / max(1, self.truth)

    @property
    def precision(self) -> float:
        """The share of what was found that is the user's."""
        return self.both / max(1, self.found)

    def __str__(self) -> str:
        mib = self.truth * PAGE_BYTES >> 20
        return f"{self.truth} user pages ({mib} MiB), recall {self.recall:.5f}, precision {self.precision:.5f}"


def score(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> Score:
    """Compare; both by page number of the layout."""
    return Score(*(int(np.count_nonzero(each)) for each in (truth, found, truth & found)))
