"""The command line: one module per command, each loaded only when it is called.

`main` is the entry point `sealane`; `app` is the typer application behind it. Nothing heavy is imported here.
"""

from sealane.cli.application import app, main

__all__ = ["app", "main"]
