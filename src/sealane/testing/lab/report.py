"""The lab's report: one HTML page with its plots inside, and the main tables in Markdown. No network, no scripts."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from textwrap import fill
from typing import Any, Final

from sealane.testing.lab import papers
from sealane.testing.lab.papers import papers_html
from sealane.testing.lab.plots import figure, histograms, stacked_bars
from sealane.testing.lab.stage import way_name

PLOTS: Final = ("secrets", "pages", "bytes", *papers.PLOTS)
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1d2733;background:#fff}
h1,h2{line-height:1.2}table{border-collapse:collapse;margin:1rem 0;font-size:13px}
th,td{border:1px solid #c9d1d9;padding:.25rem .5rem;text-align:left;vertical-align:top}th{background:#eef2f6}
td.read{background:#f6c7c0}td.decoded{background:#fbe3b5}td.none{background:#d5ecd6}
code,pre{font:12px/1.45 ui-monospace,monospace}pre{background:#f4f6f8;padding:.75rem;overflow:auto}
figure{margin:1rem 0}figcaption{color:#55606d;font-size:13px}svg{max-width:100%}
"""


def as_html(results: Mapping[str, Any]) -> str:
    """The whole page."""
    leak, verdict = results["leak"], results["verdict"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        f"<title>Sealane attack lab</title><style>{_STYLE}</style></head><body>",
        "<h1>Sealane attack lab</h1>",
        f"<p>Made {escape(results['made_at'])}, in {results['took_s']} s. The hosts are simulated on one machine; nothing "
        "here rests on a hardware root of trust.</p>",
        f"<p><strong>{escape(_headline(verdict))}</strong></p>",
        "<h2>What leaks</h2>",
        f"<p>{escape(leak['premise'])}</p>",
        figure(
            "secrets",
            stacked_bars(_secrets_data(leak), ("read", "decoded")),
            "Secrets that the attacker has, of each way.",
        ),
        _leak_table(leak),
        "<p>* in pages that a process has mapped. <em>read</em>: stands in the capture as it is; <em>decoded</em>: "
        "found in pages that cryptanalysis decoded.</p>",
        figure(
            "pages",
            stacked_bars(_pages_data(leak), ("clear", "encoded", "other")),
            "Megabytes captured: pages in clear, encoded, the rest.",
        ),
        "<h2>What was carved</h2>",
        _table(("way", *next(iter(leak["carved"].values()))), _carved_rows(leak)),
        "<h2>Cryptanalysis</h2>",
        _table(("way", "codec", "verdict", "from", "took", "how"), _breaking_rows(leak)),
        figure(
            "bytes",
            histograms(results["bytes"]),
            "How often each byte value stands on the wire, in 4 MiB of what pages became.",
        ),
        f"<p>{escape(_rc4_words(results['rc4']))}</p>",
        "<h2>Attacks</h2>",
        _table(
            ("attack", "way", "attacker", "what he got", "the VM", "what was said"), _attack_rows(results["attacks"])
        ),
        *(
            papers_html(results["papers"])
            if results["papers"]
            else [f"<p>The papers' benches: {escape(results['papers_problem'])}.</p>"]
        ),
        "<h2>Machine, versions, commands</h2>",
        _table(("what", "is"), [[name, value] for name, value in results["machine"].items()]),
        _table(("experiment", "command"), [[what, how] for what, how in results["commands"]]),
        "</body></html>",
    ]
    return "\n".join(parts)


def _headline(verdict: Mapping[str, Any]) -> str:
    withstood = (
        "sealed withstood all of it"
        if verdict["sealed_withstood"]
        else "sealed did NOT withstand all of it, or was not tried"
    )
    return f"{withstood}; codecs broken from one capture each: {', '.join(verdict['codecs_broken']) or 'none'}"


def _secrets_data(leak: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    cells = leak["cells"].values()
    return {
        way_name(way): {kind: float(sum(row[way] == kind for row in cells)) for kind in ("read", "decoded")}
        for way in leak["captured_bytes"]
    }


def _pages_data(leak: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    data = {}
    for way, size in leak["captured_bytes"].items():
        clear, encoded = (leak[kind][way] * 4096 / 1e6 for kind in ("clear_pages", "coded_pages"))
        if way == "plain":
            clear = size / 1e6
        data[way_name(way)] = {"clear": clear, "encoded": encoded, "other": max(0.0, size / 1e6 - clear - encoded)}
    return data


def _leak_table(leak: Mapping[str, Any]) -> str:
    ways = list(leak["captured_bytes"])
    rows = []
    for place, row in leak["cells"].items():
        cells = "".join(f'<td class="{"none" if row[way] == "-" else row[way]}">{row[way]}</td>' for way in ways)
        rows.append(f"<tr><td>{escape(place)}{' *' if place in leak['users'] else ''}</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(way_name(way))}</th>" for way in ways)
    return f"<table><tr><th>secret</th>{heads}</tr>{''.join(rows)}</table>"


def _carved_rows(leak: Mapping[str, Any]) -> list[list[str]]:
    return [[way_name(way), *(_words(value) for value in found.values())] for way, found in leak["carved"].items()]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "0"
    return str(value)


def _breaking_rows(leak: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for each in leak["breaking"]:
        if not each["coded_pages"]:
            said = "no encoded pages: nothing to attack"
        elif each["key"]:
            said = f"broken: {each['right_pages']} of {each['coded_pages']} pages decode to pages of the guest's memory"
        else:
            said = "not broken"
        size = f"{each['coded_pages']} pages" + (f"; {each['enough_pages']} are enough" if each["enough_pages"] else "")
        how = list(each["how"])
        if each["header_key"]:
            how.append(f"a={each['header_key'][0]}, b={each['header_key'][1]} from one program's header too")
        rows.append([way_name(each["way"]), each["codec"], said, size, f"{each['seconds']} s", "; ".join(how)])
    return rows


def _rc4_words(rc4: Mapping[str, Any]) -> str:
    return (
        f"RC4: two captured migrations agree {rc4['deviations']} standard deviations more often than by chance, where 5 would show "
        f"a keystream that is used twice: keys are new for each migration. On pages under one keystream twice the same test shows "
        f"{rc4['control_deviations']}, and reads {rc4['control_pages_read']} pages from known ones. RC4's second byte is zero "
        f"{rc4['second_byte_zero']} times as often as it should; one byte of a capture is too little to use that."
    )


def _attack_rows(attacks: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            each["attack"],
            way_name(each["way"]),
            "WON" if each["attacker_won"] else "experiment failed" if each["code"] == "lab.failed" else "lost",
            each["got"],
            each["vm"],
            each["said"] + (f" [{each['code']}]" if each["code"] else ""),
        ]
        for each in attacks
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


# ---- Markdown


def as_markdown(results: Mapping[str, Any]) -> str:
    """The main tables, for docs/results.md."""
    leak, ways = results["leak"], list(results["leak"]["captured_bytes"])
    cells = [
        [f"{place}{' *' if place in leak['users'] else ''}", *(row[way] for way in ways)]
        for place, row in leak["cells"].items()
    ]
    cells.append(["**in all**", *(str(sum(row[way] != "-" for row in leak["cells"].values())) for way in ways)])
    carved = _carved_rows(leak)
    lines = [
        "# Results of the attack lab",
        "",
        f"Written by `./run lab --results docs/results.md` on {results['made_at'][:10]}, in {results['took_s']} s;",
        "the HTML report has the plots. Hosts are simulated on one machine, without TPM or TEE: shown is what the wire gives away.",
        "The papers' own measurements are in [results-papers.md](results-papers.md).",
        "",
        *_markdown(("what", "is"), [[name, value] for name, value in results["machine"].items()]),
        "",
        f"{_headline(results['verdict'])[0].upper()}{_headline(results['verdict'])[1:]}.",
        "",
        "## Which secrets can be read",
        "",
        "*read*: stands in the capture as it is; *decoded*: found in pages that cryptanalysis decoded; *: in pages that a process",
        "has mapped. Pages that the monitor has not classified when they go, and pages that two records share, are encrypted",
        "whatever they are: single cells of the weak protections vary from run to run, those of `sealed` do not.",
        "",
        *_markdown(("secret", *map(way_name, ways)), cells),
        "",
        fill(leak["premise"], 120),
        "",
        "## What was carved, by what it looks like",
        "",
        *_markdown(("way", *next(iter(leak["carved"].values()))), carved),
        "",
        "## Cryptanalysis, from one capture each",
        "",
        *_markdown(("way", "codec", "verdict", "from", "took", "how"), _breaking_rows(leak)),
        "",
        fill(_rc4_words(results["rc4"]), 120),
        "",
        "## Attacks",
        "",
        *_markdown(
            ("attack", "way", "attacker", "what he got", "the VM", "what was said"), _attack_rows(results["attacks"])
        ),
        "",
    ]
    return "\n".join(lines)


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *(f"| {' | '.join(row)} |" for row in cells)]
