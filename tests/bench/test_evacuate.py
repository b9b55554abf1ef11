"""The arithmetic of `./run bench evacuate`."""

import pytest

from sealane.bench.evacuate import Run, print_report, summarise


def test_the_ratio_is_one_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    took = {1: (9.0, 12.0, 30.0), 4: (6.0, 1.0, 6.0)}
    runs = [Run(parallel, seconds, 4.0, 30.0, 0.5, 6.0) for parallel, all_s in took.items() for seconds in all_s]
    summary = summarise(runs)
    assert (summary["ratio"], summary["met"]) == (2.0, True)
    print_report(summary)
    assert "one after another / at once: 2.00   goal 1.5: met" in capsys.readouterr().out
