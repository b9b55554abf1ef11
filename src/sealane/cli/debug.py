"""`sealane debug`: looks into what Sealane carries."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
import zstandard

from sealane.cli import format as words
from sealane.cli.output import Output, command
from sealane.errors import UsageError, WireError
from sealane.wire import MultifdReader, RamRebuild, Reader, ReturnPathReader, StreamReader, reader_for
from sealane.wire.core import iterate_events
from sealane.wire.events import Event
from sealane.wire.order import in_order
from sealane.wire.rebuild import BlockDigest
from sealane.wire.sniff import SNIFF_BYTES
from sealane.wire.summary import StreamSummary

app = typer.Typer(rich_markup_mode=None, add_completion=False, help="Look into what Sealane carries.")

_CHUNK = 1 << 20
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_KINDS: dict[type[Reader], str] = {
    StreamReader: "main",
    MultifdReader: "multifd",
    ReturnPathReader: "return path",
}


@app.callback()
def debug() -> None:
    """Look into what Sealane carries.

    \b
    Example:
      sealane debug explain-stream main.bin channel-0.bin channel-1.bin
    """


@app.command()
@command
def explain_stream(
    *,
    out: Output,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="The connections of one migration, the main channel first.")
    ],
    ram_digest: Annotated[
        bool, typer.Option("--ram-digest", help="Apply every record in order; show each RAM block's SHA-256.")
    ] = False,
) -> None:
    """Tell what a recorded migration stream of QEMU holds.

    Each FILE is what one connection carried in one direction, as recorded (or compressed with zstd): the main channel first,
    then the multifd channels, in any order, and postcopy's preempt channel. The return path may be among them.

    The main channel is sections. RAM comes first: START lists the blocks, PART repeats as pages change, END is the rest
    while the VM stands still. Devices follow. Pages are normal (4096 bytes), zero (one byte), xbzrle (what changed) or
    compressed. An iteration is one pass over the pages that changed.

    With --ram-digest compare the SHA-256 with the source's memory: they are equal when nothing was lost. QEMU can record a
    stream itself, with `migrate "exec:cat > main.bin"` in its monitor.

    \b
    Examples:
      sealane debug explain-stream main.bin
      sealane debug explain-stream main.bin channel-0.bin channel-1.bin --ram-digest
      sealane debug explain-stream main.bin --json | jq .pages
    """
    connections = [_Connection.open(path) for path in files]
    summary = StreamSummary()
    rebuild = RamRebuild() if ram_digest else None
    problem: WireError | None = None
    try:
        for number, event in _in_order(connections):
            summary.add(event, connection=number)
            if rebuild is not None:
                rebuild.apply(event, connection=number)
    except WireError as error:
        problem = error
    except zstandard.ZstdError as error:
        raise UsageError("usage.argument", f"a file does not decompress: {error}") from error
    digests = rebuild.digests() if rebuild is not None else []
    unreadable = rebuild.unreadable_pages if rebuild is not None else 0
    out.object(_as_dict(summary, connections, digests, problem, unreadable))
    if not out.as_json:
        _print(out, summary, connections, digests, unreadable)
    if problem is not None:
        raise problem


@dataclass
class _Connection:
    """One file: what kind of connection it is, and its bytes in pieces."""

    path: Path
    kind: str
    reader: Reader | None
    pieces: Iterator[bytes]
    size: int = 0

    @classmethod
    def open(cls, path: Path) -> "_Connection":
        try:
            pieces = _pieces(path.open("rb"))
            first = b""
            for piece in pieces:
                first += piece
                if len(first) >= SNIFF_BYTES:
                    break
        except OSError as error:
            raise UsageError("usage.argument", f"{path}: {error.strerror or error}") from error
        except zstandard.ZstdError as error:
            raise UsageError("usage.argument", f"{path} does not decompress: {error}") from error
        if len(first) < SNIFF_BYTES:
            return cls(path, "empty" if not first else "cut short", None, iter([first]), len(first))
        reader = reader_for(first)
        return cls(path, _KINDS.get(type(reader), "preempt"), reader, _chain(first, pieces))

    def events(self) -> Iterator[Event]:
        """The connection's events; an error names the file."""
        if self.reader is None:
            return iter(())
        return iterate_events(self.reader, self._counted())

    def _counted(self) -> Iterator[bytes]:
        for piece in self.pieces:
            self.size += len(piece)
            yield piece


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        begin = file.read(4)
        file.seek(0)
        source: Any = file
        if begin == _ZSTD_MAGIC:
            source = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        while piece := source.read(_CHUNK):
            yield piece


def _in_order(connections: list[_Connection]) -> Iterator[tuple[int, Event]]:
    """All events; a connection's number is its place in the order of `in_order`."""
    mains = [connection for connection in connections if connection.kind == "main"]
    if len(mains) > 1:
        raise UsageError("usage.argument", f"{mains[1].path} is a main channel too: files of one migration, please")
    channels = [connection.events() for connection in connections if connection.kind == "multifd"]
    rest = [one for one in connections if one.kind in ("preempt", "return path")]
    others = [one.events() for one in sorted(rest, key=lambda one: one.kind == "return path")]
    return in_order(mains[0].events() if mains else iter(()), channels, others)


def _as_dict(
    summary: StreamSummary,
    connections: list[_Connection],
    digests: list[BlockDigest],
    problem: WireError | None,
    unreadable: int,
) -> dict[str, Any]:
    told = summary.as_dict()
    for digest in digests:
        block = next(one for one in told["blocks"] if one["name"] == digest.name)
        block.update(sha256=digest.sha256, pages_received=digest.pages_received)
    error = None
    if problem is not None:
        error = {**problem.as_dict(), "offset": problem.offset, "section": problem.section}
    files = [{"file": str(one.path), "kind": one.kind, "bytes": one.size} for one in connections]
    return {"files": files, **told, "unreadable_pages": unreadable, "error": error}


def _print(
    out: Output, summary: StreamSummary, connections: list[_Connection], digests: list[BlockDigest], unreadable: int
) -> None:
    told = summary.as_dict()
    out.table(
        ["file", "connection", "bytes"],
        [[str(one.path), one.kind, words.network_bytes(one.size)] for one in connections],
    )
    out.line()
    if summary.machine:
        out.line(f"machine     {summary.machine}")
    if summary.capabilities:
        out.line(f"both need   {', '.join(summary.capabilities)}")
    kinds = [f"{count} {kind}" for kind, count in told["pages"].items() if count]
    passes = f" in {summary.iterations} iteration{'s' * (summary.iterations != 1)}" if kinds else ""
    out.line(f"pages       {', '.join(kinds) or 'none'}{passes}")
    if summary.commands:
        out.line(f"commands    {_counted(summary.commands)}")
    if summary.messages:
        out.line(f"return path {_counted(summary.messages)}")
    out.line()
    _print_blocks(out, summary, digests)
    _print_sections(out, summary)
    for channel in summary.channels.values():
        out.line(
            f"channel {channel.channel}: {channel.packets} packets, {channel.syncs} syncs, {channel.normal_pages} normal and "
            f"{channel.zero_pages} zero pages, compression {', '.join(sorted(channel.compression)) or 'none'}"
        )
    _print_devices(out, summary)
    if unreadable:
        out.line(f"! {unreadable} pages are compressed in a way that cannot be read here: the digests lack them")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(name if count == 1 else f"{name} x {count}" for name, count in counts.items())


def _print_blocks(out: Output, summary: StreamSummary, digests: list[BlockDigest]) -> None:
    digest_of = {digest.name: digest for digest in digests}
    rows = []
    for block in summary.blocks.values():
        row = [block.name, words.memory_bytes(block.length), str(block.normal_pages), str(block.zero_pages)]
        row.append(str(block.xbzrle_pages + block.compressed_pages))
        if digests:
            digest = digest_of.get(block.name)
            row.append("no page of it was sent" if digest is None or not digest.pages_received else digest.sha256)
        rows.append(row)
    if rows:
        heads = ["RAM block", "size", "normal", "zero", "other", *(["SHA-256"] if digests else [])]
        out.table(heads, rows)
        out.line()


def _print_sections(out: Output, summary: StreamSummary) -> None:
    for section in summary.sections.values():
        if "FULL" in section.parts:
            continue  # the first device; all of them are told below
        parts = ", ".join(f"{count} {kind}" for kind, count in section.parts.items())
        out.line(f"section {section.id} {section.name}: {parts}")


def _print_devices(out: Output, summary: StreamSummary) -> None:
    walk = summary.walk_devices()
    state = sum(device.state_bytes for device in walk.devices)
    if walk.devices:
        out.line(f"devices: {len(walk.devices)} with {words.network_bytes(state)} of state")
        for device in walk.devices:
            out.detail(f"  {device.name}: {device.state_bytes} bytes")
    if walk.why_not and summary.opaque:
        out.line(f"devices are not told apart: {walk.why_not}")
    for reason, count in summary.opaque.items():
        out.line(f"carried as it is: {words.network_bytes(count)}, {reason}")
