"""`sealane lab`: the attacker's tools, on captures and on hosts that are simulated for them."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import typer

from sealane.cli import format as words
from sealane.cli.output import Output, command
from sealane.errors import UsageError
from sealane.lab.carve import Carved, carve
from sealane.lab.cracking import Broken, break_codec, repeats
from sealane.lab.pcap import Conversation, read_capture
from sealane.lab.sight import Sight, look

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)

Way = Literal["plain", "tls", "sealed", "selective", "shift", "affine", "hrt", "rc4"]
CaptureFile = Annotated[
    Path | None,
    typer.Argument(metavar="[CAPTURE]", help="A capture file (pcap, pcapng); without one, a migration is simulated."),
]
WayOrAll = Literal["plain", "tls", "sealed", "selective", "shift", "affine", "hrt", "rc4", "all"]
WayOption = Annotated[
    WayOrAll,
    typer.Option("--way", help="Without CAPTURE: how the guest is moved, or all. plain and tls are QEMU's own ways."),
]
PortOption = Annotated[int | None, typer.Option("--port", metavar="N", help="Only connections to that TCP port.")]
NOTHING: Final = 1


@app.callback()
def lab() -> None:
    """Attack migrations, as somebody on the network would: captures, and hosts simulated on this machine.

    \b
    What can be learnt, and by which command:
      who talks, and what is open     sniff [CAPTURE]
      what memory gives away          carve [CAPTURE], leak
      is the encoding any good        break [CAPTURE]
      what if somebody meddles        tamper, truncate, replay, redirect, flood, downgrade

    CAPTURE is a file: pcap or pcapng, of tcpdump -w or Wireshark. Without one, and for the others, two hosts and a guest with
    planted secrets are simulated here, moved by QEMU itself (plain, tls) or under a protection of Sealane's, and overheard.
    The lab attaches to no network but that of the hosts that it simulates; there is no option that names an interface or a host.

    \b
    Begin with:
      sealane lab carve --way plain       the guest's screen, passwords, a key, a document
      sealane lab carve --way all         the same eavesdropper, on every way to move the guest
      sealane lab tamper                  every way to move a guest, under the same man in the middle
    """


def _experiments() -> Any:
    # above the command line in the order of the rooms; loaded by name, and only when it is wanted, as for `demo`
    return importlib.import_module("sealane.testing.lab.experiments")


def _overheard(
    capture: Path | None, way: str, port: int | None, out: Output
) -> Iterator[tuple[str, list[Conversation]]]:
    """The capture; or a guest's move in that way, or in all, each with its name."""
    if capture is not None:
        yield "", read_capture(capture, port=port)
        return
    ways = list(get_args(Way)) if way == "all" else [way]
    out.line(f"No capture is named: a guest is moved between two simulated hosts ({', '.join(ways)}), and overheard.")
    for name, conversations in _experiments().overheard(ways):
        if len(ways) > 1:
            out.line()
            out.line(f"== {name}")
        yield name, conversations


def _below(directory: Path, way: str, asked: str) -> Path:
    """Where files of this way go: below the directory itself, unless there are several ways."""
    return directory / way if asked == "all" and way else directory


@app.command()
@command
def sniff(
    capture: CaptureFile = None,
    *,
    out: Output,
    way: WayOption = "plain",
    port: PortOption = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="DIR", help="Write each connection's bytes into files there.")
    ] = None,
) -> None:
    """Tell which connections a capture holds, and what of them is open to read.

    \b
    Examples:
      sealane lab sniff wire.pcap
      sealane lab sniff --way sealed
      sealane lab sniff wire.pcap --write flows
    """
    for name, conversations in _overheard(capture, way, port, out):
        _tell_connections(out, name, conversations)
        if write is not None:
            _write_flows(conversations, _below(write, name, way))


def _tell_connections(out: Output, way: str, conversations: list[Conversation]) -> None:
    sight = look(conversations)
    connections: list[dict[str, Any]] = [
        {
            "client": _endpoint(each.client),
            "server": _endpoint(each.server),
            "kind": kind,
            "to_server_bytes": len(each.forward.data),
            "to_client_bytes": len(each.back.data),
            "gaps": each.forward.gaps + each.back.gaps,
        }
        for each, (kind, _) in zip(conversations, sight.kinds, strict=True)
    ]
    out.object({"type": "sniff", "way": way or None, "connections": connections, **_open_part(sight)})
    heads = ["client", "server", "what it is", "to server", "to client", "gaps"]
    sizes = ("to_server_bytes", "to_client_bytes")
    rows = [
        [
            each["client"],
            each["server"],
            each["kind"],
            *(words.network_bytes(each[name]) for name in sizes),
            str(each["gaps"]),
        ]
        for each in connections
    ]
    out.table(heads, rows)
    for name, value in _open_part(sight).items():
        out.line(f"{name.replace('_', ' ')}: {value}")


def _endpoint(endpoint: tuple[str, int]) -> str:
    return f"{endpoint[0]}:{endpoint[1]}"


def _open_part(sight: Sight) -> dict[str, Any]:
    return {
        "memory_blocks": {name: len(pages) * 4096 for name, pages in sight.memory.items()},
        "pages_in_clear": len(sight.clear),
        "pages_encoded": len(sight.coded),
        "sealed_bytes": sum(lane.sealed_bytes for lane in sight.lanes),
        "problem": sight.problem,
    }


def _write_flows(conversations: list[Conversation], directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number, each in enumerate(conversations):
            (directory / f"{number}-forward.bin").write_bytes(each.forward.data)
            (directory / f"{number}-back.bin").write_bytes(each.back.data)
    except OSError as error:
        raise UsageError("usage.argument", f"{directory}: {error.strerror}") from error


@app.command("carve")
@command
def carve_command(
    capture: CaptureFile = None,
    *,
    out: Output,
    way: WayOption = "plain",
    port: PortOption = None,
    find: Annotated[
        list[str] | None, typer.Option("--find", metavar="TEXT", help="Also look for this; may be repeated.")
    ] = None,
    memory: Annotated[
        Path | None, typer.Option("--memory", metavar="DIR", help="Write the pages that were read into files there.")
    ] = None,
) -> None:
    """Take out of a capture what memory holds: screens, logins, passwords, keys, documents, files.

    Exits with 0 when something was found, and with 1 when nothing was.

    \b
    Examples:
      sealane lab carve wire.pcap
      sealane lab carve wire.pcap --find "eleven million" --memory pages
      sealane lab carve --way sealed
    """
    wanted, is_empty = [text.encode() for text in find or []], True
    for name, conversations in _overheard(capture, way, port, out):
        sight = look(conversations)
        carved = carve(sight, wanted=wanted)
        if memory is not None:
            _write_pages(sight, _below(memory, name, way))
        _tell_carved(out, name, carved)
        is_empty &= carved.is_empty
    raise typer.Exit(NOTHING if is_empty else 0)


def _write_pages(sight: Sight, directory: Path) -> None:
    pages = {name.replace("/", "_").replace(":", "-"): each for name, each in sight.memory.items()}
    pages |= {name: each for name, each in (("clear", sight.clear), ("encoded", sight.coded)) if len(each)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, each in pages.items():
            each.tofile(directory / f"{name}.bin")
    except OSError as error:
        raise UsageError("usage.argument", f"{directory}: {error.strerror}") from error


def _tell_carved(out: Output, way: str, carved: Carved) -> None:
    out.object({"type": "carved", "way": way or None, **vars(carved)})
    for screen in carved.screens:
        out.line("the guest's screen:")
        for line in screen:
            out.line(f"  | {line}")
    for name, password in carved.logins:
        out.line(f"typed: name {name}, password {password}")
    for each in carved.passwords:
        out.line(f"secret: {each}")
    for each in carved.keys:
        out.line(f"private key: {each.splitlines()[0]} … {len(each)} bytes")
    for text in carved.documents:
        out.line(f"document: {' '.join(text.split())[:160]} … {len(text)} characters")
    for kind, count in carved.files.items():
        out.line(f"files: {count} {kind}")
    for text, places in carved.found.items():
        out.line(f"{text!r}: {', '.join(places) or 'not found'}")
    out.line(f"{carved.strings} strings of eight characters and more")
    if carved.is_empty:
        out.line("nothing else: no screen, login, password, key, document or file")


@app.command("break")
@command
def break_command(
    capture: CaptureFile = None,
    *,
    out: Output,
    way: WayOption = "hrt",
    port: PortOption = None,
    codec: Annotated[
        Literal["affine", "shift", "hrt", "rc4"] | None, typer.Option("--codec", help="The codec [default: try all].")
    ] = None,
    pages_file: Annotated[
        Path | None, typer.Option("--pages", metavar="FILE", help="Write the pages that were decoded there.")
    ] = None,
) -> None:
    """Recover a page codec's key from a capture alone, and decode its pages.

    Exits with 0 when a key was recovered, and with 1 when none was.

    \b
    Examples:
      sealane lab break wire.pcap --pages decoded.bin
      sealane lab break --way hrt
      sealane lab break --way sealed
    """
    codecs: list[str] = [codec] if codec else ["affine", "shift", "hrt"]
    broken = 0
    for name, conversations in _overheard(capture, way, port, out):
        sight = look(conversations)
        best = _break(out, name, sight, codecs)
        broken += best is not None
        if best is not None and pages_file is not None:
            _write_decoded(
                best, sight, pages_file.with_name(f"{name}-{pages_file.name}") if way == "all" else pages_file
            )
    raise typer.Exit(0 if broken else NOTHING)


def _break(out: Output, way: str, sight: Sight, codecs: list[str]) -> Broken | None:
    """Tries the codecs on one capture, tells of each, and gives the one whose key decodes it best."""
    coded = sight.coded
    tried = [break_codec(name, coded) for name in codecs]
    keys = [each for each in tried if each.is_broken]
    best = max(keys, key=lambda each: carve_score(each, sight), default=None)
    out.object(
        {
            "type": "broken",
            "way": way or None,
            "pages_encoded": len(coded),
            "repeated_pages": repeats(coded),
            "sealed_bytes": sum(lane.sealed_bytes for lane in sight.lanes),
            "codec": best.codec if best else None,
            "key": best.key if best else None,
            "tried": [vars(each) for each in tried],
        }
    )
    out.line(f"{len(coded)} encoded pages, {repeats(coded)} of them equal to one before; {len(sight.clear)} in clear")
    for each in tried:
        out.line(f"{each.codec}: {'; '.join(each.how)}")
    if best is None:
        out.line("no key was recovered")
    else:
        out.line(f"key of {best.codec}: " + ", ".join(f"{name}={value}" for name, value in best.key.items()))
    return best


def _write_decoded(broken: Broken, sight: Sight, path: Path) -> None:
    try:
        broken.decode(sight.coded).tofile(path)
    except OSError as error:
        raise UsageError("usage.argument", f"{path}: {error.strerror}") from error


def carve_score(broken: Broken, sight: Sight) -> int:
    """How much what a key decodes looks like memory: its strings."""
    decoded = broken.decode(sight.coded[:512])
    return carve(Sight(), extra=[("decoded", decoded)]).strings


@app.command()
@command
def leak(
    ways: Annotated[
        list[str] | None, typer.Argument(metavar="[WAY]...", help="These ways alone [default: all].")
    ] = None,
    *,
    out: Output,
) -> None:
    """Count which of a guest's planted secrets can be read from the wire, under each way to move it.

    \b
    Examples:
      sealane lab leak
      sealane lab leak plain sealed --json
    """
    _experiments().leak(out, _known(ways))


def _known(ways: list[str] | None) -> list[str] | None:
    known = get_args(Way)
    for way in ways or []:
        if way not in known:
            raise UsageError("usage.argument", f"{way}: the ways are {', '.join(known)}")
    return ways or None


WaysOption = Annotated[
    list[str] | None,
    typer.Option("--way", metavar="WAY", help="Attack this way to move a guest; may be repeated [default: all]."),
]


def _attack(out: Output, name: str, ways: list[str] | None) -> None:
    """Run one attack; exits with 1 where a way of Sealane's own let the attacker have what he wanted."""
    chosen = _known(ways) or list(get_args(Way))
    found = _experiments().attack(out, name, chosen)
    if any(each.attacker_won for each in found if each.way not in ("plain", "tls")):
        raise typer.Exit(NOTHING)


@app.command()
@command
def tamper(*, out: Output, way: WaysOption = None) -> None:
    """Change a sentence in the memory of a running guest while it moves; where none is to be seen, flip one bit.

    Over plain migration the guest then says something else. Exits with 0 when Sealane's ways withstood.

    \b
    Example:
      sealane lab tamper
      sealane lab tamper --way sealed --way hrt
    """
    _attack(out, "tamper", way)


@app.command()
@command
def truncate(*, out: Output, way: WaysOption = None) -> None:
    """Cut the connection in the middle of the memory.

    \b
    Example:
      sealane lab truncate
    """
    _attack(out, "truncate", way)


@app.command()
@command
def replay(*, out: Output, way: WaysOption = None) -> None:
    """Say again to a destination all that was heard of an earlier migration.

    \b
    Example:
      sealane lab replay
    """
    _attack(out, "replay", way)


@app.command()
@command
def redirect(*, out: Output, way: WaysOption = None) -> None:
    """Lead the source to a false destination, as a false answer to ARP or DNS does.

    \b
    Example:
      sealane lab redirect
    """
    _attack(out, "redirect", way)


@app.command()
@command
def flood(*, out: Output, way: WaysOption = None) -> None:
    """Occupy the destination's port with false sources while the true one comes.

    \b
    Example:
      sealane lab flood
    """
    _attack(out, "flood", way)


@app.command()
@command
def downgrade(*, out: Output, way: WaysOption = None) -> None:
    """Take the newest TLS out of what the source offers, and offer an old one.

    \b
    Example:
      sealane lab downgrade
    """
    _attack(out, "downgrade", way)
