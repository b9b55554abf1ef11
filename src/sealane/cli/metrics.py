"""`sealane metrics`: what the agent counts, in Prometheus' text format."""

import sys

import typer
from prometheus_client.parser import text_string_to_metric_families

from sealane.cli.client import AgentClient
from sealane.cli.output import Output, command

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
@command
def metrics(*, out: Output) -> None:
    """Print the agent's metrics in Prometheus' text format; docs/metrics.md has the table.

    Prometheus does not read unix sockets: node_exporter's textfile collector takes this output.
    With --json each sample is an object.

    \b
    Example:
      sealane metrics > /var/lib/node_exporter/sealane.prom
    """
    with AgentClient() as agent:
        text = agent.metrics()
    if not out.as_json:
        sys.stdout.write(text)
        return
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            out.object({"name": sample.name, "labels": sample.labels, "value": sample.value, "type": family.type})
