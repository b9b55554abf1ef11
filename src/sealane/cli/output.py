"""How everything is said: plain text, tables, JSON lines and failures, each to the right stream.

* Text goes to standard output, failures to standard error; with `--json` both go to standard output, one object a line.
* Colour and animation appear on a terminal only; NO_COLOR is honoured.
* A failure's first line says what is the case now and ends with the stable code; then what happened; then the mend.
"""

import functools
import inspect
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

import typer

from sealane.errors import InternalError, SealaneError

JsonOption = typer.Option("--json", help="One JSON object a line instead of text.")
QuietOption = typer.Option("-q", "--quiet", help="Say only what failed.")
VerboseOption = typer.Option("-v", "--verbose", help="Say more.")

_CODE_COLUMN = 100  # where a failure's code ends on a pipe; on a terminal, its right edge
_MARK_STYLES = {"✓": "32", "✗": "31", "?": "33", "!": "33"}


@dataclass(frozen=True)
class Settings:
    """The options that every command has."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False


class Output:
    """What a command speaks through."""

    def __init__(self, settings: Settings) -> None:
        self.as_json = settings.as_json
        self.quiet = settings.quiet
        self.verbose = settings.verbose

    @property
    def live(self) -> bool:
        """Whether standard output may be animated: a terminal, neither quiet nor JSON."""
        return not self.as_json and not self.quiet and is_terminal(sys.stdout)

    def line(self, text: str = "") -> None:
        """One line for people; nothing with -q or --json."""
        if not self.as_json and not self.quiet:
            print(paint(text, sys.stdout), flush=True)

    def detail(self, text: str) -> None:
        """A line that only -v shows."""
        if self.verbose:
            self.line(text)

    def note(self, text: str) -> None:
        """A line beside the result, on standard error; shown with -q too, never with --json."""
        if not self.as_json:
            print(paint(text, sys.stderr), file=sys.stderr, flush=True)

    def object(self, value: object) -> None:
        """One JSON object on a line of its own; nothing without --json."""
        if self.as_json:
            print_json(value)

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns, left-aligned and as wide as their widest cell."""
        lines = [list(heads), *[list(row) for row in rows]]
        widths = [max(display_width(line[column]) for line in lines) for column in range(len(heads))]
        for line in lines:
            cells = (cell + " " * (width - display_width(cell)) for cell, width in zip(line, widths, strict=True))
            self.line("  ".join(cells).rstrip())

    def error(self, error: SealaneError, *, headline: str | None = None, more: Mapping[str, Any] | None = None) -> None:
        """A failure in words, or as one object; see `print_error`."""
        print_error(error, as_json=self.as_json, headline=headline, more=more)


def print_error(
    error: SealaneError, *, as_json: bool, headline: str | None = None, more: Mapping[str, Any] | None = None
) -> None:
    """Print one failure: `headline` and the code, then the detail, then the mend; with JSON one object with all of it."""
    if as_json:
        value = {"type": "error", **error.as_dict(), "exit_status": error.exit_status, **(more or {})}
        if headline is not None:
            value["headline"] = headline
        print_json(value)
        return
    print(
        paint(failure_text(error, headline=headline, width=_width(sys.stderr)), sys.stderr), file=sys.stderr, flush=True
    )


def print_json(value: object) -> None:
    """One object on a line; bytes of file names that are no UTF-8 become question marks."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    print(text.encode(errors="replace").decode(), flush=True)


def failure_text(error: SealaneError, *, headline: str | None = None, width: int = _CODE_COLUMN) -> str:
    """The lines of a failure, its code right-aligned to `width` columns, or two spaces on where the line is long."""
    first = headline if headline is not None else error.detail
    mark = "?" if error.exit_status == 7 else "✗"
    if not first.startswith(("✗ ", "? ")):
        first = f"{mark} {first}"
    gap = max(2, width - display_width(first) - len(error.code))
    lines = [f"{first}{' ' * gap}{error.code}"]
    if headline is not None and error.detail:
        lines.append(f"  {error.detail}")
    if error.mend:
        lines.append(f"  Mend: {error.mend}")
    return "\n".join(lines)


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal that may be animated (not TERM=dumb)."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False


def harmless(text: str) -> str:
    """The text without characters that could steer a terminal: peers and QEMU have their words in details.

    Control characters (but line feed and tab), the marks that turn the direction of writing, and halves of characters (from file
    names that are no UTF-8) become U+FFFD.
    """
    return "".join(
        "\ufffd" if unicodedata.category(char) in {"Cc", "Cf", "Cs"} and char not in "\n\t" else char for char in text
    )


def paint(text: str, stream: TextIO) -> str:
    """Make harmless, and colour the mark that a line opens with, on a terminal and without NO_COLOR."""
    text = harmless(text)
    style = _MARK_STYLES.get(text[:1])
    if style is None or text[1:2] != " " or not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{style}m{text[0]}\x1b[0m{text[1:]}"


def display_width(text: str) -> int:
    """Terminal columns that the text takes (wide characters two, combining ones none)."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all have, and its `out`; print what it raises and exit with the family's status.

    The command takes `out: Output` and its own parameters; typer sees the latter and --json, -q, -v.
    """
    own = [value for name, value in inspect.signature(function).parameters.items() if name != "out"]

    @functools.wraps(function)
    def run(*, context: typer.Context, as_json: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
        before = context.obj if isinstance(context.obj, Settings) else Settings()
        settings = Settings(
            as_json=as_json or before.as_json, quiet=quiet or before.quiet, verbose=verbose or before.verbose
        )
        _run_reporting(Output(settings), functools.partial(function, **arguments))

    del run.__wrapped__
    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *[parameter.replace(kind=keyword) for parameter in own],
        *[
            inspect.Parameter(name, keyword, default=False, annotation=Annotated[bool, option])
            for name, option in (("as_json", JsonOption), ("quiet", QuietOption), ("verbose", VerboseOption))
        ],
    ]
    run.__signature__ = inspect.Signature(common)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in common}
    return run


def _run_reporting(out: Output, function: Callable[..., None]) -> None:
    try:
        function(out=out)
    except SealaneError as error:
        out.error(error)
        raise typer.Exit(error.exit_status) from error
    except BrokenPipeError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, typer.Exit | typer.Abort) or out.verbose:
            raise
        failure = InternalError("internal.error", f"{type(error).__name__}: {error}", mend=_REPORT)
        out.error(failure)
        raise typer.Exit(failure.exit_status) from error


_REPORT = "run it again with -v for the traceback, and please report it"


def _width(stream: TextIO) -> int:
    return shutil.get_terminal_size((_CODE_COLUMN, 24)).columns if is_terminal(stream) else _CODE_COLUMN
