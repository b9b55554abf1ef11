"""`./run lab`: every experiment of the lab, one report.

Writes one HTML page that needs no network, and JSON with `--json`; `--results FILE` writes the main tables as Markdown.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sealane.cli.output import Output, Settings
from sealane.errors import SealaneError
from sealane.testing.lab.report import as_html, as_markdown
from sealane.testing.lab.suite import run_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; 0 where Sealane's default withstood everything."""
    parser = argparse.ArgumentParser(prog="./run lab", description=__doc__)
    parser.add_argument(
        "--html", metavar="FILE", type=Path, default=Path("lab-report.html"), help="the report [%(default)s]"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all figures there")
    parser.add_argument(
        "--results", metavar="FILE", type=Path, help="also write the main tables as Markdown (docs/results.md)"
    )
    parser.add_argument("--no-papers", action="store_true", help="leave the papers' benches out, which take 5 minutes")
    options = parser.parse_args(arguments)
    out = Output(Settings())
    try:
        results = run_all(out, with_papers=not options.no_papers)
    except SealaneError as error:
        out.error(error)
        return error.exit_status
    options.html.write_text(as_html(results), encoding="utf-8")
    out.line(f"report: {options.html}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.results is not None:
        options.results.write_text(as_markdown(results), encoding="utf-8")
    return 0 if results["verdict"]["sealed_withstood"] else 1


if __name__ == "__main__":
    sys.exit(main())
