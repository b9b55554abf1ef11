"""`sealane inspect`: looks at a VM from outside."""

import base64
import struct
import zlib
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from numpy.typing import NDArray

from sealane.cli import format as words
from sealane.cli.client import AgentClient
from sealane.cli.completion import vm_names
from sealane.cli.output import Output, command
from sealane.errors import HostError, InternalError
from sealane.host.models import PageMap

app = typer.Typer(rich_markup_mode=None, add_completion=False, help="Look at a VM from outside.")

_PAGE_BYTES: Final = 4096
_ASK_TIMEOUT_S: Final = 180.0
# Pages a row: a row of the map is 4 MiB of guest memory.
_ROW_PAGES: Final = 1024
# The classes' colours (red, green, blue) in the order of their numbers, and what lies beyond a block's end.
_PALETTE: Final = bytes((120, 120, 120, 236, 236, 232, 52, 101, 164, 214, 88, 32, 255, 255, 255))
_BEYOND: Final = 4
_ABOUT: Final = {
    "user": "reachable by a process",
    "kernel": "all else that holds something",
    "free": "zeros, or never touched",
    "other": "firmware and devices",
}


@app.callback()
def inspect() -> None:
    """Look at a VM from outside.

    \b
    Example:
      sealane inspect pages web01
    """


@app.command()
@command
def pages(
    vm: Annotated[str, typer.Argument(metavar="VM", help="The VM's name.", autocompletion=vm_names)],
    *,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Draw a map of guest memory, coloured by class.")
    ] = None,
    out: Output,
) -> None:
    """Tell what the pages of a running VM's memory are: a process's, the kernel's, free, or firmware's.

    A short-lived enclave reads the guest's page tables from outside; the agent sees counts, no page. The VM runs on. x86-64
    guests in 64-bit mode are understood. Pages of the page cache count as the kernel's unless a process maps them, and so
    does what was freed and not wiped.

    \b
    Examples:
      sealane inspect pages web01
      sealane inspect pages web01 --png web01.png
      sealane inspect pages web01 --json | jq .counts.user
    """
    with AgentClient(timeout_s=_ASK_TIMEOUT_S) as agent:
        found = agent.pages(vm, with_classes=png is not None)
    if png is not None:
        _draw(found, png)
    out.object(found.model_dump(mode="json", exclude={"blocks": {"__all__": {"classes"}}}))
    counts = found.counts.model_dump()
    total = sum(counts.values()) or 1
    out.table(
        ["PAGES", "NUMBER", "MEMORY", "SHARE", "WHAT THEY ARE"],
        [
            [
                name,
                str(counts[name]),
                words.memory_bytes(counts[name] * _PAGE_BYTES),
                f"{counts[name] / total:.1%}",
                about,
            ]
            for name, about in _ABOUT.items()
        ],
    )
    if found.processes:
        out.line(f"{found.processes} top-level page tables, {found.tables} tables in all")
    else:
        out.line("no page table was found: firmware, a 32-bit guest, or one that is not understood")
    if png is not None:
        out.line(
            f"✓ {png}: a pixel a page, {words.memory_bytes(_ROW_PAGES * _PAGE_BYTES)} a row; orange user, blue kernel, pale free"
        )


def _draw(found: PageMap, path: Path) -> None:
    rows = [_rows(_classes(block.classes, block.pages)) for block in found.blocks]
    picture = np.concatenate(rows) if rows else np.zeros((0, _ROW_PAGES), np.uint8)
    try:
        path.write_bytes(encode_png(picture, _PALETTE))
    except OSError as error:
        raise HostError("host.permission", f"{path}: {error.strerror}") from error


def _classes(text: str | None, count: int) -> NDArray[np.uint8]:
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(text or "", validate=True), count + 1)
    except (ValueError, zlib.error):
        raw = b""
    if len(raw) != count:
        raise InternalError("internal.error", "the agent's classes do not fit")
    return np.minimum(np.frombuffer(raw, np.uint8), _BEYOND)


def _rows(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    padded = np.full(-(-len(classes) // _ROW_PAGES) * _ROW_PAGES, _BEYOND, np.uint8)
    padded[: len(classes)] = classes
    return padded.reshape(-1, _ROW_PAGES)


def encode_png(picture: NDArray[np.uint8], palette: bytes) -> bytes:
    """A PNG of (rows, columns) palette indices, at least one row; `palette` is red, green, blue for each (RFC 2083)."""
    rows = max(1, picture.shape[0])
    lines = np.zeros((rows, picture.shape[1] + 1), np.uint8)  # each begins with its filter: none
    lines[: picture.shape[0], 1:] = picture
    header = struct.pack(">IIBBBBB", picture.shape[1], rows, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
