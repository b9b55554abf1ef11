"""In which line of a JSON or TOML file a value stands: the parsers keep no positions, and people mend lines."""

import json
import re
from collections.abc import Sequence
from typing import Final

_DECODER: Final = json.JSONDecoder()
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_HEADER: Final = re.compile(r"\s*(\[\[?)([^\[\]]+)\]")
_KEY: Final = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")


def line_of(text: str, location: Sequence[str | int]) -> int:
    """The line (from 1) of the value at `location`, or of the innermost thing around it; `text` is JSON or TOML that was parsed."""
    if text.lstrip().startswith("{"):
        return 1 + text.count("\n", 0, _json_position(text, location))
    return _toml_line(text, location)


def _json_position(text: str, location: Sequence[str | int]) -> int:
    at = _skip(text, 0)
    for part in location:
        found = _inside(text, at, part)
        if found is None:
            break
        at = found
    return at


def _inside(text: str, at: int, wanted: str | int) -> int | None:
    """Where the member or element `wanted` of the object or list at `at` begins."""
    if text[at] not in "{[":
        return None
    is_object, at, index = text[at] == "{", _skip(text, at + 1), 0
    while text[at] not in "}]":
        key: str | int = index
        if is_object:
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # behind the colon
        begin = at
        if key == wanted:
            return begin
        _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        at = _skip(text, at + 1) if text[at] == "," else at
        index += 1
    return None


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _toml_line(text: str, location: Sequence[str | int]) -> int:
    names = [part for part in location if isinstance(part, str)]
    index = next((part for part in location if isinstance(part, int)), 0)
    table: list[str] = []
    depth, line, seen = 0, 1, 0
    for number, each in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(each):
            table = path = _names(header[2])
            if header[1] == "[[" and path == names[: len(path)]:
                seen += 1
                if seen - 1 != index:
                    table = ["", *table]  # another one of the array: nothing in it is meant
                    continue
        elif key := _KEY.match(each):
            path = [*table, *_names(key[1])]
        else:
            continue
        if len(path) > depth and path == names[: len(path)]:
            depth, line = len(path), number
    return line


def _names(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]
