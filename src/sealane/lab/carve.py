"""What somebody takes out of captured memory: screens, logins, keys, documents, pictures, strings.

Everything is found by what it looks like; nothing is told where to look. Answers are bounded in number and length.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from sealane.lab.sight import Pages, Sight

FOUND_MAX: Final = 200
_VGA_COLUMNS: Final = 80
_VGA_CELLS: Final = 16384
# a beginning to look for, and what must follow there
_PEM: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]{3,40})-----\s[A-Za-z0-9+/=\s]{40,8000}?-----END \1-----")
_ASSIGNED: Final = re.compile(
    rb"(?i)(passw(?:or)?d|pass phrase|passphrase|secret|token|api_?key)(?: (?:was|is))?\s?[=: ]\s?([!-~]{8,80})"
)
_ASSIGNING: Final = (
    b"assword",
    b"ASSWORD",
    b"asswd",
    b"ass phrase",
    b"assphrase",
    b"ecret=",
    b"ECRET=",
    b"oken=",
    b"OKEN=",
    b"api_key",
    b"API_KEY",
)
_FILES: Final = {
    "PDF": (b"%PDF-1.", re.compile(rb"%PDF-1\.\d")),
    "PNG": (b"\x89PNG\r\n\x1a\n", re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR", re.DOTALL)),
    "JPEG": (b"\xff\xd8\xff", re.compile(rb"\xff\xd8\xff[\xe0\xe1]..(?:JFIF|Exif)\0", re.DOTALL)),
    "SQLite": (b"SQLite format 3\0", re.compile(rb"SQLite format 3\0")),
    "ELF program": (b"\x7fELF", re.compile(rb"\x7fELF[\x01\x02]\x01\x01.{9}[\x02\x03]\0", re.DOTALL)),
}
_SENTENCE: Final = re.compile(rb"[A-Z][a-z]+(?: [a-z,;]+){6,}")
_NAME: Final = re.compile(rb"[a-z_][a-z0-9_-]{1,31}\n")
_TYPED: Final = re.compile(rb"[!-~]{6,64}\n")
_DOCUMENT_MIN, _DOCUMENT_MAX, _STRING_MIN = 400, 65536, 8
_IS_TEXT: Final = np.isin(np.arange(256), [9, 10, 13, *range(32, 127)])
_PIECE: Final = 1 << 24


@dataclass
class Carved:
    """What was found, each thing once. Screens are lines of text; logins are (name, password)."""

    screens: list[list[str]] = field(default_factory=list)
    logins: list[tuple[str, str]] = field(default_factory=list)
    passwords: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    strings: int = 0
    found: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all was found."""
        return not (
            self.screens
            or self.logins
            or self.passwords
            or self.keys
            or self.documents
            or self.files
            or any(self.found.values())
        )


def carve(sight: Sight, *, wanted: Iterable[bytes] = (), extra: Iterable[tuple[str, Pages]] = ()) -> Carved:
    """All that is found in a capture; `extra` are more pages to look into, such as those that were decoded.

    `wanted` are strings to look for: `found` says for each where it stands.
    """
    carved = Carved(found={needle.decode(errors="replace"): [] for needle in wanted})
    for name, pages in sight.memory.items():
        if "vga" in name and (screen := read_screen(pages)):
            carved.screens.append(screen)
    stacks: list[tuple[str, bytes]] = [(where, _without_zero_pages(pages)) for where, pages in _pages(sight, extra)]
    has_pages = bool(stacks)
    stacks += [("wire", flow) for flow in sight.flows]
    for where, data in stacks:
        for needle, places in carved.found.items():
            if where not in places and needle.encode() in data:
                places.append(where)
        # the same pages stand in the flows again
        if where != "wire" or not has_pages:
            _carve_into(data, carved)
    return carved


def _pages(sight: Sight, extra: Iterable[tuple[str, Pages]]) -> Iterator[tuple[str, Pages]]:
    for name, pages in sight.memory.items():
        yield f"memory {name}", pages
    if len(sight.clear):
        yield "pages in clear", sight.clear
    yield from extra


def _without_zero_pages(pages: Pages) -> bytes:
    return pages[pages.any(axis=1)].tobytes()


def _carve_into(data: bytes, carved: Carved) -> None:
    for at in _places(data, b"-----BEGIN "):
        if match := _PEM.match(data, at):
            _add(carved.keys, match[0].decode())
    for anchor in _ASSIGNING:
        for at in _places(data, anchor):
            if match := _ASSIGNED.search(data, max(at - 8, 0), at + 120):
                _add(carved.passwords, f"{match[1].decode()}: {match[2].decode()}")
    for kind, (anchor, pattern) in _FILES.items():
        count = sum(1 for at in _places(data, anchor) if pattern.match(data, at))
        if count:
            carved.files[kind] = carved.files.get(kind, 0) + count
    for begin in range(0, len(data), _PIECE):
        _carve_text(data[begin : begin + _PIECE], carved)


def _places(data: bytes, anchor: bytes) -> Iterator[int]:
    at = data.find(anchor)
    while at >= 0:
        yield at
        at = data.find(anchor, at + 1)


def _carve_text(data: bytes, carved: Carved) -> None:
    """Strings, documents and typed lines, among the runs of text."""
    is_text = _IS_TEXT[np.frombuffer(data, np.uint8)]
    edges = np.flatnonzero(np.diff(is_text, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    lengths = ends - starts
    carved.strings += int(np.count_nonzero(lengths >= _STRING_MIN))
    for run in np.flatnonzero((lengths >= _DOCUMENT_MIN) & (lengths <= _DOCUMENT_MAX)).tolist():
        text = data[starts[run] : ends[run]]
        if len(_SENTENCE.findall(text)) >= 3:
            _add(carved.documents, text.decode())
    # a terminal keeps the lines that were typed: a name, and a password behind it, of which nothing was shown
    is_line = (lengths >= 7) & (lengths <= 65) & (np.frombuffer(data, np.uint8)[ends - 1] == 10)
    for run in np.flatnonzero(is_line & (np.append(starts[1:], len(data)) - ends >= 128)).tolist():
        before = run - 1
        if before < 0 or starts[run] - ends[before] > 128 or any(data[ends[before] : starts[run]]):
            continue
        name, typed = data[starts[before] : ends[before]], data[starts[run] : ends[run]]
        login = (name[:-1].decode(), typed[:-1].decode())
        if (
            _NAME.fullmatch(name)
            and _TYPED.fullmatch(typed)
            and login not in carved.logins
            and len(carved.logins) < FOUND_MAX
        ):
            carved.logins.append(login)


def _add(into: list[str], found: str) -> None:
    if found not in into and len(into) < FOUND_MAX:
        into.append(found)


def read_screen(vram: Pages) -> list[str]:
    """A VGA text screen from video memory: character and attribute lie in planes 0 and 1, of four bytes each cell.

    Empty where the memory holds no text: much of it must be printable, and most of it of one colour.
    """
    cells = vram.reshape(-1)[: _VGA_CELLS * 4]
    characters, attributes = cells[0::4], cells[1::4]
    count = len(characters) // _VGA_COLUMNS * _VGA_COLUMNS
    text, colour = characters[:count], attributes[:count]
    is_shown = (text >= 32) & (text < 127) & (colour != 0)
    # a screen is written in few colours
    if (
        not count
        or np.bincount(colour).max() < count // 2
        or np.count_nonzero(is_shown) < count // 4
        or np.count_nonzero(is_shown & (text != 32)) < 8
    ):
        return []
    rows = np.where(is_shown, text, 32).astype(np.uint8).reshape(-1, _VGA_COLUMNS)
    lines = [row.tobytes().decode().rstrip() for row in rows]
    while lines and not lines[-1]:
        lines.pop()
    return lines
