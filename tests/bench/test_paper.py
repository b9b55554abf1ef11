"""The papers' benches: verdicts follow from figures, and the vTPM's calls really happen."""

import shutil

import pytest

from sealane.bench.paper_kvm import CpuPeak, Sample, verdicts
from sealane.bench.paper_sgx import TABLE_2, measure_calls, more_percent

TOTALS = {"normal": 100.0, "hrt": 120.0, "selective": 115.0, "sealed": 110.0, "rc4": 150.0, "ssl": 300.0}


def samples(totals: dict[str, float]) -> list[Sample]:
    return [
        Sample("write", 128, way, total, total / 10, total / 4, 1) for way, total in totals.items() for _ in range(3)
    ]


def test_the_papers_order_is_judged_by_medians() -> None:
    found = verdicts(samples(TOTALS))
    assert [each["figure"] for each in found] == ["figure 11", "figure 13", "figure 15"]
    assert all(each["normal_below_modified"] and each["modified_below_ssl"] for each in found)
    assert not any(each["normal_below_modified"] for each in verdicts(samples(TOTALS | {"hrt": 90.0})))
    assert not any(each["modified_below_ssl"] for each in verdicts(samples(TOTALS | {"hrt": 400.0})))


def test_the_second_papers_own_table() -> None:
    ways = ("normal", "sealed", "attested")
    rows = [{way: {"median": float(value)} for way, value in zip(ways, row, strict=True)} for row in TABLE_2]
    assert more_percent(rows)["attested"] == pytest.approx(1.4, abs=0.1)


def test_peak_of_the_machine() -> None:
    with CpuPeak() as peak:
        pass
    assert 0 <= peak.percent <= 100


@pytest.mark.skipif(not shutil.which("swtpm_setup"), reason="swtpm is not here")
def test_the_calls_of_figures_11_to_13() -> None:
    found = measure_calls(2)
    assert {"tpm_state_read", "tpm_state_write", "volatile_state_enc", "volatile_state_dec"} < set(found)
    assert all(0 < each["low"] <= each["median"] <= each["high"] for each in found.values())
