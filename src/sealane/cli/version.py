"""`sealane version`: what is installed here."""

import platform

import typer

import sealane
from sealane.cli.output import Output, command
from sealane.crypto.tls import library_version
from sealane.session.preface import PROTOCOL_VERSION

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
@command
def version(*, out: Output) -> None:
    """Show the versions of Sealane, Python, OpenSSL and the protocol.

    \b
    Example:
      sealane version --json
    """
    facts = {
        "version": sealane.__version__,
        "python": platform.python_version(),
        "openssl": library_version(),
        "protocol": PROTOCOL_VERSION,
    }
    out.object(facts)
    out.line(f"sealane   {facts['version']}")
    out.line(f"Python    {facts['python']}")
    out.line(f"OpenSSL   {facts['openssl']}")
    out.line(f"protocol  {facts['protocol']}")
