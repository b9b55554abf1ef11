"""`sealane attest verify`: appraise stored evidence, without a peer and without the network."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from sealane.attest.appraise import Material, appraise
from sealane.attest.reading import EVIDENCE_BYTES_MAX
from sealane.attest.reasons import Severity
from sealane.attest.reference import NO_REFERENCE, parse_reference
from sealane.attest.verdict import Verdict
from sealane.cli.output import Output, command
from sealane.errors import EvidenceError, UsageError

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)

REFUSED: Final = 1
_MARKS: Final = {Severity.REFUSAL: "✗", Severity.WEAKNESS: "!", Severity.NOTE: " "}


@app.callback()
def attest() -> None:
    """Appraise evidence of what a host is: quotes, reports, and measurement logs."""


@app.command()
@command
def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Quotes, reports, logs, signatures, keys.")],
    collateral: Annotated[
        list[Path] | None,
        typer.Option("--collateral", metavar="FILE", help="Certificates, revocation lists, TCB info; may be repeated."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", metavar="FILE", help="What is expected (JSON or TOML).")
    ] = None,
    reference_key: Annotated[
        Path | None, typer.Option("--reference-key", metavar="FILE", help="The Ed25519 key that signs --reference.")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Appraise as of then (ISO 8601), not as of now.")
    ] = None,
    *,
    out: Output,
) -> None:
    """Appraise stored evidence: is it genuine, what does it rest on, and is it what is expected?

    The kind of each file is found from its content. Exits with 0 when the evidence is accepted, with 1 when it is
    refused, every reason told, and with 2 when something was not understood.

    \b
    Example:
      sealane attest verify quote.dat --collateral collateral.json --reference hosts.toml
      sealane attest verify report.bin vcek.der ask_ark.pem --at 2025-07-01T00:00:00Z --json
    """
    now = parse_time(at) if at is not None else datetime.now(UTC)
    if reference is None and reference_key is not None:
        raise UsageError("usage.argument", "--reference-key without --reference")
    expected = NO_REFERENCE
    if reference is not None:
        expected = parse_reference(read(reference), key=read(reference_key) if reference_key is not None else None)
    material = Material()
    for path in [*files, *(collateral or [])]:
        add(material, path)
    verdict = appraise(material, expected, now=now)
    tell(material, verdict, now, out)
    raise typer.Exit(0 if verdict.accepted else REFUSED)


def parse_time(text: str) -> datetime:
    """ISO 8601, or seconds since 1970; UTC where it has no offset. Raises `usage.argument`."""
    try:
        if text.isascii() and text.isdigit():
            return datetime.fromtimestamp(int(text), UTC)
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            "usage.argument", f"--at {text!r} is no time; write for example 2025-07-01T12:00:00Z"
        ) from error


def read(path: Path) -> bytes:
    """The file's bytes, bounded; raises `usage.argument` where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(EVIDENCE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError("usage.argument", f"{path}: {error.strerror}") from error
    if len(data) > EVIDENCE_BYTES_MAX:
        raise EvidenceError("attest.too-large", f"{path}: more than {EVIDENCE_BYTES_MAX} bytes")
    return data


def add(material: Material, path: Path) -> None:
    """Recognise one file; what it raises names the file."""
    data = read(path)
    name = os.path.basename(path)
    try:
        material.add(name, data)
    except EvidenceError as error:
        detail = error.detail if error.detail.startswith(name) else f"{name}: {error.detail}"
        raise EvidenceError(error.code, detail) from error


def tell(material: Material, verdict: Verdict, now: datetime, out: Output) -> None:
    """The verdict with every reason, for people or as one JSON object."""
    out.object(as_object(material, verdict, now))
    for name, kind in material.kinds:
        out.detail(f"  {name}: {kind}")
    for one in verdict.appraisals:
        out.line(f"{one.about}: {one.kind}, {f'rests on {one.root}' if one.root else 'rests on nothing that is known'}")
        for reason in sorted(one.reasons, key=lambda reason: list(Severity).index(reason.severity)):
            mark = _MARKS[reason.severity]
            say = out.note if reason.severity is Severity.REFUSAL and out.quiet else out.line
            say(f"{mark} {reason.code:<26} {reason.sentence}")
            out.detail(f"  {'':<26} {reason.clause}")
        for name, value in one.facts.items():
            out.detail(f"  {name:<26} {value}")
    out.line()
    production = "" if verdict.production_level == verdict.level else "; nothing of it on a vendor's root"
    level = f"level {int(verdict.level)}: {verdict.level.words}{production}"
    say = out.note if out.quiet and not verdict.accepted else out.line
    if verdict.accepted:
        say(f"✓ accepted as of {now:%Y-%m-%d %H:%M} UTC, {level}")
    elif verdict.refused:
        say(f"✗ refused as of {now:%Y-%m-%d %H:%M} UTC")
    else:
        say(f"✗ refused as of {now:%Y-%m-%d %H:%M} UTC: {verdict.why_not()[0]}")


def as_object(material: Material, verdict: Verdict, now: datetime) -> dict[str, Any]:
    """What --json gives."""
    files = [{"file": name, "kind": kind} for name, kind in material.kinds]
    return {"type": "verdict", "at": now.isoformat(), "files": files, **verdict.as_dict()}
