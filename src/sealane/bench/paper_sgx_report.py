"""What the figures of `./run bench paper-sgx` come to: the paper's claims judged, and all of it in Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sealane.bench.paper_sgx_calls import part_medians
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

WAYS: Final = ("normal", "kvm", "sealed", "attested")
HEADS: Final = {
    "normal": "Normal",
    "kvm": "KVM",
    "sealed": "sealed (pinned)",
    "attested": "attested (simulated root)",
    "sealane": "Sealane",
    "open": "in the open",
    "enclave": "through an enclave's process",
}
# Table 2: five VMs, means of twenty runs in ms: Normal, KVM, SGX
TABLE_2: Final = (
    (23132, 23476, 23563),
    (23298, 23301, 23381),
    (23231, 23562, 23633),
    (23138, 23368, 23456),
    (23272, 23591, 23657),
)
READ_WRITE_US, ENC_DEC_US = 12.0, 70.0
KVM_ADDS_MS, ABOUT_PERCENT = 500.0, 2.0
_NO_SGX: Final = "SGX: not measured, there is none here"
_PROCESS: Final = "a packet to a process and back stands where SGX has an ECALL; this says nothing of SGX"
_FIXED: Final = (
    "the paper's VMs take 23 s, nearly all of it copying; these take a second or two, and what is fixed weighs more"
)


def judge(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's claims, each with its verdict here and why."""
    images, calls, totals = report["images_us"], report["calls_us"], report["totals_ms"]
    found = []
    for what, ways in images.items():
        for lower, upper, why in (("normal", "kvm", ""), ("kvm", "sealane", f"in place of SGX. {_NO_SGX}")):
            verdict = judge_below(part_medians(ways[lower]), part_medians(ways[upper]))
            found.append(_claim("figure 11", f"{what}: {HEADS[lower]} < {_sgx(upper)}", verdict, why))
    for name, ways in calls.items():
        is_state = name.startswith("tpm_state")
        figure, most = ("figure 12", READ_WRITE_US) if is_state else ("figure 13", ENC_DEC_US)
        added = [through - alone for alone, through in zip(ways["open"], ways["enclave"], strict=True)]
        verdict = judge_at_most(added, most)
        found.append(_claim(figure, f"{name}: SGX adds at most {most:.0f} us", verdict, _PROCESS))
    slower = [
        judge_below(calls["tpm_state_read"][way], calls["volatile_state_enc"][way]) for way in ("open", "enclave")
    ]
    why = "AES-256-GCM on some kilobytes takes less than a question to swtpm; the paper's 2015 scheme took longer"
    found.append(_claim("figures 12, 13", "enc and dec take longer than read and write", in_every_respect(slower), why))
    return [*found, *_judge_totals(totals)]


def _judge_totals(totals: Sequence[Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    if not totals:
        return []
    found = []
    for lower, upper, why in (
        ("normal", "kvm", "swtpm encrypts some kilobytes"),
        (
            "kvm",
            "attested",
            f"in place of SGX: two handshakes, the host's TPM asked for quotes, and every byte sealed. {_NO_SGX}",
        ),
    ):
        first, second = ([value for row in totals for value in row[way]] for way in (lower, upper))
        said = f"{difference(first, second, 'ms')}. {why}"
        verdict = judge_below(first, second, least=20.0)
        found.append(_claim("table 2, figure 14", f"{HEADS[lower]} < {_sgx(upper)}", verdict, said))
    added = [value - statistics.median(row["normal"]) for row in totals for value in row["kvm"]]
    found.append(
        _claim("table 2", f"KVM adds less than {KVM_ADDS_MS / 1e3:.1f} s", judge_at_most(added, KVM_ADDS_MS), "")
    )
    percent = [100 * (value / statistics.median(row["normal"]) - 1) for row in totals for value in row["attested"]]
    claim = f"SGX adds about {_paper_more():.1f} % (at most {ABOUT_PERCENT:.0f} %)"
    more = [value - statistics.median(row["normal"]) for row in totals for value in row["attested"]]
    paper = statistics.mean(row[2] - row[0] for row in TABLE_2)
    why = (
        f"attested here: {statistics.median(percent):+.0f} %, {statistics.median(more):+.0f} ms; the paper: {paper:+.0f} ms. "
        f"{_FIXED}. {_NO_SGX}"
    )
    found.append(_claim("table 2", claim, judge_at_most(percent, ABOUT_PERCENT), why))
    return found


def _sgx(way: str) -> str:
    return {"sealane": "SGX (here Sealane)", "attested": "SGX (here attested)"}.get(way, HEADS[way])


def _paper_more() -> float:
    return 100 * (sum(row[2] for row in TABLE_2) / sum(row[0] for row in TABLE_2) - 1)


def _claim(where: str, claim: str, verdict: Verdict, why: str) -> dict[str, Any]:
    return {"where": where, "claim": claim, "verdict": verdict, "why": why}


def as_markdown(report: Mapping[str, Any]) -> list[str]:
    """All of it, ready for docs/results.md."""
    images, calls = report["images_us"], report["calls_us"]
    return [
        "## The second paper's measurements, as far as they can be made here",
        "",
        f"Written by `{report['command']}` on {report['made_at'][:10]}, in {report['took_s']} s. There is no SGX on this",
        "machine: nothing below is SGX's. The root of trust of the attested hosts is simulated (software TPMs), and an enclave is",
        "a sandboxed process. Figures 11 to 13 of the paper are pictures without numbers; its text gives what is quoted.",
        "",
        *table(("what", "is"), [[name, str(value)] for name, value in report["machine"].items()]),
        "",
        f"### Figure 11: a TPM's image, us; {report['calls']} times, median and range",
        "",
        "Written by raising an NV counter, read by starting the TPM anew. Normal: in clear; KVM: under swtpm's own key; Sealane:",
        "under a key that its keeper holds, which also keeps the file's digest.",
        "",
        *_rows(images, "the image is"),
        "",
        "The paper: Normal < KVM < SGX, by little. SGX: not measured.",
        "",
        f"### Figures 12 and 13: the four calls, us; {report['calls']} times, median and range",
        "",
        *_rows(calls, "call"),
        "",
        f"The paper: SGX adds at most {READ_WRITE_US:.0f} us to read and write, {ENC_DEC_US:.0f} us to enc and dec.",
        "SGX: not measured; what stands in its place is one packet to a sandboxed process and one back.",
        "",
        f"### Table 2 and figure 14: total migration time, ms; {report['runs']} runs of each VM, median and range",
        "",
        *_table_2(report["totals_ms"]),
        *(f"\nBroken off: {each}" for each in report["broken_off"]),
        "",
        "### The second paper's claims",
        "",
        RULE,
        "",
        *claims_table(report["claims"]),
    ]


def _rows(figures: Mapping[str, Mapping[str, Sequence[float]]], what: str) -> list[str]:
    ways = list(next(iter(figures.values())))
    rows = [[name, *(cell(values[way], 1) for way in ways)] for name, values in figures.items()]
    return table((what, *(HEADS[way] for way in ways)), rows)


def _table_2(totals: Sequence[Mapping[str, Sequence[float]]]) -> list[str]:
    rows = []
    for number in range(max(len(totals), len(TABLE_2))):
        paper = [str(value) for value in TABLE_2[number]] if number < len(TABLE_2) else ["", "", ""]
        here = [cell(totals[number][way]) if number < len(totals) else "not measured" for way in WAYS]
        rows.append([str(number + 1), *paper, *here, "not measured"])
    return table(("VM", "paper: Normal", "paper: KVM", "paper: SGX", *(HEADS[way] for way in WAYS), "SGX"), rows)
