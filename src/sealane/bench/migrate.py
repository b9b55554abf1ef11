"""`./run bench migrate`: one guest moved in turn by QEMU plain, QEMU TLS (PSK) and Sealane.

Single-stream and multifd, alternating within each round so that whatever else the machine does falls on all alike. All
go the same way, each after a plain move back that is not counted: what a destination's memory costs depends on where the
memory lay that was freed last. The figures are medians; the ratios are ratios of medians. Goals are printed beside what
was reached; nothing fails for a figure.
"""

import argparse
import json
import mmap
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from sealane.bench.micro import cpu_model
from sealane.bench.movers import WAYS, Method, Run, Way, move
from sealane.limits import MIB
from sealane.testing.accel import choose_accel
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import make_pair
from sealane.testing.qemu import find_qemu

GB: Final = 1e9
# Linux reports free pages to the hypervisor two seconds after they were freed (mm/page_reporting.c).
FREED_MEMORY_SETTLES_S: Final = 4.0
BACK: Final = Method("back", 2)
# (what, unpinned single, unpinned multifd 2, pinned single, pinned multifd 2); the sources are in docs/performance.md
GOALS: Final = {
    "total / plain": (1.10, 1.25, 1.10, 1.10),
    "total / tls": (0.40, 0.38, 0.40, 0.38),
    "downtime - plain, ms": (25.0, 25.0, 25.0, 25.0),
    "enclave source, core-s per GB": (0.45, 0.45, 0.45, 0.45),
    "enclave destination, core-s per GB": (0.45, 0.45, 0.45, 0.45),
    "peak RSS of an enclave, MB": (90.0, 90.0, 90.0, 90.0),
}


def main(arguments: Sequence[str]) -> int:
    """Run the bench, print the table, write JSON and chart where asked."""
    options = _parse(arguments)
    qemu = find_qemu()
    accel = choose_accel(options.accel, qemu)
    machine = {"qemu": ".".join(map(str, qemu.version)), "accel": accel.name, "python": platform.python_version()}
    machine |= {"kernel": platform.release(), "cpus": cpu_model(), "pinned": str(options.pin)}
    print(f"QEMU {machine['qemu']} with {accel.name} ({accel.reason}); {machine['cpus']}", flush=True)
    runs = _measure(options, qemu, accel)
    report = {
        "command": "./run bench " + " ".join(["migrate", *arguments]),
        "machine": machine,
        "guest": {
            "memory_mib": options.memory,
            "fill_mib": options.fill,
            "fill": "random",
            "rounds": options.rounds,
            "memory_state": options.memory_state,
        },
        "summary": summarise(runs, options.channels, pinned=options.pin),
        "runs": [asdict(run) for run in runs],
    }
    print_report(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
        from sealane.bench.chart import draw  # noqa: PLC0415 - matplotlib only where a chart is wanted

        draw(report, Path(options.json).with_suffix(".png"))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench migrate", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all runs and the summary; a chart (PNG) goes beside it")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is taken (default 5)")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="the guest's memory (default 1024)")
    parser.add_argument(
        "--fill", type=int, default=668, metavar="MIB", help="incompressible data in it (default 668 MiB = 700 MB)"
    )
    parser.add_argument("--channels", type=int, default=2, help="multifd channels (default 2)")
    parser.add_argument("--pin", action="store_true", help="pin each host's processes to a core of its own")
    parser.add_argument(
        "--memory-state",
        choices=("fresh", "warm"),
        default="fresh",
        help="what the destination's memory is before each run: `fresh`, as on a host that has not touched it (a pause lets"
        " a hypervisor below take back what was freed), or `warm`, touched a moment ago",
    )
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="only these")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace, qemu: Any, accel: Any) -> list[Run]:
    """All rounds, alternating between the ways."""
    runs: list[Run] = []
    pins = ("0", "1") if options.pin else ("", "")
    with make_pair(network="loopback", pins=pins) as pair:
        guest = pair.add_guest(
            hardware=Hardware(memory_mib=options.memory),
            workload=Workload(fill_mib=options.fill, tick_ms=1000),
            qemu=qemu,
            accel=accel,
        )
        pair.start_guest(guest, pair.a, warm=False)
        for number in range(options.rounds + 1):
            for channels in (0, options.channels):
                for way in options.ways:
                    prepare_memory(options.memory_state, options.memory)
                    run = move(pair, guest, pair.a, pair.b, _method(way, channels))
                    move(pair, guest, pair.b, pair.a, BACK)
                    if number:  # the first round warms caches and is not counted
                        runs.append(run)
                    _say(number, run)
    return runs


def _method(way: Way, channels: int) -> Method:
    return Method(way, channels, tls=way == "tls", options={} if way == "sealane" else None)


def prepare_memory(state: str, mebibytes: int) -> None:
    """Make all ways start alike: with free page reporting, what one run freed is costly or cheap by its age alone."""
    if state == "fresh":
        time.sleep(FREED_MEMORY_SETTLES_S)
        return
    with mmap.mmap(-1, (mebibytes + 256) * MIB) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1


def _say(number: int, run: Run) -> None:
    label = "warm-up" if not number else f"round {number}"
    print(
        f"{label:8} {run.way:8} {_mode(run.channels):10} {run.total_ms:7.0f} ms   down {run.downtime_ms:5.0f} ms   "
        f"{run.bytes_sent / 1e6:6.0f} MB",
        flush=True,
    )


def _mode(channels: int) -> str:
    return f"multifd {channels}" if channels else "single"


def summarise(runs: Sequence[Run], channels: int, *, pinned: bool) -> dict[str, Any]:
    """Medians by way and mode, and the figures that have goals; shapes are plain for JSON."""
    summary: dict[str, Any] = {}
    for position, count in enumerate((0, channels)):
        ways = {way: [run for run in runs if (run.way, run.channels) == (way, count)] for way in WAYS}
        medians = {way: _medians(found) for way, found in ways.items() if found}
        figures = _figures(medians)
        goals = {what: goal[position + (2 if pinned else 0)] for what, goal in GOALS.items()}
        met = {what: value <= goals[what] for what, value in figures.items() if what in goals}
        summary[_mode(count)] = {"medians": medians, "figures": figures, "goals": goals, "met": met}
    return summary


def _medians(runs: Sequence[Run]) -> dict[str, Any]:
    names = sorted({name for run in runs for name in run.cpu_s})
    totals = [run.total_ms for run in runs]
    return {
        "total_ms": round(statistics.median(totals), 1),
        "total_ms_spread": [round(min(totals), 1), round(max(totals), 1)],
        "downtime_ms": round(statistics.median(run.downtime_ms for run in runs), 1),
        "whole_ms": round(statistics.median(run.whole_ms or 0.0 for run in runs), 1),
        "bytes_sent": int(statistics.median(run.bytes_sent for run in runs)),
        "cpu_s": {name: round(statistics.median(run.cpu_s.get(name, 0.0) for run in runs), 3) for name in names},
        "peak_rss_bytes": {name: max(run.peak_rss_bytes.get(name, 0) for run in runs) for name in names},
    }


def _figures(medians: Mapping[Way, Any]) -> dict[str, float]:
    ours, plain, tls = medians.get("sealane"), medians.get("plain"), medians.get("tls")
    figures: dict[str, float] = {}
    if ours is None:
        return figures
    gigabytes = ours["bytes_sent"] / GB
    for end in ("enclave source", "enclave destination"):
        figures[f"{end}, core-s per GB"] = round(ours["cpu_s"][end] / gigabytes, 3)
    peaks = [ours["peak_rss_bytes"][end] for end in ("enclave source", "enclave destination")]
    figures["peak RSS of an enclave, MB"] = round(max(peaks) / 1e6, 1)
    if plain is not None:
        figures["total / plain"] = round(ours["total_ms"] / plain["total_ms"], 3)
        figures["downtime - plain, ms"] = round(ours["downtime_ms"] - plain["downtime_ms"], 1)
        figures["whole / plain"] = round(ours["whole_ms"] / plain["whole_ms"], 3)
    if tls is not None:
        figures["total / tls"] = round(ours["total_ms"] / tls["total_ms"], 3)
    return figures


def print_report(report: dict[str, Any]) -> None:
    """The tables, and in words where a goal was missed."""
    missed = []
    for mode, part in report["summary"].items():
        print(f"\n{mode}")
        for way, median in part["medians"].items():
            cpu = ", ".join(f"{name} {seconds:.2f}" for name, seconds in median["cpu_s"].items())
            low, high = median["total_ms_spread"]
            print(
                f"  {way:8} total {median['total_ms']:7.0f} ms ({low:.0f} to {high:.0f})   down {median['downtime_ms']:5.0f} ms"
                f"   {median['bytes_sent'] / 1e6:.0f} MB   CPU s: {cpu}"
            )
        for what, value in part["figures"].items():
            goal = part["goals"].get(what)
            verdict = "" if goal is None else f"   goal {goal:g}: {'met' if part['met'][what] else 'MISSED'}"
            print(f"    {what:38} {value:8.3f}{verdict}")
            if goal is not None and not part["met"][what]:
                missed.append(f"{mode}: {what} is {value:g}, {value - goal:+.3f} against {goal:g}")
    print("\nall goals met" if not missed else "\nfalls short:\n  " + "\n  ".join(missed), file=sys.stdout)
