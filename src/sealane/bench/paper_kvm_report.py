"""What the figures of `./run bench paper-kvm` come to: the paper's claims judged, and all of it in Markdown.

The paper prints figures 11 to 16 as pictures without numbers; its text says in which order the ways stand. Table 1 has numbers.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sealane.bench.verdicts import (
    RULE,
    Verdict,
    cell,
    claims_table,
    difference,
    in_every_respect,
    judge_at_most,
    judge_below,
    table,
)

LOADS: Final = ("write", "read")
WAYS: Final = ("normal", "hrt", "selective", "sealed", "rc4", "tls", "ssh")
HEADS: Final = {"normal": "Normal", "hrt": "Modified (hrt)", "tls": "ssl (QEMU TLS)", "ssh": "ssh tunnel"}
METRICS: Final = {
    "total_ms": ("total time, ms", {"write": "figure 11", "read": "figure 12"}),
    "downtime_ms": ("downtime, ms", {"write": "figure 13", "read": "figure 14"}),
    "peak_cpu_percent": ("peak CPU, % of the machine", {"write": "figure 15", "read": "figure 16"}),
}
_UNITS: Final = {"total_ms": "ms", "downtime_ms": "ms", "peak_cpu_percent": "points"}
# below these, what was measured does not tell two ways apart: QEMU looks every 100 ms, ticks are 10 ms; CPU is counted in 10 ms,
# over 0.3 s or a shorter move
LEAST: Final = {"total_ms": 20.0, "downtime_ms": 10.0, "peak_cpu_percent": 8.0}
# Table 1 of the paper: pages, bytes migrated in all, and the share that it prints
TABLE_1: Final = ((9560, 54594028, 75.23), (9712, 54956455, 75.74), (9938, 51890006, 75.23), (9925, 51837185, 75.23))
SHARE, SHARE_ABOUT = 75.0, 5.0
PAPER_PAIRS: Final = (("normal", "hrt"), ("hrt", "tls"))
OTHER_PAIRS: Final = (("normal", "sealed"), ("sealed", "hrt"), ("sealed", "tls"), ("sealed", "ssh"), ("hrt", "rc4"))
_FULL_PERCENT: Final = 95.0
_FULL: Final = "both fill every processor of the machine at their peak: what each costs shows in the CPU time below"
# Why a claim came out as it did: read off the design, not measured by this bench
_WHY: Final = {
    "total_ms": {
        "normal < hrt holds": "each byte passes two more processes, which encode user pages and authenticate all",
        "normal < hrt fails": "Sealane takes the bytes off QEMU's migration thread as they come, and plain waits for that thread",
        "hrt < tls holds": "QEMU encrypts in its one migration thread, Sealane in processes beside it",
        "hrt < tls fails": "hrt takes longer for a byte than AES-256-GCM does today (`./run bench codecs`); handshakes come on top",
    },
    "downtime_ms": {
        "normal < hrt holds": "the hand-over, a ticket and two journals written to disk, happens while the VM stands still",
        "hrt < tls holds": "what is left for the pause takes longer through QEMU's encrypting thread than the hand-over does",
        "hrt < tls fails": "QEMU TLS has no hand-over, and what is left for the pause is too little for its encryption to show",
    },
    "peak_cpu_percent": {
        "normal < hrt holds": "two more processes encode and copy beside QEMU's threads",
        "hrt < tls holds": "encrypting in QEMU at both ends keeps more of the machine busy than two more processes do",
        "hrt < tls fails": "Sealane works beside QEMU's threads and fills both processors; QEMU TLS has one thread at each end",
    },
}


def judge(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's claims, each with its verdict here and why; then what is beside the paper, with `ours` set."""
    samples = report["samples"]
    found: list[dict[str, Any]] = []
    orders: dict[tuple[str, str], list[Verdict]] = {}
    for metric, (_, figures) in METRICS.items():
        for load in _present(samples, "load"):
            for lower, upper in (*PAPER_PAIRS, *OTHER_PAIRS):
                told = _judge_pair(samples, load, metric, lower, upper)
                if told is not None:
                    told |= {"where": figures[load], "ours": (lower, upper) not in PAPER_PAIRS}
                    orders.setdefault((lower, upper), []).append(told["verdict"])
                    found.append(told)
    found += _judge_savings(samples)
    if orders.get(("hrt", "tls")):
        verdict = in_every_respect(orders["hrt", "tls"])
        for_it, against, alike = (orders["hrt", "tls"].count(told) for told in ("holds", "fails", "alike"))
        why = f"{for_it} of {len(orders['hrt', 'tls'])} figures say so, {against} the contrary, {alike} that they are alike"
        found.append(_claim("figures 11 to 16", "Modified is cheaper than ssl in every respect", verdict, why))
    return [*found, *_judge_share(report["table_1"])]


def _claim(where: str, claim: str, verdict: Verdict, why: str) -> dict[str, Any]:
    return {"where": where, "claim": claim, "verdict": verdict, "why": why, "ours": False}


def _judge_pair(
    samples: Sequence[Mapping[str, Any]], load: str, metric: str, lower: str, upper: str
) -> dict[str, Any] | None:
    """One order of two ways, over all sizes, round by round. None where one of them was not measured."""
    first, second = _in_turns(samples, load, metric, lower, upper)
    if not first:
        return None
    verdict = judge_below(first, second, least=LEAST[metric])
    is_full = metric == "peak_cpu_percent" and statistics.median([*first, *second]) >= _FULL_PERCENT
    why = (
        _FULL if is_full and verdict in {"alike", "undecided"} else _WHY[metric].get(f"{lower} < {upper} {verdict}", "")
    )
    why = f"{difference(first, second, _UNITS[metric])}. {why}".rstrip()
    return {"claim": f"{_head(lower)} < {_head(upper)}", "verdict": verdict, "why": why}


def _in_turns(
    samples: Sequence[Mapping[str, Any]], load: str, metric: str, lower: str, upper: str
) -> tuple[list[float], list[float]]:
    """The rounds in which both ways arrived."""
    found = {
        (each["way"], each["memory_mib"], each["round"]): float(each[metric])
        for each in samples
        if each["load"] == load
    }
    rounds = [where for way, *where in found if way == lower and (upper, *where) in found]
    return [found[(lower, *where)] for where in rounds], [found[(upper, *where)] for where in rounds]


def _judge_savings(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Section 4.2: against ssl, Modified saves more total time where the guest reads than where it writes."""
    savings = {load: _savings(samples, load) for load in LOADS}
    rounds = savings["write"].keys() & savings["read"].keys()
    if not rounds:
        return []
    write, read = ([savings[load][each] for each in sorted(rounds)] for load in LOADS)
    verdict = judge_below(write, read, least=2.0)
    said = f"{statistics.median(write):+.0f} % where it writes, {statistics.median(read):+.0f} % where it reads"
    return [
        _claim("figures 11, 12", "Modified saves more of ssl's time where the guest reads", verdict, f"here: {said}")
    ]


def _savings(samples: Sequence[Mapping[str, Any]], load: str) -> dict[tuple[int, int], float]:
    """How much of ssl's total time Modified saved with each size and in each round, in percent."""
    totals = {
        (each["memory_mib"], each["round"], each["way"]): each["total_ms"] for each in samples if each["load"] == load
    }
    return {
        (memory, number): 100 * (1 - totals[memory, number, "hrt"] / total)
        for (memory, number, way), total in totals.items()
        if way == "tls" and (memory, number, "hrt") in totals
    }


def _judge_share(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not rows:
        return []
    shares = [_share(row["pages"], row["bytes"]) for row in rows]
    verdict = judge_at_most([abs(share - SHARE) for share in shares], SHARE_ABOUT)
    why = (
        f"here {min(shares):.0f} to {max(shares):.0f} %: how much of its memory user processes have mapped is a matter of the "
        "guest, not of the codec"
    )
    return [_claim("table 1", "about 75 % of the data is re-encoded (within 5 points)", verdict, why)]


def _share(pages: int, size: int) -> float:
    return 100 * pages * 4096 / size


def _head(way: str) -> str:
    return HEADS.get(way, way)


def _present(samples: Sequence[Mapping[str, Any]], field: str) -> list[Any]:
    return list(dict.fromkeys(each[field] for each in samples))


def _values(samples: Sequence[Mapping[str, Any]], load: str, memory: int, way: str, metric: str) -> list[float]:
    wanted = (load, memory, way)
    return [each[metric] for each in samples if (each["load"], each["memory_mib"], each["way"]) == wanted]


def as_markdown(report: Mapping[str, Any]) -> list[str]:
    """All of it, ready for docs/results.md."""
    samples = report["samples"]
    claims = report["claims"]
    lines = [
        "## The first paper's measurements, repeated",
        "",
        f"Written by `{report['command']}` on {report['made_at'][:10]}, in {report['took_s']} s:",
        f"{report['rounds']} rounds in which the ways take turns, medians with the lowest and the highest value. Both hosts are",
        "simulated on one machine. The paper prints its figures as pictures without numbers: below each stands the order that its",
        "text claims. Why a claim came out as it did is read off the design, and not measured here.",
        "",
        *table(("what", "is"), [[name, str(value)] for name, value in report["machine"].items()]),
    ]
    for metric, (title, figures) in METRICS.items():
        for load in _present(samples, "load"):
            lines += ["", f"### {figures[load].capitalize()}: {title}, a guest that {load}s", ""]
            lines += _figure(samples, load, metric)
            lines += ["", "The paper: Normal < Modified < ssl at every size. Here:", ""]
            lines += [
                f"- {each['claim']}: **{each['verdict']}**{_because(each['why'])}"
                for each in claims
                if each["where"] == figures[load] and not each["ours"]
            ]
            beside = [each for each in claims if each["where"] == figures[load] and each["ours"]]
            if beside:
                said = "; ".join(f"{each['claim']} {each['verdict']}" for each in beside)
                lines.append(f"- beside the paper: {said}")
    lines += ["", "### CPU time of the whole machine in a move, s (no figure of the paper's)", ""]
    for load in _present(samples, "load"):
        lines += [f"A guest that {load}s:", "", *_figure(samples, load, "cpu_s", digits=1), ""]
    lines += ["### Table 1: pages re-encoded, and their share of all data", "", *_table_1(report["table_1"]), ""]
    lines += ["### The paper's claims", "", RULE, "", *claims_table([each for each in claims if not each["ours"]])]
    lines += [f"\nBroken off: {each}" for each in report["broken_off"]]
    for each in report["not_arrived"]:
        lines += [
            "",
            f"Given up: {each['way']}, {each['memory_mib']} MB, a guest that {each['load']}s, round {each['round']}.",
        ]
    return lines


def _because(why: str) -> str:
    return f" ({why})" if why else ""


def _figure(samples: Sequence[Mapping[str, Any]], load: str, metric: str, digits: int = 0) -> list[str]:
    ways = sorted(_present(samples, "way"), key=WAYS.index)
    rows = [
        [str(memory), *(cell(_values(samples, load, memory, way, metric), digits) for way in ways)]
        for memory in _present(samples, "memory_mib")
    ]
    return table(("MB", *map(_head, ways)), rows)


def _table_1(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    paper = [
        ["the paper", str(pages), str(size), f"{share} printed; {_share(pages, size):.1f} by its own counts"]
        for pages, size, share in TABLE_1
    ]
    here = [
        [
            f"here, {row['memory_mib']} MB, {row['load']}s",
            str(row["pages"]),
            str(row["bytes"]),
            f"{_share(row['pages'], row['bytes']):.1f}",
        ]
        for row in rows
    ]
    return table(("whose", "pages of 4096 bytes", "bytes in all", "share, %"), [*paper, *here])
