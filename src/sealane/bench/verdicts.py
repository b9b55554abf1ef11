"""Which of two ways is lower, said so that another run says the same; and two runs' verdicts side by side.

The ways take turns, so each round gives a difference. What is known of the middle of all differences is the interval between two of
them, as many places from either end as makes it cover the true median with 99 % (the sign test turned round: nothing is assumed
of how they are distributed); of fewer than eight all of their range. A claim "a is below b"

    holds         where all of the interval is above 0, however little, and fails where all of it is below
    is alike      where it has 0 in it and lies within a margin: 5 % of what was measured, and what it cannot be measured finer than
    is undecided  where it reaches further to both sides, and where there are fewer than three values
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

Verdict: TypeAlias = Literal["holds", "fails", "alike", "undecided"]
MARGIN: Final = 0.05
LEAST_VALUES: Final = 3  # fewer have no spread to speak of
_MISSED: Final = 0.005  # how likely the true median may be beyond one end of the interval
RULE: Final = (
    "A claim holds or fails where the middle difference of the rounds is, with 99 %, on one side of nothing;\n"
    f"two ways are alike where that cannot be said, and it is within {MARGIN:.0%}; else it is undecided."
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """What covers the true median with 99 %, or all of fewer than eight values; raises ValueError where there is none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    beyond, likely = 0, 0.5 ** len(ordered)
    while likely <= _MISSED and beyond < len(ordered) // 2:
        beyond += 1
        likely += math.comb(len(ordered), beyond) * 0.5 ** len(ordered)
    place = max(0, beyond - 1)
    return ordered[place], ordered[-1 - place]


def judge_below(lower: Sequence[float], upper: Sequence[float], *, least: float = 0.0) -> Verdict:
    """Whether the first values are below the second ones, which were measured in turns with them, and as often.

    `least` is the smallest difference that means anything. Raises ValueError where there are not as many of both.
    """
    differences = [second - first for first, second in zip(lower, upper, strict=True)]
    if len(differences) < LEAST_VALUES:
        return "undecided"
    low, high = interval(differences)
    if low > 0 or high < 0:
        return "holds" if low > 0 else "fails"
    middle = min(abs(statistics.median(lower)), abs(statistics.median(upper)))
    return "alike" if max(-low, high) <= max(MARGIN * middle, least) else "undecided"


def difference(lower: Sequence[float], upper: Sequence[float], unit: str) -> str:
    """What such a judgement rests on, in words."""
    differences = [second - first for first, second in zip(lower, upper, strict=True)]
    low, high = interval(differences)
    return f"{statistics.median(differences):+.0f} {unit} ({low:+.0f} to {high:+.0f}) in {len(differences)} rounds"


def judge_at_most(values: Sequence[float], most: float) -> Verdict:
    """Whether the values are at most so much, in their middle."""
    if len(values) < LEAST_VALUES:
        return "undecided"
    low, high = interval(values)
    return "holds" if high <= most else "fails" if low > most else "undecided"


def in_every_respect(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict on a claim that was judged in several respects: it holds in all, or fails in one, where two are alike too."""
    if not verdicts or (set(verdicts) <= {"holds", "undecided"} and "undecided" in verdicts):
        return "undecided"
    return "holds" if set(verdicts) == {"holds"} else "fails"


def cell(values: Sequence[float], digits: int = 0) -> str:
    """Median and range, for a table."""
    if not values:
        return "not measured"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(str(each).replace('|', '/') for each in line)} |" for line in lines]


def claims_table(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paper's claims, and what became of them here."""
    rows = [[each["where"], each["claim"], each["verdict"], each["why"]] for each in claims]
    return table(("figure or table", "the paper's claim", "here", "why"), rows)


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Two runs' verdicts in Markdown, and whether none contradicts the other.

    `holds` against `fails` is a contradiction. Decided in one run alone is none, nor told apart in one and `alike` in the other;
    but both are told.
    """
    then = {(each["where"], each["claim"]): each["verdict"] for each in before["claims"]}
    rows, outcomes = [], {"the paper's claims": Counter[str](), "beside the paper": Counter[str]()}
    for each in now["claims"]:
        was = then.get((each["where"], each["claim"]))
        outcome = _outcome(was, each["verdict"])
        outcomes["beside the paper" if each.get("ours") else "the paper's claims"][outcome] += 1
        rows.append([each["where"], each["claim"], was or "-", each["verdict"], outcome])
    said = [
        f"{whose}: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}, of {counts.total()}"
        for whose, counts in outcomes.items()
        if counts
    ]
    lines = [
        f"The run of {before['made_at']} and this one. Verdicts on {'; '.join(said)}.",
        "",
        *table(("figure or table", "claim", "then", "now", ""), rows),
    ]
    return lines, not any(counts["CONTRADICTED"] for counts in outcomes.values())


def _outcome(was: Verdict | None, told: Verdict) -> str:
    if was is None:
        return "not judged before"
    if was == told:
        return "same"
    if "undecided" in (was, told):
        return "decided in one run"
    return "told apart in one run" if "alike" in (was, told) else "CONTRADICTED"
