"""The papers' measurements in the lab's report: a short run of each bench, its tables, and its figures as plots.

The benches stand above the lab's stage in the order of the rooms: they are loaded by name, as the stage is by the command line.
"""

import importlib
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from sealane.testing.lab.plots import figure, grouped_bars

BENCHES: Final = {"paper-kvm": "sealane.bench.paper_kvm", "paper-sgx": "sealane.bench.paper_sgx"}
PLOTS: Final = ("paper-total", "paper-downtime", "paper-cpu", "paper-table-2")
_FIGURES: Final = {
    "paper-total": ("total_ms", "Figures 11 and 12: total time, ms, medians."),
    "paper-downtime": ("downtime_ms", "Figures 13 and 14: downtime, ms, medians."),
    "paper-cpu": ("peak_cpu_percent", "Figures 15 and 16: peak CPU, % of the machine, medians."),
}


def measure_papers() -> dict[str, Any]:
    """The short form of each bench: its report, and the same as Markdown. Raises RigError."""
    found = {}
    for name, module in BENCHES.items():
        bench: Any = importlib.import_module(module)
        report = bench.measure_quickly()
        found[name] = {"report": report, "markdown": bench.as_markdown(report)}
    return found


def papers_html(papers: Mapping[str, Any]) -> Iterator[str]:
    """Both papers' sections."""
    yield (
        "<p>A short form of <code>./run bench paper-kvm</code> and <code>paper-sgx</code> (<code>--quick</code>): few runs, one "
        "size. Verdicts that need more are undecided here.</p>"
    )
    kvm, sgx = (papers[name] for name in BENCHES)
    yield from markdown_html(kvm["markdown"])
    for plot, (metric, caption) in _FIGURES.items():
        yield figure(plot, grouped_bars(_medians(kvm["report"]["samples"], metric)), caption)
    yield from markdown_html(sgx["markdown"])
    totals: dict[str, dict[str, float]] = {}
    for number, row in enumerate(sgx["report"]["totals_ms"], 1):
        for way, values in row.items():
            totals.setdefault(way, {})[f"VM {number}"] = statistics.median(values)
    yield figure("paper-table-2", grouped_bars(totals), "Figure 14: total time, ms, medians. SGX: not measured.")


def _medians(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[str, float]]:
    """By way, and in it by load and size."""
    values: dict[str, dict[str, list[float]]] = {}
    for each in samples:
        group = f"{each['memory_mib']} MB, {each['load']}s"
        values.setdefault(each["way"], {}).setdefault(group, []).append(each[metric])
    return {way: {group: statistics.median(found) for group, found in groups.items()} for way, groups in values.items()}


def markdown_html(lines: Sequence[str]) -> Iterator[str]:
    """The Markdown that the benches write, and no more of it: headings, tables, lists, paragraphs, code and stress."""
    for block in "\n".join(lines).split("\n\n"):
        text = block.strip("\n")
        rows = text.split("\n")
        if text.startswith("#"):
            marks, _, title = rows[0].partition(" ")
            yield f"<h{len(marks)}>{_inline(title)}</h{len(marks)}>"
        elif text.startswith("| "):
            cells = [[_inline(cell.strip()) for cell in row.strip("| ").split(" | ")] for row in rows]
            head = "".join(f"<th>{cell}</th>" for cell in cells[0])
            body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells[2:])
            yield f"<table><tr>{head}</tr>{body}</table>"
        elif text.startswith("- "):
            yield f"<ul>{''.join(f'<li>{_inline(row[2:])}</li>' for row in rows)}</ul>"
        elif text:
            yield f"<p>{_inline(text)}</p>"


def _inline(text: str) -> str:
    said = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*]*)\*\*", r"<strong>\1</strong>", said)
