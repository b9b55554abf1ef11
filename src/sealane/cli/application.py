"""The typer application: the table of commands, the options before a command, and how misuse is told.

A command's module is imported when the command is named (or when `--help` lists them all), so that `sealane version` does
not pay for the REST client, and the client not for the doctor.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sealane.cli.output import JsonOption, Output, QuietOption, Settings, VerboseOption, print_error
from sealane.errors import SealaneError, UsageError

# In the order in which a newcomer needs them; each names the module beside this one.
COMMANDS = (
    "demo",
    "init",
    "agent",
    "pair",
    "trust",
    "ca",
    "vm",
    "vtpm",
    "lane",
    "migrate",
    "evacuate",
    "status",
    "cancel",
    "rate",
    "resolve",
    "receipts",
    "hosts",
    "policy",
    "doctor",
    "metrics",
    "inspect",
    "attest",
    "debug",
    "lab",
    "version",
)

_HELP = """\
Moves running QEMU virtual machines between hosts through a sealed lane.

\b
Examples:
  sealane init                              make this host's identity
  sealane pair                              trust another host, by a short code
  sealane migrate web01 host-b              move a running VM
  sealane doctor                            what this host can do, and how to mend it

--json, -q and -v may stand before or after the command. The manual page sealane(1) and docs/ tell the rest.
"""


class CommandTable(TyperGroup):
    """The commands of COMMANDS, each imported when it is asked for; failures come out in Sealane's words."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands that this installation has."""
        return [name for name in COMMANDS if importlib.util.find_spec(f"sealane.cli.{name}")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command's module and give its command; None where there is none of that name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"sealane.cli.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run and exit with the family's status; misuse is told like every other failure."""
        arguments = gather_launch_command(list(sys.argv[1:] if args is None else args))
        name = prog_name or "sealane"
        run = functools.partial(super().main, arguments, name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            status = run()
        except typer.Abort:
            status = 130
        except Exception as problem:
            error = as_usage_error(problem)
            if error is None:
                raise
            print_error(error, as_json="--json" in arguments)
            status = error.exit_status
        sys.exit(status if isinstance(status, int) else 0)


def as_usage_error(problem: Exception) -> SealaneError | None:
    """What the argument parser raised, as Sealane's own error; None where it is something else."""
    if isinstance(problem, SealaneError):
        return problem
    message = getattr(problem, "format_message", None)
    if message is None:
        return None
    context = getattr(problem, "ctx", None)
    path = context.command_path if context is not None else "sealane"
    return UsageError("usage.argument", str(message()), mend=f"see `{path} --help`")


def gather_launch_command(arguments: list[str]) -> list[str]:
    """`--launch-incoming CMD ARG…` of `vm add` becomes `-- CMD ARG…`, so that the command's own options stay its own.

    A CMD with a space in it is one shell-quoted string and ends there; otherwise all that follows is the command.
    """
    option = "--launch-incoming"
    if "vm" not in arguments or option not in arguments:
        return arguments
    at = arguments.index(option)
    if "--" in arguments[:at]:
        return arguments
    following = arguments[at + 1 :]
    if following and " " in following[0]:
        return arguments
    if len(following) < 2:
        return arguments
    return [*arguments[:at], "--", *(following[1:] if following[0] == "--" else following)]


app = typer.Typer(
    name="sealane",
    cls=CommandTable,
    help=_HELP,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    context: typer.Context,
    *,
    as_json: Annotated[bool, JsonOption] = False,
    quiet: Annotated[bool, QuietOption] = False,
    verbose: Annotated[bool, VerboseOption] = False,
) -> None:
    """Keep what stands before the command for the command to see."""
    context.obj = Settings(as_json=as_json, quiet=quiet, verbose=verbose)
    if context.invoked_subcommand is None:
        Output(context.obj).note(context.get_help())
        raise typer.Exit(2)


def main() -> None:
    """The entry point `sealane`: runs the command that the arguments name and exits with its status."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal without ✓ shows ?, and never a traceback
    app(prog_name="sealane")
