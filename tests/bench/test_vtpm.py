"""`./run bench vtpm` measures what it says, of real swtpms and keepers; no figure is asserted."""

import itertools
from pathlib import Path

import pytest

from sealane.bench.vtpm import measure_image, measure_operations, print_goals, standard_error
from sealane.vtpm.swtpm import manufacture


def test_image_and_operations_with_and_without_protection(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    image = manufacture(tmp_path / "made")
    rows = measure_image(image, tmp_path, 2) | measure_operations(image, tmp_path, 2)
    assert all(len(values) == 2 for values in rows.values())
    for way, what in itertools.product(("in clear", "Sealane"), ("write", "read")):
        assert f"{what}, {way}" in rows
    ways, states = ("in clear", "swtpm's key", "Sealane"), ("permanent", "volatile")
    for way, state, what in itertools.product(ways, states, ("reads", "brings")):
        assert f"QEMU {what} {state}, {way}" in rows
    alone = ("tpm_state_read", "tpm_state_write", "volatile_state_enc", "volatile_state_dec")
    for name, state in itertools.product(alone, states):
        assert any(row.startswith(f"{name}, {state}") for row in rows)


@pytest.mark.parametrize(
    ("total", "downtime", "said"), [(1010.0, 115.0, ["met", "met"]), (1020.0, 130.0, ["+0.5%", "+10.0 ms"])]
)
def test_what_falls_short_is_said(
    total: float, downtime: float, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"none, total": [1000.0], "none, downtime": [100.0], "swtpm, total": [1000.0], "swtpm, downtime": [100.0]}
    print_goals({**plain, "sealane, total": [total], "sealane, downtime": [downtime]})
    line = next(line for line in capsys.readouterr().out.splitlines() if "goal" in line)
    assert [part.rpartition(": ")[2].removeprefix("MISSED by ") for part in line.split(";")] == said


def test_a_difference_is_told_with_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert standard_error([1.0], [1.0, 2.0]) == 0.0
    assert standard_error([90.0, 110.0], [100.0, 100.0]) == pytest.approx(10.0)
    rows = {f"{way}, {what}": [90.0, 110.0] for way in ("none", "swtpm", "sealane") for what in ("total", "downtime")}
    print_goals(rows)
    means = capsys.readouterr().out.partition("same round")[0]
    assert means.count("+-14.1") == 4
