"""The papers' benches: verdicts follow from figures, the report says what was not measured, and the vTPM's calls really happen."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.bench import paper, paper_kvm, paper_kvm_report, paper_sgx_report, verdicts
from sealane.bench.paper_kvm import CpuPeak, busiest, method_of
from sealane.bench.paper_sgx_calls import CALLS, IMAGE_WAYS, measure_calls, measure_images, part_medians
from sealane.bench.turns import in_turn
from sealane.testing.problems import RigError
from tests.bench.reports import TOTALS, kvm_report, sgx_report


def verdict(report: dict[str, Any], where: str, claim: str) -> str:
    (found,) = [each for each in report["claims"] if each["where"] == where and each["claim"].startswith(claim)]
    return str(found["verdict"])


def test_the_interval_has_99_percent() -> None:
    """Places from either end, as tables of the sign test have them."""
    for count, place in ((3, 0), (7, 0), (8, 0), (11, 0), (12, 1), (15, 2), (20, 3), (45, 13), (100, 36)):
        assert verdicts.interval([float(value) for value in range(count)]) == (place, count - 1 - place), count
    with pytest.raises(ValueError, match="no values"):
        verdicts.interval([])


def test_the_interval_has_what_it_says() -> None:
    chance, missed = random.Random(5), 0
    for _ in range(2000):
        low, high = verdicts.interval([chance.expovariate(1) for _ in range(15)])
        missed += not low <= math.log(2) <= high
    assert missed <= 40, "1 % of 2000 is 20"


def test_a_difference_is_on_one_side_or_within_the_margin() -> None:
    assert verdicts.judge_below([100, 101, 102], [120, 121, 122]) == "holds"
    assert verdicts.judge_below([120, 121, 122], [100, 101, 102]) == "fails"
    assert verdicts.judge_below([100, 101, 102], [103, 104, 105]) == "holds", "by however little"
    assert verdicts.judge_below([100, 101, 102], [103, 100, 103]) == "alike", (
        "less than the margin, now this way, now that"
    )
    assert verdicts.judge_below([80, 100, 120], [110, 90, 150]) == "undecided", "now this way, now that"
    assert verdicts.judge_below([80, 200, 1200], [100, 250, 1500]) == "holds", "of one round, not of all"
    assert verdicts.judge_below([10, 10, 10], [12, 8, 12], least=5) == "alike", "less than can be measured"
    assert verdicts.judge_below([], []) == "undecided"
    assert verdicts.judge_below([100, 100], [200, 200]) == "undecided", "two values have no spread to speak of"
    with pytest.raises(ValueError, match="zip"):
        verdicts.judge_below([1, 2, 3], [1, 2])
    assert verdicts.difference([100, 101, 102], [120, 120, 123], "ms") == "+20 ms (+19 to +21) in 3 rounds"


def test_one_round_in_many_does_not_decide() -> None:
    many = [100.0] * 20
    assert verdicts.judge_below(many, [150.0] * 18 + [10.0] * 2) == "holds"
    assert verdicts.judge_below(many, [150.0] * 14 + [10.0] * 6) == "undecided"


def test_what_is_at_most_so_much() -> None:
    assert verdicts.judge_at_most([10, 10], 20) == "undecided"
    assert verdicts.judge_at_most([10, 11, 12], 20) == "holds"
    assert verdicts.judge_at_most([10, 11, 12], 10.5) == "undecided"
    assert verdicts.judge_at_most([10, 11, 12], 5) == "fails"


def test_respects_are_judged_together() -> None:
    assert verdicts.in_every_respect(["holds", "holds"]) == "holds"
    assert verdicts.in_every_respect(["holds", "undecided"]) == "undecided"
    assert verdicts.in_every_respect(["holds", "undecided", "fails"]) == "fails"
    assert verdicts.in_every_respect(["holds", "alike"]) == "fails"
    assert verdicts.in_every_respect([]) == "undecided"


pairs = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=12)


@given(pairs, st.floats(0, 100))
def test_what_holds_one_way_fails_the_other(rounds: list[tuple[float, float]], least: float) -> None:
    contrary = {"holds": "fails", "fails": "holds", "alike": "alike", "undecided": "undecided"}
    first, second = [one for one, _ in rounds], [other for _, other in rounds]
    told = verdicts.judge_below(first, second, least=least)
    assert verdicts.judge_below(second, first, least=least) == contrary[told]
    assert verdicts.judge_below(first, first, least=least) == ("alike" if len(rounds) >= 3 else "undecided")


@given(st.lists(st.integers(), min_size=1, max_size=9), st.integers(0, 30))
def test_every_way_is_in_every_place(ways: list[int], number: int) -> None:
    rounds = [in_turn(ways, number + more) for more in range(len(ways))]
    assert all(sorted(each) == sorted(ways) for each in rounds)
    assert [sorted(place) for place in zip(*rounds, strict=True)] == [sorted(ways)] * len(ways)


def test_the_papers_order_is_judged() -> None:
    report = kvm_report()
    for number in (11, 12, 13, 14, 15, 16):
        assert verdict(report, f"figure {number}", "Normal < Modified") == "holds"
        assert verdict(report, f"figure {number}", "Modified (hrt) < ssl") == "holds"
    assert verdict(report, "figures 11 to 16", "Modified is cheaper") == "holds"
    assert verdict(report, "table 1", "about 75 %") == "holds"
    assert verdict(kvm_report(TOTALS | {"hrt": 600.0}), "figure 11", "Normal < Modified") == "fails"
    assert verdict(kvm_report(TOTALS | {"hrt": 4000.0}), "figures 11 to 16", "Modified is cheaper") == "fails"
    assert verdict(kvm_report(TOTALS | {"hrt": 900.0}), "figure 11", "Normal < Modified") == "alike"


def test_two_runs_say_the_same() -> None:
    lines, agrees = verdicts.compare(kvm_report(seed=1), kvm_report(seed=2))
    assert agrees
    assert "CONTRADICTED" not in "\n".join(lines)
    lines, agrees = verdicts.compare(kvm_report(), kvm_report(TOTALS | {"tls": 1200.0}, noise=0.5))
    assert agrees, "what one run leaves undecided contradicts nothing"
    assert "decided in one run" in lines[0]
    lines, agrees = verdicts.compare(kvm_report(), kvm_report(TOTALS | {"normal": 1100.0}, noise=0.02))
    assert agrees, "what one run cannot tell apart contradicts nothing"
    assert "told apart in one run" in lines[0]
    lines, agrees = verdicts.compare(kvm_report(), kvm_report(TOTALS | {"hrt": 600.0}))
    assert not agrees
    assert "CONTRADICTED" in lines[0]


def test_the_reports_are_markdown_with_the_papers_values() -> None:
    for lines in (paper_kvm_report.as_markdown(kvm_report()), paper_sgx_report.as_markdown(sgx_report())):
        text = "\n".join(lines)
        for line in text.splitlines():
            assert len(line) <= 132 or line.startswith(("|", "-")), line
    text = "\n".join(paper_kvm_report.as_markdown(kvm_report()))
    for wanted in (
        "### Figure 11",
        "### Figure 16",
        "| the paper | 9560 | 54594028 | 75.23 printed; 71.7 by its own counts |",
        "ssh tunnel",
    ):
        assert wanted in text
    text = "\n".join(paper_sgx_report.as_markdown(sgx_report()))
    assert "| 1 | 23132 | 23476 | 23563 | 2002 (2000 to 2004) |" in text
    assert text.count("not measured") > 5
    assert "simulated" in text


def test_what_went_wrong_is_told() -> None:
    given_up = {"load": "write", "memory_mib": 512, "way": "rc4", "round": 2}
    text = "\n".join(
        paper_kvm_report.as_markdown(kvm_report() | {"broken_off": ["512 MB: no QEMU"], "not_arrived": [given_up]})
    )
    assert "Broken off: 512 MB: no QEMU" in text
    assert "Given up: rc4, 512 MB" in text
    assert "Broken off: VM 3" in "\n".join(paper_sgx_report.as_markdown(sgx_report(broken_off=["VM 3: no TPM"])))


def test_nothing_measured_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_guest(load: str, memory: int) -> None:
        raise RigError(f"no guest of {memory} MB")

    monkeypatch.setattr(paper_kvm, "_guest_of", no_guest)
    assert paper_kvm.main(["--quick"]) == paper.NO_REPORT
    assert "no guest of 128 MB" in capsys.readouterr().err


def test_a_way_that_was_not_measured_is_not_judged() -> None:
    report = kvm_report({way: total for way, total in TOTALS.items() if way != "ssh"})
    assert not [each for each in report["claims"] if "ssh" in each["claim"]]
    assert "ssh tunnel" not in "\n".join(paper_kvm_report.as_markdown(report))


def test_the_second_papers_claims() -> None:
    report = sgx_report()
    assert verdict(report, "figure 11", "write: Normal < KVM") == "holds"
    assert verdict(report, "figure 12", "tpm_state_read: SGX adds at most 12 us") == "holds"
    assert verdict(report, "table 2", "KVM adds less than 0.5 s") == "holds"
    assert verdict(report, "table 2", "SGX adds about 1.4 %") == "fails"
    slow = {name: {"open": [50.0] * 5, "enclave": [500.0] * 5} for name in CALLS}
    assert verdict(sgx_report(calls_us=slow), "figure 13", "volatile_state_enc") == "fails"
    for each in report["claims"]:
        assert "SGX" not in each["claim"] or "SGX" in each["why"], "what stands in SGX's place says so"


def test_shown_again_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now, before, other = (tmp_path / name for name in ("now.json", "before.json", "other.json"))
    now.write_text(json.dumps(kvm_report()))
    before.write_text(json.dumps(kvm_report(TOTALS | {"hrt": 600.0})))
    assert paper_kvm.main(["--from", str(now), "--against", str(now)]) == 0
    assert "Against an earlier run" in capsys.readouterr().out
    assert paper_kvm.main(["--from", str(now), "--against", str(before)]) == 1
    other.write_text(json.dumps(sgx_report()))
    assert paper_kvm.main(["--from", str(other)]) == paper.NO_REPORT
    with pytest.raises(RigError):
        paper.read_report(tmp_path / "nothing", "paper-kvm")


def test_the_ways() -> None:
    assert method_of("tls").tls
    assert method_of("ssh", "unix:/there").through == "unix:/there"
    assert not method_of("normal", "unix:/there").through
    options = method_of("hrt").options
    assert options is not None
    assert (options["protection"], options["i_know_this_is_weak"], options["reduce"]) == ("hrt", True, False)


@pytest.mark.parametrize(
    ("seen", "percent"),
    [
        ([(0, 0), (18, 20)], 90.0),  # shorter than a stretch: all of it
        ([(0, 0), (0, 20), (20, 40), (40, 60), (60, 80), (60, 100)], 100.0),  # the busy ones are three in a row
        ([(0, 0), (20, 20), (20, 40), (40, 60), (40, 80)], 100 * 40 / 60),
        ([(0, 0), (0, 100), (50, 200)], 50.0),  # it was looked at more rarely
        ([(7, 7), (7, 7)], 0.0),
    ],
)
def test_the_busiest_stretch(seen: list[tuple[int, int]], percent: float) -> None:
    assert busiest(seen, 60) == pytest.approx(percent)


def test_peak_of_the_machine() -> None:
    with CpuPeak() as peak:
        sum(range(200_000))
    assert 0 <= peak.percent <= 100
    assert peak.busy_s >= 0


def test_parts_are_judged_by_their_medians() -> None:
    assert part_medians([float(value) for value in range(96)]) == [8 * part + 3.5 for part in range(12)]
    assert len(part_medians([1.0] * 100)) == 12
    assert part_medians([3.0, 1.0]) == [3.0, 1.0]
    assert part_medians([]) == []


@pytest.mark.skipif(not shutil.which("swtpm_setup"), reason="swtpm is not here")
def test_the_calls_of_figures_11_to_13() -> None:
    images = measure_images(2)
    assert tuple(images) == ("write", "read")
    assert all(tuple(ways) == IMAGE_WAYS for ways in images.values())
    found = measure_calls(2)
    assert tuple(found) == CALLS
    assert all(len(values) == 2 and min(values) > 0 for ways in found.values() for values in ways.values())
