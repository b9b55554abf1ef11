"""`./run bench evacuate`: a host is emptied several VMs at once, and one after the other.

Small guests, `sealane evacuate --all` with `--parallel N` and with `--parallel 1`, in turn, to and fro between two hosts. The
figure is the ratio of the medians of what the command took; beside it stands how busy the machine was, since two hosts on
one machine share its cores. Nothing fails for a figure.
"""

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sealane.bench.micro import cpu_model
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import PROGRAM, AgentHost, Guest, HostPair, make_pair
from sealane.testing.problems import RigError

GOAL: Final = 1.5
_TIMEOUT_S: Final = 600.0


@dataclass
class Run:
    """One evacuation: seconds of the command, of the VMs' own migrations in sum, and what the machine's cores did meanwhile."""

    parallel: int
    took_s: float
    migrations_s: float
    downtime_ms: float
    busy: float
    core_s: float


def main(arguments: Sequence[str]) -> int:
    """Run the bench, print the table, write JSON where asked."""
    options = _parse(arguments)
    print(f"{options.vms} VMs of {options.memory} MiB with {options.fill} MiB of data; {cpu_model()}", flush=True)
    runs = _measure(options)
    report = {
        "command": "./run bench " + " ".join(["evacuate", *arguments]),
        "vms": options.vms,
        "memory_mib": options.memory,
        "fill_mib": options.fill,
        "rate_mb_per_s": options.rate,
        "cpus": cpu_model(),
        "summary": summarise(runs),
        "runs": [asdict(run) for run in runs],
    }
    print_report(report["summary"])
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench evacuate", description=__doc__)
    parser.add_argument("--vms", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--parallel", type=int, default=4, help="how many at once (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is taken (default 3)")
    parser.add_argument("--memory", type=int, default=128, metavar="MIB", help="a guest's memory (default 128)")
    parser.add_argument("--fill", type=int, default=32, metavar="MIB", help="random data in it (default 32)")
    parser.add_argument(
        "--rate", type=int, default=0, metavar="MB/S", help="each migration's bound, as hosts set one (default none)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all runs and the summary")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace) -> list[Run]:
    settings = f"[limits]\noutgoing_max = {options.parallel}\noutgoing_per_peer_max = {options.parallel}\n"
    settings += f"migrations_per_peer_max = {max(8, options.parallel)}\n"
    settings += f"rate_max_bytes_per_s = {options.rate * 1_000_000}\n"
    runs: list[Run] = []
    with make_pair(settings=settings) as pair:
        guests = [_guest(pair, number, options) for number in range(1, options.vms + 1)]
        source, destination = pair.a, pair.b
        for number in range(2 * options.rounds + 1):
            parallel = 1 if number % 2 else options.parallel
            run = _evacuate(source, destination, parallel)
            for guest in guests:
                guest.moved_to(destination.name)
                guest.wait_ticks(1, timeout_s=60.0)
            source, destination = destination, source
            label = "warm-up" if not number else f"round {(number + 1) // 2}"
            print(f"{label:8} {_words(run)}", flush=True)
            if number:  # the first one warms caches
                runs.append(run)
    return runs


def _guest(pair: HostPair, number: int, options: argparse.Namespace) -> Guest:
    hardware, workload = Hardware(memory_mib=options.memory), Workload(fill_mib=options.fill, tick_ms=500)
    guest = pair.add_guest(f"web{number:02}", hardware=hardware, workload=workload)
    pair.start_guest(guest, pair.a)
    return guest


def _evacuate(source: AgentHost, destination: AgentHost, parallel: int) -> Run:
    argv = [*PROGRAM, "evacuate", destination.name, "--all", "--parallel", str(parallel), "--json"]
    idle_before, all_before = _processor_ticks()
    done = subprocess.run(
        [*source.host.launcher, *argv],
        env=source.host.environment(),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    idle, everything = _processor_ticks()
    if done.returncode:
        raise RigError(f"an evacuation did not succeed: {done.stdout[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Run(
        parallel=parallel,
        took_s=told["took_s"],
        migrations_s=sum(vm["total_ms"] for vm in told["vms"]) / 1e3,
        downtime_ms=statistics.median(vm["downtime_ms"] for vm in told["vms"]),
        busy=1.0 - (idle - idle_before) / max(1, everything - all_before),
        core_s=(everything - all_before - idle + idle_before) / os.sysconf("SC_CLK_TCK"),
    )


def _processor_ticks() -> tuple[int, int]:
    """Idle and all ticks of the machine's cores (proc(5): user nice system idle iowait irq softirq steal)."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians of both ways and the ratio of what the command took."""
    ways: dict[int, list[Run]] = {}
    for run in runs:
        ways.setdefault(run.parallel, []).append(run)
    medians = {
        parallel: {name: round(statistics.median(getattr(run, name) for run in found), 3) for name in _FIGURES}
        for parallel, found in sorted(ways.items())
    }
    at_once = max(medians)
    ratio = round(medians[1]["took_s"] / medians[at_once]["took_s"], 2)
    return {"medians": medians, "ratio": ratio, "goal": GOAL, "met": ratio >= GOAL}


_FIGURES: Final = ("took_s", "migrations_s", "downtime_ms", "busy", "core_s")


def _words(run: Run) -> str:
    return (
        f"{run.parallel} at once: {run.took_s:6.2f} s   migrations in sum {run.migrations_s:6.2f} s   "
        f"down {run.downtime_ms:4.0f} ms   cores {run.busy:4.0%} busy, {run.core_s:5.1f} core-s"
    )


def print_report(summary: dict[str, Any]) -> None:
    """The medians, the ratio, and what bounds it."""
    print()
    for parallel, figures in summary["medians"].items():
        print(f"  {_words(Run(parallel=parallel, **figures))}")
    verdict = "met" if summary["met"] else "MISSED"
    print(f"\none after another / at once: {summary['ratio']:.2f}   goal {summary['goal']:g}: {verdict}")
    busiest = max(figures["busy"] for figures in summary["medians"].values())
    print(f"the cores, which both hosts share here, were {busiest:.0%} busy at most")
