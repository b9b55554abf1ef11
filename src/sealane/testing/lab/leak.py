"""The leak meter: which of the planted secrets can be read from the wire, under each way to move the guest."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from sealane.lab.carve import Carved, carve
from sealane.lab.cracking import Broken, break_codec, known_header, repeats
from sealane.lab.sight import PAGE_BYTES, Pages
from sealane.seal.protect import codec_name
from sealane.testing.lab.guest import USERS
from sealane.testing.lab.stage import WAYS, Stage, Take, way_name
from sealane.testing.problems import RigError

Cell: TypeAlias = Literal["read", "decoded", "-"]
CELLS: Final[dict[Cell, str]] = {
    "read": "stands in the capture as it is",
    "decoded": "found in pages that `lab break` decoded",
    "-": "not found",
}
Say: TypeAlias = Callable[[str], None]


@dataclass
class Breaking:
    """What cryptanalysis made of one capture, and how much of it is true: decoded pages that stand in the guest's memory."""

    way: str
    codec: str
    coded_pages: int
    pages_used: int
    seconds: float
    key: dict[str, Any]
    how: list[str]
    right_pages: int = 0
    repeated_pages: int = 0
    enough_pages: int = 0
    header_key: tuple[int, int] | None = None

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.coded_pages:
            return "no encoded pages in the capture: nothing to attack"
        if not self.key:
            return "not broken"
        return f"broken: {self.right_pages} of {self.coded_pages} pages decode to pages of the guest's memory"


@dataclass
class LeakTable:
    """Rows are places, columns ways. `planted` says whether the secret stood in guest memory before the first move."""

    planted: dict[str, bool] = field(default_factory=dict)
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    captured_bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    clear_pages: dict[str, int] = field(default_factory=dict)
    coded_pages: dict[str, int] = field(default_factory=dict)
    carved: dict[str, Carved] = field(default_factory=dict)
    breaking: list[Breaking] = field(default_factory=list)
    document: dict[str, Cell] = field(default_factory=dict)
    key: dict[str, Cell] = field(default_factory=dict)

    def count(self, way: str, *, place: Callable[[str], bool] = lambda place: True) -> int:
        """How many of the secrets can be read under that way."""
        return sum(row[way] != "-" for name, row in self.cells.items() if place(name))

    @property
    def premise(self) -> str:
        """The papers' premise, that secrets live in user pages, judged by what `selective` leaves readable."""
        if "selective" not in next(iter(self.cells.values()), {}):
            return "not judged: `selective` was not measured"
        outside = [name for name in self.cells if name not in USERS]
        read = self.count("selective", place=lambda place: place not in USERS)
        kept = self.count("selective", place=lambda place: place in USERS)
        return (
            f"The premise fails: with every user page encrypted (`selective`), {read} of {len(outside)} secrets that lie outside "
            f"of user pages are read, and {kept} of {len(self.cells) - len(outside)} in user pages."
            if read
            else "The premise was not refuted by this run."
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; what was carved only in numbers."""
        told = asdict(self)
        told["carved"] = {way: summary(carved) for way, carved in self.carved.items()}
        return told | {"premise": self.premise}


def summary(carved: Carved) -> dict[str, Any]:
    """What was carved, in numbers."""
    return {
        "screens": len(carved.screens),
        "logins": len(carved.logins),
        "passwords": len(carved.passwords),
        "private keys": len(carved.keys),
        "documents": len(carved.documents),
        "files": dict(carved.files),
        "strings": carved.strings,
    }


def measure(stage: Stage, *, ways: Sequence[str] = WAYS, say: Say = print, is_thorough: bool = True) -> LeakTable:
    """Move the guest in each way, and read what can be read.

    Without `is_thorough` only `plain` and `sealed` are carved, and it is not tried with how few pages a key could be had.
    """
    table = LeakTable()
    canaries = stage.secrets.canaries
    table.cells = {place: {} for place in canaries}
    for way in ways:
        take = stage.move(way, dump=True)
        if not take.completed:
            raise RigError(f"{way_name(way)}: the guest did not arrive: {take.problem}")
        stage.wait_ticks(1)
        _read(table, stage, take, is_thorough=is_thorough)
        say(
            f"{way_name(way):10} {take.seconds:5.1f} s, {table.captured_bytes[way] / 1e6:6.1f} MB captured: "
            f"{table.count(way)} of {len(canaries)} secrets read"
        )
    return table


def _read(table: LeakTable, stage: Stage, take: Take, *, is_thorough: bool) -> None:
    way, sight = take.way, take.sight
    memory = _filled_pages(take)
    decoded = _attack(table, take, memory, is_thorough=is_thorough)
    for place, secret in stage.secrets.canaries.items():
        if len(table.captured_bytes) < 1:
            table.planted[place] = secret.encode() in memory
        table.cells[place][way] = find(take, decoded, secret)
    table.document[way] = find(take, decoded, stage.secrets.document_word)
    table.key[way] = find(take, decoded, stage.secrets.pem_line)
    table.captured_bytes[way], table.seconds[way] = sight.total_bytes, round(take.seconds, 2)
    table.clear_pages[way], table.coded_pages[way] = len(sight.clear), len(sight.coded)
    if is_thorough or way in ("plain", "sealed"):
        table.carved[way] = carve(sight, extra=[("decoded pages", decoded)] if len(decoded) else [])


def _filled_pages(take: Take) -> bytes:
    """The guest's memory before the move, without pages of zeros; the file goes."""
    if take.memory_before is None:
        return b""
    pages = np.fromfile(take.memory_before, np.uint8).reshape(-1, PAGE_BYTES)
    take.memory_before.unlink()
    return pages[pages.any(axis=1)].tobytes()


def find(take: Take, decoded: Pages, secret: str) -> Cell:
    """Whether the secret stands in the capture, or in what was decoded of it.

    Pages in clear are looked through beside the flows: they may have crossed in compressed records.
    """
    needle = secret.encode()
    if any(needle in flow for flow in take.sight.flows) or needle in take.clear_bytes:
        return "read"
    return "decoded" if len(decoded) and needle in decoded.tobytes() else "-"


def _attack(table: LeakTable, take: Take, memory: bytes, *, is_thorough: bool) -> Pages:
    """Breaks the codec of the way, if it has one; gives the decoded pages."""
    codec = codec_name(take.way) if take.way not in ("plain", "tls") else None
    if codec is None and take.way != "sealed":
        return np.empty((0, PAGE_BYTES), np.uint8)
    told, decoded = attack(take, codec or "hrt", memory, is_thorough=is_thorough)
    table.breaking.append(told)
    return decoded


def attack(take: Take, codec: str, memory: bytes, *, is_thorough: bool = True) -> tuple[Breaking, Pages]:
    """One attack on a capture, verified with what the guest's memory was when the move began."""
    pages = take.sight.coded
    started = time.monotonic()
    broken = break_codec(codec, pages)
    told = Breaking(
        take.way, codec, len(pages), broken.pages_used, round(time.monotonic() - started, 2), broken.key, broken.how
    )
    told.repeated_pages = repeats(pages)
    if codec == "hrt" and len(pages):
        told.header_key = known_header(pages)
    decoded = broken.decode(pages) if broken.is_broken else np.empty((0, PAGE_BYTES), np.uint8)
    if len(decoded) and memory:
        true = pages_of(memory)
        told.right_pages = sum(page.tobytes() in true for page in decoded)
        told.enough_pages = _enough(codec, pages, broken) if is_thorough else 0
    return told, decoded


def pages_of(memory: bytes) -> frozenset[bytes]:
    """Every page of the guest's memory."""
    return frozenset(memory[at : at + PAGE_BYTES] for at in range(0, len(memory), PAGE_BYTES))


def _enough(codec: str, pages: Pages, whole: Broken) -> int:
    """How few of the pages, chosen at random, give the same key: halved as long as they do."""
    order = np.random.default_rng(len(pages)).permutation(len(pages))
    count = len(pages)
    while count > 1 and break_codec(codec, pages[order[: count // 2]]).key == whole.key:
        count //= 2
    return count
