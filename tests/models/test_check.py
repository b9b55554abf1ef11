"""What is read from spin's report: its figures, and that a walk which saw too little is no proof."""

import pytest

from tests.models.check import SpinError, read

REPORT = """
Full statespace search for:
\tnever claim         \t+ (never_two)
State-vector 220 byte, depth reached 335, errors: 0
 45747458 states, stored
4.5104301e+08 states, matched
4.9679047e+08 transitions (= stored+matched)
"""


def test_large_figures() -> None:
    verdict = read("never_two", REPORT, 1.0)
    assert (verdict.violation, verdict.states, verdict.transitions, verdict.depth) == ("", 45_747_458, 496_790_470, 335)


@pytest.mark.parametrize(
    "report",
    [
        REPORT.replace("(never_two)", "(another)"),
        REPORT + "Warning: Search not completed\n",
        REPORT + "error: max search depth too small\n",
        REPORT.replace("errors: 0", ""),
        "",
    ],
)
def test_no_proof(report: str) -> None:
    with pytest.raises(SpinError):
        read("never_two", report, 1.0)


def test_a_violation() -> None:
    report = "pan:1: assertion violated (at depth 7)\n" + REPORT.replace("errors: 0", "errors: 1")
    assert read("never_two", report, 1.0).violation == "assertion violated (at depth 7)"
