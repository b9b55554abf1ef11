"""`sealane doctor`: what this host can do, and how to mend what it cannot."""

from typing import Annotated, Final

import typer

from sealane.cli.checks import examine
from sealane.cli.findings import Context, Finding
from sealane.cli.output import Output, command
from sealane.errors import HostError
from sealane.paths import Paths

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_MARKS: Final = {"ok": "✓", "warning": "!", "broken": "✗"}
_BROKEN: Final = HostError.exit_status


@app.command()
@command
def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Also boot a small guest, to know whether KVM works.")] = False,
    *,
    out: Output,
) -> None:
    """Look at all that Sealane needs of this host: what was found, and how to mend it.

    Exits with 0 when nothing is broken (warnings are not), else with 5.

    \b
    Example:
      sealane doctor
      sealane doctor --deep --json
    """
    findings: list[Finding] = []
    for finding in examine(Context(Paths.from_environment(), deep=deep)):
        findings.append(finding)
        tell(finding, out)
    broken = sum(finding.level == "broken" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    out.line()
    out.line(summary(broken, warnings))
    raise typer.Exit(_BROKEN if broken else 0)


def tell(finding: Finding, out: Output) -> None:
    """One finding: the mark, what was looked at, what was found; below it, how to mend it. With -q only what is broken."""
    out.object(
        {"check": finding.check, "level": finding.level, "found": finding.found, "mend": finding.mend},
    )
    line = f"{_MARKS[finding.level]} {finding.check:<24} {finding.found}"
    say = out.note if finding.level == "broken" and out.quiet else out.line
    say(line)
    if finding.mend:
        say(f"  {'':<24} Mend: {finding.mend}")


def summary(broken: int, warnings: int) -> str:
    """The last line."""
    counted = f"{warnings} warning{'' if warnings == 1 else 's'}"
    if broken:
        return f"✗ {broken} broken, {counted}"
    return f"✓ nothing is broken, {counted}"
