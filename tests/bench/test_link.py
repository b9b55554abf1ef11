"""The link bench's arithmetic and words; that it runs is shown by running it."""

from dataclasses import asdict

from sealane.bench.link import METHODS, describe, summarise
from sealane.bench.movers import Run


def _run(way: str, total_ms: float, *, completed: bool = True) -> Run:
    return Run(way, 0, total_ms, 10.0, 1_000_000, cpu_s={"qemu source": 0.5}, completed=completed, iterations=7)


def test_medians_ratios_and_what_falls_short() -> None:
    runs = [_run("plain", total) for total in (900.0, 1000.0, 5000.0)]
    runs += [_run("multifd-zstd", 600.0), _run("sealed", 580.0)]
    summary = summarise(runs)
    assert summary["medians"]["plain"]["total_ms"] == 1000.0
    assert summary["medians"]["plain"]["total_ms_spread"] == [900.0, 5000.0]
    assert summary["ratios"] == {"sealed / plain": 0.58, "sealed / multifd-zstd": 0.967}
    text = "\n".join(describe({"summary": summary, "rewriting": []}))
    assert "sealed / plain: 0.58, goal at most 0.60: met" in text
    assert "MISSED by 0.02" in text


def test_a_way_that_was_given_up_is_told_as_that() -> None:
    rewriting = [asdict(_run("plain", 20_000.0, completed=False)), asdict(_run("sealed", 900.0))]
    text = "\n".join(describe({"summary": summarise([]), "rewriting": rewriting}))
    assert "QEMU plain: given up after 20000 ms, 7 rounds" in text
    assert "Sealane: moved in 900 ms" in text


def test_every_way_is_told_apart() -> None:
    assert len(
        {(method.channels, method.tls, method.compression, str(method.options)) for method in METHODS.values()}
    ) == len(METHODS)
