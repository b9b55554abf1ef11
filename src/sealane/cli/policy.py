"""`sealane policy`: what may move where, and why."""

import json
from typing import Annotated

import typer
from pydantic import ValidationError

from sealane.cli.client import AgentClient
from sealane.cli.completion import host_names, vm_names
from sealane.cli.output import Output, command
from sealane.errors import UsageError
from sealane.host.models import PolicyQuestion
from sealane.host.policy import ALWAYS, DIRECTORY, SCHEMA, load_policy
from sealane.paths import Paths

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="""Show this host's policy, and ask it whether a VM might move.

\b
Example:
  sealane policy show
  sealane policy check web01 host-b
""",
)

DENIED = 1


@app.command()
@command
def check(
    vm: Annotated[str, typer.Argument(metavar="VM", help="The VM.", autocompletion=vm_names)],
    host: Annotated[str, typer.Argument(metavar="HOST", help="The other host.", autocompletion=host_names)],
    *,
    receive: Annotated[bool, typer.Option("--receive", help="Ask whether it might come from HOST.")] = False,
    protection: Annotated[
        str, typer.Option("--protection", metavar="NAME", help="How the lanes would be protected.")
    ] = "sealed",
    level: Annotated[
        int | None,
        typer.Option(
            "--level", metavar="N", min=0, max=4, help="As if HOST had reached this level [default: as seen]."
        ),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="NAME", help="As if this local user asked [default: you].")
    ] = None,
    out: Output,
) -> None:
    """Ask this host's policy whether a VM might move, and why. Nothing is moved, and HOST is not asked.

    HOST's own policy decides too, when it comes to it. Exits with 0 when it would be allowed, with 1 when not.

    \b
    Example:
      sealane policy check web01 host-b
      sealane policy check web01 host-b --receive --json
    """
    try:
        question = PolicyQuestion(
            vm=vm, host=host, direction="receive" if receive else "send", protection=protection, level=level, user=user
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError("usage.argument", f"{first['loc'][0]} does not fit: {first['msg']}") from error
    with AgentClient() as agent:
        answer = agent.check_policy(question)
    out.object(answer.model_dump(mode="json"))
    decision, trust = answer.decision, answer.trust
    allowed = decision.decision == "allow"
    way = f"from {answer.host}" if receive else f"to {answer.host}"
    out.line(f"{'✓' if allowed else '✗'} {answer.vm} {'may' if allowed else 'may not'} move {way}: {decision.words}")
    out.line(f"  host       {answer.host}, level {trust.level} · {trust.root}")
    out.line(f"  asks for   {f'level {answer.least_level} or more' if answer.least_level else 'no level'}")
    out.line(f"  protection {answer.protection}")
    if answer.user is not None:
        out.line(f"  asked by   {answer.user}")
    out.line(
        f"  policy     {'the default' if decision.source == 'default' else 'of the files'} (sha256:{decision.digest})"
    )
    if decision.code is not None:
        out.line(f"  code       {decision.code}")
    raise typer.Exit(0 if allowed else DENIED)


@app.command()
@command
def show(
    schema: Annotated[bool, typer.Option("--schema", help="Also show what policies may speak of.")] = False,
    *,
    out: Output,
) -> None:
    """Show this host's policy: the files', or the default where there are none. Needs no agent.

    Reads and validates it as the agent does, and fails where the agent would allow nothing.

    \b
    Example:
      sealane policy show > mine.cedar
    """
    config = Paths.from_environment().config
    policy = load_policy(config)
    out.object(
        {
            "source": policy.source,
            "directory": str(config / DIRECTORY),
            "digest": policy.digest,
            "files": dict(policy.texts),
            "always": ALWAYS,
            "entities": list(policy.entities),
            "policies": [{"name": each.name, "file": each.file, "effect": each.effect} for each in policy.named],
            **({"schema": SCHEMA} if schema else {}),
        }
    )
    where = (
        f"of {config / DIRECTORY}" if policy.source == "files" else f"the default: {config / DIRECTORY} has no files"
    )
    out.line(f"// the policy {where}")
    out.line(f"// sha256:{policy.digest}")
    out.line("\n// always there, whatever the files say")
    out.line(ALWAYS.rstrip())
    for name, text in policy.texts:
        out.line(f"\n// {name}")
        out.line(text.rstrip())
    if policy.entities:
        out.line("\n// entities.json")
        for entity in policy.entities:
            out.line(f"// {json.dumps(entity['uid'])} in {json.dumps(entity['parents'])}")
    if schema:
        out.line("\n// the schema")
        out.line("".join(f"// {line}\n" for line in SCHEMA.splitlines()).rstrip())
