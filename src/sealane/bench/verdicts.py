"""Which of two ways is lower, said so that another run says the same; and two runs' verdicts side by side.

A claim "a is below b" is judged by the medians: it `holds`, or `fails` where b is below a, if they are further apart than both the
spread (the larger interquartile range of the two) and a margin (5 % of the smaller median, and what the quantity cannot be
measured finer than). Anything else is `undecided`, as is what has fewer than three values: another run might say otherwise.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

Verdict: TypeAlias = Literal["holds", "fails", "undecided"]
MARGIN: Final = 0.05
LEAST_VALUES: Final = 3  # fewer have no spread to speak of
RULE: Final = (
    f"A claim holds or fails where the medians are further apart than the larger interquartile range and than {MARGIN:.0%}; "
    "else it is undecided."
)


def judge_below(lower: Sequence[float], upper: Sequence[float], *, least: float = 0.0) -> Verdict:
    """Whether the first values are below the second ones; `least` is the smallest difference that means anything."""
    if min(len(lower), len(upper)) < LEAST_VALUES:
        return "undecided"
    first, second = statistics.median(lower), statistics.median(upper)
    apart = abs(second - first)
    if apart <= max(spread(lower), spread(upper), MARGIN * min(abs(first), abs(second)), least):
        return "undecided"
    return "holds" if first < second else "fails"


def judge_at_most(values: Sequence[float], most: float) -> Verdict:
    """Whether the values are at most so much: by their median, where that is further from it than they spread."""
    if len(values) < LEAST_VALUES:
        return "undecided"
    middle = statistics.median(values)
    if abs(middle - most) <= spread(values):
        return "undecided"
    return "holds" if middle <= most else "fails"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict on a claim that was judged several times: what all say that are decided, if most are."""
    decided = {verdict for verdict in verdicts if verdict != "undecided"}
    if len(decided) != 1 or 2 * verdicts.count("undecided") >= len(verdicts):
        return "undecided"
    return decided.pop()


def spread(values: Sequence[float]) -> float:
    """The interquartile range; of fewer than four values all of the range."""
    if len(values) < 4:
        return max(values) - min(values) if values else 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


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

    `holds` against `fails` is a contradiction. Decided in one run and undecided in the other is none, but it is told.
    """
    then = {(each["where"], each["claim"]): each["verdict"] for each in before["claims"]}
    rows, counts = [], {"same": 0, "decided in one run": 0, "CONTRADICTED": 0, "not judged before": 0}
    for each in now["claims"]:
        was, told = then.get((each["where"], each["claim"])), each["verdict"]
        if was is None:
            outcome = "not judged before"
        elif was == told:
            outcome = "same"
        else:
            outcome = "decided in one run" if "undecided" in (was, told) else "CONTRADICTED"
        counts[outcome] += 1
        rows.append([each["where"], each["claim"], was or "-", told, outcome])
    lines = [
        f"The run of {before['made_at']} and this one: "
        + ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        + f", of {len(rows)} verdicts.",
        "",
        *table(("figure or table", "claim", "then", "now", ""), rows),
    ]
    return lines, not counts["CONTRADICTED"]
