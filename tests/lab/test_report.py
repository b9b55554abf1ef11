"""The report as a browser shows it: without a network, without an error, with its plots."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sealane.bench import paper_kvm_report, paper_sgx_report
from sealane.testing.lab.report import PLOTS, as_html, as_markdown
from sealane.testing.lab.stage import WAYS
from sealane.testing.lab.suite import verdict
from tests.bench.reports import kvm_report, sgx_report

CHROMIUM = shutil.which("chromium")


def results() -> dict[str, Any]:
    """As `run_all` gives them, with figures made up for the page alone."""
    cells = {place: {way: "read" if way == "plain" else "-" for way in WAYS} for place in ("heap", "pipe <&>")}
    cells["heap"]["hrt"] = "decoded"
    broken = {
        "codec": "hrt",
        "coded_pages": 10,
        "pages_used": 10,
        "seconds": 0.4,
        "key": {"a": 3},
        "how": ["by | looking"],
    }
    counts = {"counts": list(range(256)), "coincidence": 0.0051}
    attack = {
        "attack": "tamper",
        "attacker_won": False,
        "got": "nothing",
        "vm": "runs at the source",
        "said": "changed",
    }
    made: dict[str, Any] = {
        "made_at": "2026-01-01T00:00:00+00:00",
        "took_s": 1,
        "machine": {"QEMU": "10.0.2"},
        "commands": [["all of it", "./run lab"]],
        "leak": {
            "cells": cells,
            "planted": dict.fromkeys(cells, True),
            "users": ["heap"],
            "captured_bytes": dict.fromkeys(WAYS, 5_000_000),
            "clear_pages": dict.fromkeys(WAYS, 100),
            "coded_pages": dict.fromkeys(WAYS, 50),
            "carved": {way: {"screens": 1, "files": {"PNG": 2}} for way in WAYS},
            "breaking": [{**broken, "way": "hrt", "right_pages": 9, "enough_pages": 4, "header_key": (3, 5)}],
            "premise": "The premise fails.",
        },
        "bytes": dict.fromkeys(("plain", "hrt", "sealed"), counts),
        "rc4": {"deviations": 0.1, "control_deviations": 90.0, "control_pages_read": 3, "second_byte_zero": 2.0},
        "attacks": [{**attack, "way": way, "code": "lane.integrity"} for way in ("plain", "sealed")],
    }
    reports = {
        "paper-kvm": (kvm_report(), paper_kvm_report.as_markdown),
        "paper-sgx": (sgx_report(), paper_sgx_report.as_markdown),
    }
    made["papers"] = {name: {"report": each, "markdown": said(each)} for name, (each, said) in reports.items()}
    made["papers_problem"] = ""
    made["verdict"] = verdict(made)
    return made


def test_the_page_stands_alone() -> None:
    page = as_html(results())
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not re.search(r"@import|url\(|<script", page)
    assert "pipe &lt;&amp;&gt;" in page
    for plot in PLOTS:
        assert f'id="plot-{plot}"' in page
    assert "<td>ssh tunnel</td>" not in page
    assert "<th>ssh tunnel</th>" in page, "a table of the papers' benches"
    assert "**" not in re.sub(r"<style>.*?</style>", "", page), "Markdown that was not turned into HTML"


def test_the_papers_may_be_left_out() -> None:
    made = results() | {"papers": {}, "papers_problem": "left out"}
    assert "The papers' benches: left out." in as_html(made)
    assert not verdict(made)["experiments_that_failed"]
    made["papers_problem"] = "no stress-ng <&>"
    assert "no stress-ng &lt;&amp;&gt;" in as_html(made)
    assert verdict(made)["experiments_that_failed"] == ["the papers' benches"]


def test_the_tables_stand_in_markdown() -> None:
    text = as_markdown(results())
    assert "| pipe <&> | read |" in text
    assert "by \\| looking" in text
    for line in text.splitlines():
        assert len(line) <= 132 or line.startswith("|"), line


def test_the_verdict_follows_the_figures() -> None:
    made = results()
    assert verdict(made)["sealed_withstood"]
    made["attacks"][1]["attacker_won"] = True
    assert not verdict(made)["sealed_withstood"]
    made = results()
    made["leak"]["cells"]["heap"]["sealed"] = "read"
    assert not verdict(made)["sealed_withstood"]
    made = results()
    made["attacks"] = made["attacks"][:1]
    assert not verdict(made)["sealed_withstood"], "what was not tried has not withstood"


@pytest.mark.skipif(CHROMIUM is None and not os.environ.get("SEALANE_WANT_CHROMIUM"), reason="chromium is not here")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    assert CHROMIUM is not None, "./run test could not install chromium, and a whole run does not leave this test out"
    page = tmp_path / "report.html"
    # the probe tells, in the title, what the browser has drawn and what it could not load
    probe = """<script>
    const problems = [];
    addEventListener("error", event => problems.push(String(event.message || event.target)), true);
    addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
    addEventListener("load", () => {
      const drawn = [...document.querySelectorAll("figure svg")];
      const plots = drawn.map(svg => [svg.querySelectorAll("rect").length, svg.getBBox().width]);
      const loads = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length;
      document.title = JSON.stringify({plots, problems, loads, tables: document.querySelectorAll("table").length});
    });
    </script>"""
    html = as_html(results())
    page.write_text(html.replace("<body>", f"<body>{probe}"), encoding="utf-8")
    shown = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"),
            *(
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--virtual-time-budget=5000",
            ),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    found = re.search(r"<title>(\{.*?\})</title>", shown.stdout)
    assert found, shown.stdout[:400]
    told = json.loads(found[1].replace("&quot;", '"'))
    assert (told["problems"], told["loads"]) == ([], 0), told
    assert told["tables"] == html.count("<table>") > 15
    assert len(told["plots"]) == len(PLOTS)
    assert all(bars > 4 and width > 100 for bars, width in told["plots"]), told
