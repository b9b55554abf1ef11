"""What the benches of the papers share: their options, and how a run ends.

A report is a plain object: `bench`, `command`, `made_at`, `took_s`, `claims`, and the figures.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from sealane.bench.verdicts import compare
from sealane.testing.problems import RigError

Report: TypeAlias = dict[str, Any]
NO_REPORT = 2


def make_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all of them have."""
    parser = argparse.ArgumentParser(
        prog=f"./run bench {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything there")
    parser.add_argument(
        "--from", dest="source", metavar="FILE", type=Path, help="measure nothing: show what --json wrote"
    )
    parser.add_argument(
        "--against", metavar="FILE", type=Path, help="compare the verdicts with what --json wrote earlier"
    )
    return parser


def conclude(
    name: str, options: argparse.Namespace, measure: Callable[[], Report], as_markdown: Callable[[Report], list[str]]
) -> int:
    """Measure or read, print Markdown, write JSON; 1 where `--against` finds a contradiction, 2 where there is nothing."""
    try:
        before = read_report(options.against, name) if options.against else None
        report = read_report(options.source, name) if options.source else measure()
    except RigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return NO_REPORT
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines, agrees = compare(report, before) if before else ([], True)
    print("\n".join([*as_markdown(report), *(["", "### Against an earlier run", "", *lines] if lines else [])]))
    return 0 if agrees else 1


def timed(name: str, arguments: Sequence[str], measure: Callable[[], Report]) -> Report:
    """What was measured, with how, when and how long."""
    began, made_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    measured = measure()
    return {
        "bench": name,
        "command": " ".join(["./run bench", name, *arguments]),
        "made_at": made_at,
        "took_s": round(time.monotonic() - began),
        **measured,
    }


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def read_report(path: Path, name: str) -> Report:
    """What `--json` of an earlier run wrote. Raises RigError where the file is none of this bench."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RigError(f"{path}: {error}") from error
    if not isinstance(report, Mapping) or report.get("bench") != name or not isinstance(report.get("claims"), list):
        raise RigError(f"{path} was not written by ./run bench {name} --json")
    return dict(report)
