"""What the micro-benchmarks share: bytes a second on one core, repeated, with goals beside the figures.

A figure is bytes by CPU seconds of the one thread that does the work, so that other work on the machine does not count;
what it does to caches and to the clock still does. Medians of many short runs, and the best of them.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

GB: Final = 1e9


@dataclass(frozen=True)
class Task:
    """One thing to measure: `work` handles `size_bytes` each time it is called; `goal` in GB/s, None for context."""

    name: str
    size_bytes: int
    work: Callable[[], object]
    goal: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """What a task reached, in GB/s (10^9 bytes) of one core."""

    name: str
    median_gb_per_s: float
    best_gb_per_s: float
    goal_gb_per_s: float | None
    note: str

    @property
    def met(self) -> bool:
        """Whether the median reaches the goal; true where there is none."""
        return self.goal_gb_per_s is None or self.median_gb_per_s >= self.goal_gb_per_s


def measure(task: Task, *, seconds: float, repeats: int = 15) -> Figure:
    """Run the task in `repeats` slices of about `seconds` in all, after one call that does not count."""
    task.work()
    once = _cpu_s(task.work, 1)
    calls = max(1, int(seconds / repeats / max(once, 1e-6)))
    rates = [calls * task.size_bytes / _cpu_s(task.work, calls) / GB for _ in range(repeats)]
    return Figure(task.name, round(statistics.median(rates), 2), round(max(rates), 2), task.goal, task.note)


def _cpu_s(work: Callable[[], object], calls: int) -> float:
    began = time.thread_time()
    for _ in range(calls):
        work()
    return max(time.thread_time() - began, 1e-9)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_model(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def cpu_model() -> str:
    """The processor's name for itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def run(name: str, about: str | None, tasks: Callable[[], Iterable[Task]], arguments: Sequence[str]) -> int:
    """One micro-benchmark's command: measure, print the table, say what falls short, write JSON where asked."""
    parser = argparse.ArgumentParser(prog=f"./run bench {name}", description=about)
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to measure each (default 1)")
    options = parser.parse_args(arguments)
    where = machine()
    print(f"{where['cpu']}, Python {where['python']}, load {where['load before']}\n", flush=True)
    print(f"{'GB/s of one core':68} {'median':>7} {'best':>7} {'goal':>6}", flush=True)
    figures = []
    for task in tasks():
        figures.append(measure(task, seconds=options.seconds))
        _say(figures[-1])
    print("\n" + "\n".join(verdict(figures)))
    if options.json:
        report: dict[str, Any] = {"command": " ".join(["./run bench", name, *arguments]), "machine": where}
        report["figures"] = [asdict(figure) for figure in figures]
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _say(figure: Figure) -> None:
    goal = "" if figure.goal_gb_per_s is None else f"{figure.goal_gb_per_s:6.1f}"
    missed = "" if figure.met else "  MISSED"
    note = f"  {figure.note}" if figure.note else ""
    print(
        f"{figure.name:68} {figure.median_gb_per_s:7.2f} {figure.best_gb_per_s:7.2f} {goal:>6}{missed}{note}",
        flush=True,
    )


def verdict(figures: Sequence[Figure]) -> list[str]:
    """The last words: all goals met, or each that was not and by how much."""
    missed = [figure for figure in figures if not figure.met]
    if not missed:
        return ["all goals met"]
    return [
        "falls short:",
        *(
            f"  {figure.name}: {figure.median_gb_per_s:g} GB/s, goal {figure.goal_gb_per_s:g}"
            f" ({figure.median_gb_per_s / (figure.goal_gb_per_s or 1):.0%})"
            for figure in missed
        ),
    ]
