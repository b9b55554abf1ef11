"""`sealane receipts`: what the migrations of this host left behind, signed; looked at without its agent."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sealane.cli import format as words
from sealane.cli.output import Output, command
from sealane.errors import ControlError, UsageError
from sealane.host.receipts.statement import Predicate
from sealane.host.receipts.verify import Head, Item, Report, receipts_in, statements, verify_chain, verify_one
from sealane.paths import Paths

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="""List, show and verify the signed receipts of this host's migrations. No agent is needed.

\b
Example:
  sealane receipts list
  sealane receipts verify
""",
)

REFUSED = 1


@app.command("list")
@command
def list_(*, out: Output) -> None:
    """List the receipts, the newest last.

    \b
    Example:
      sealane receipts list --json
    """
    items = receipts_in(_directory())
    if not items:
        out.line("no receipts yet")
        return
    rows = []
    for item in items:
        if item.statement is None:
            out.object({"receipt": item.sequence, "path": str(item.path), "readable": False})
            rows.append([str(item.sequence), "?", "?", "?", "cannot be read: sealane receipts verify"])
            continue
        said = item.statement.predicate
        out.object({"receipt": item.sequence, "path": str(item.path), "readable": True, **_summary(said)})
        arrow, peer = ("→", said.hosts.destination) if said.migration.role == "source" else ("←", said.hosts.source)
        when = said.times.ended_at or said.times.started_at
        rows.append(
            [str(item.sequence), said.migration.vm, f"{arrow} {peer.name}", f"{when:%Y-%m-%d %H:%M}", _outcome(said)]
        )
    out.table(["NO", "VM", "HOST", "WHEN (UTC)", "OUTCOME"], rows)


@app.command()
@command
def show(
    number: Annotated[int, typer.Argument(metavar="NO", min=1, help="The receipt's number, as `list` shows it.")],
    *,
    out: Output,
) -> None:
    """Show what a receipt says, and whether it holds by itself.

    \b
    Example:
      sealane receipts show 213
    """
    item = _find(number)
    report = Report([item])
    verify_one(Paths.from_environment(), item, report)
    for _, statement in statements([item]):
        out.object(
            {
                "receipt": number,
                "path": str(item.path),
                "digest": item.digest,
                "holds": report.holds,
                "statement": statement.model_dump(mode="json", by_alias=True),
            }
        )
        for label, value in _facts(statement.predicate).items():
            out.line(f"{label:<12} {value}")
    out.line(f"{'file':<12} {item.path}")
    out.line(f"{'digest':<12} sha256:{item.digest}")
    _tell_problems(report, out)
    if not report.holds:
        raise typer.Exit(REFUSED)
    out.line("✓ signed by this host; whether it is in its place is told by: sealane receipts verify")


@app.command()
@command
def verify(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NO|FILE]...", help="Receipts of this host by number, or copies that others held."),
    ] = None,
    *,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="NO:SHA256", help="A head that was noted elsewhere; it must be in the chain."),
    ] = None,
    out: Output,
) -> None:
    """Verify all receipts of this host: none missing, changed, reordered, or cut off at the end.

    Exits with 0 when all holds and with 1 when something does not. A FILE may be a copy of one of these receipts (then it
    must be in the chain as it is) or a known peer's receipt. The last line gives the head, to be noted elsewhere.

    \b
    Example:
      sealane receipts verify
      sealane receipts verify 213
      sealane receipts verify --head 212:51ac…
      sealane receipts verify copy-from-host-b.dsse
    """
    numbers = [int(each) for each in what or [] if re.fullmatch(r"[0-9]{1,12}", each)]
    copies = [Path(each) for each in what or [] if not re.fullmatch(r"[0-9]{1,12}", each)]
    wanted = [_find(number) for number in numbers]
    report = verify_chain(Paths.from_environment(), head=None if head is None else _head(head), copies=copies)
    out.object(_as_object(report))
    _tell_problems(report, out)
    for note in report.notes:
        out.line(f"! {note}")
    for item in wanted:
        state = "✗" if any(problem.receipt == item.sequence for problem in report.problems) else "✓"
        out.line(f"{state} receipt {item.sequence}")
    if not report.holds:
        out.note(f"✗ {len(report.problems)} found wrong in {len(report.items)} receipts")
        raise typer.Exit(REFUSED)
    against = ", ".join(report.checked_end) or "nothing"
    out.line(
        f"✓ {len(report.items)} receipts, each in its place and signed by this host; the end held against {against}"
    )
    if report.items:
        out.line(f"  head {report.items[-1].sequence}:{report.items[-1].digest}")


def _directory() -> Path:
    return Paths.from_environment().state / "receipts"


def _find(number: int) -> Item:
    found = [item for item in receipts_in(_directory()) if item.sequence == number]
    if not found:
        raise ControlError("receipt.unknown", f"there is no receipt {number} in {_directory()}")
    return found[0]


def _head(text: str) -> Head:
    match = re.fullmatch(r"([0-9]{1,12}):([0-9a-f]{64})", text)
    if match is None:
        raise UsageError("usage.argument", "--head takes NO:SHA256, as `sealane receipts verify` prints it")
    return Head(int(match[1]), match[2])


def _tell_problems(report: Report, out: Output) -> None:
    for problem in report.problems:
        say = out.note if out.quiet else out.line
        say(f"✗ {problem.kind:<10} {problem.words}")


def _as_object(report: Report) -> dict[str, Any]:
    last = report.items[-1] if report.items else None
    return {
        "type": "receipts",
        "holds": report.holds,
        "receipts": len(report.items),
        "head": None if last is None else {"receipt": last.sequence, "digest": last.digest},
        "checked_end": report.checked_end,
        "problems": [{"kind": each.kind, "receipt": each.receipt, "words": each.words} for each in report.problems],
        "notes": report.notes,
    }


def _summary(said: Predicate) -> dict[str, Any]:
    return {
        "vm": said.migration.vm,
        "role": said.migration.role,
        "migration": said.migration.id,
        "source": said.hosts.source.name,
        "destination": said.hosts.destination.name,
        "state": said.outcome.state,
        "runs_at": said.outcome.runs_at,
        "code": said.outcome.code,
        "ended_at": None if said.times.ended_at is None else said.times.ended_at.isoformat(),
    }


def _outcome(said: Predicate) -> str:
    if said.outcome.code is None:
        return said.outcome.state
    return f"{said.outcome.state} ({said.outcome.code})"


def _facts(said: Predicate) -> dict[str, str]:
    """The receipt for people, what is not known left out."""
    trust, policy, times = said.verdicts.of_peer, said.policy, said.times
    spans = [
        f"{name} {words.duration(value / 1000)}"
        for name, value in (("total", times.total_ms), ("copy", times.copy_ms), ("down", times.downtime_ms))
        if value is not None
    ]
    key = [part for part in (said.key_exchange.tls, said.key_exchange.group, said.key_exchange.cipher) if part]
    facts = {
        "VM": f"{said.migration.vm}, epoch {said.migration.epoch}",
        "migration": f"{said.migration.number} ({said.migration.id})",
        "from": f"{said.hosts.source.name}  {said.hosts.source.fingerprint or '-'}",
        "to": f"{said.hosts.destination.name}  {said.hosts.destination.fingerprint or '-'}",
        "asked by": said.migration.requested_by,
        "outcome": _outcome(said),
        "why": said.outcome.detail,
        "runs at": said.outcome.runs_at,
        "the other": None if trust is None else f"level {trust.level} · {trust.root}",
        "evidence": "none"
        if trust is not None and not trust.evidence
        else None
        if trust is None
        else ", ".join(f"{each.kind} sha256:{each.sha256}" for each in trust.evidence),
        "policy": None if policy is None else f"{policy.words} (sha256:{policy.digest})",
        "protection": f"{said.protection.name} · readable on the wire: {said.protection.readable}",
        "channel": " · ".join(key),
        "lanes": None if said.transcript.lanes is None else f"sha256:{said.transcript.lanes}",
        "began": times.started_at.isoformat(timespec="seconds"),
        "ended": None if times.ended_at is None else times.ended_at.isoformat(timespec="seconds"),
        "took": " · ".join(spans),
        "on the wire": words.network_bytes(said.bytes.wire),
        "their receipt": None if said.peer_receipt is None else f"sha256:{said.peer_receipt}",
        "TPM": None
        if said.vtpm is None
        else f"EK sha256:{said.vtpm.ek_sha256 or '-'} · state {said.vtpm.version} · counter {said.vtpm.counter}",
        "written": "at the agent's next start" if said.recovered else None,
    }
    return {label: value for label, value in facts.items() if value}
