"""`./run bench link`: a guest that holds real files, moved over a slow link by QEMU's own ways and by Sealane's.

Two hosts in network namespaces, a token bucket (tbf) at each end of the link between them. The guest's memory: programs and
libraries (ELF) and text of this machine in the page cache, a heap of mixed pages (`guest/worker.c`, FILL_MIXED), a kernel, and
zero pages. Ways alternate within each round; figures are medians. A second guest rewrites what its pages hold already, faster
than the link carries: whether a way ends at all is what is asked of it.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from sealane.bench.line import limit_line
from sealane.bench.micro import cpu_model
from sealane.bench.migrate import FREED_MEMORY_SETTLES_S
from sealane.bench.movers import Method, Run, move
from sealane.testing.guest.files import Files
from sealane.testing.hosts import INTERFACE
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair
from sealane.testing.qemu import find_qemu

GOALS: Final = {"sealed / plain": 0.60, "sealed / multifd-zstd": 0.95}
_CHANNELS: Final = 2
# The guest that rewrites: its pages take 1.1 s of a 1 Gb/s link, QEMU's limit for the pause is 0.3 s, and all are dirty again
# after 0.32 s.
_TOUCHED_MIB: Final = 128
_TOUCHED_KIB_PER_S: Final = 400 * 1024
_GIVE_UP_S: Final = 20.0
_SETTINGS: Final = 'allowed_protections = ["sealed", "selective", "hrt", "shift", "affine", "rc4"]\n'


def _sealane(name: str, channels: int = 0, **options: object) -> Method:
    known = {"i_know_this_is_weak": True} if "protection" in options else {}
    return Method(name, channels, options=options | known)


METHODS: Final = {
    method.name: method
    for method in (
        Method("plain"),
        Method("tls", tls=True),
        Method("multifd-plain", _CHANNELS),
        Method("multifd-zstd", _CHANNELS, compression="zstd"),
        _sealane("sealed"),
        _sealane("sealed-multifd", _CHANNELS),
        _sealane("sealed-no-reduce", reduce=False),
        _sealane("hrt", protection="hrt"),
        _sealane("hrt-no-reduce", protection="hrt", reduce=False),
        _sealane("selective", protection="selective"),
        _sealane("selective-no-reduce", protection="selective", reduce=False),
    )
}
_TITLES: Final = {
    "plain": "QEMU plain",
    "tls": "QEMU TLS",
    "multifd-plain": "QEMU multifd 2",
    "multifd-zstd": "QEMU multifd 2, zstd",
    "sealed": "Sealane",
    "sealed-multifd": "Sealane, multifd 2",
    "sealed-no-reduce": "Sealane, --no-reduce",
    "hrt": "Sealane hrt",
    "hrt-no-reduce": "Sealane hrt, --no-reduce",
    "selective": "Sealane selective",
    "selective-no-reduce": "Sealane selective, --no-reduce",
}


def main(arguments: Sequence[str]) -> int:
    """Run the bench, print the table, write JSON and chart where asked."""
    options = _parse(arguments)
    qemu = find_qemu()
    report: dict[str, Any] = {
        "command": "./run bench " + " ".join(["link", *arguments]),
        "machine": {
            "qemu": ".".join(map(str, qemu.version)),
            "cpu": cpu_model(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "guest": {
            "memory_mib": options.memory,
            "programs_mib": options.programs,
            "text_mib": options.text,
            "heap_mib": options.heap,
            "heap": "of eight pages two random, three text, two records of pointers and small numbers, one zero",
            "rate_mbit": options.rate,
            "rounds": options.rounds,
        },
    }
    runs = _measure_files(options) if not options.only_rewriting else []
    rewriting = _measure_rewriting(options) if options.rewriting or options.only_rewriting else []
    report |= {"summary": summarise(runs), "rewriting": [asdict(run) for run in rewriting]}
    report["runs"] = [asdict(run) for run in runs]
    print("\n".join(describe(report)))
    if options.json:
        path = Path(options.json)
        path.write_text(json.dumps(report, indent=1) + "\n")
        if runs:
            draw(report, path.with_suffix(".png"))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench link", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all runs and the summary; a chart (PNG) goes beside it")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is taken (default 3)")
    parser.add_argument("--rate", type=int, default=1000, metavar="MBIT", help="the link, Mb/s (default 1000)")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="the guest's memory (default 1024)")
    parser.add_argument("--programs", type=int, default=160, metavar="MIB", help="programs and libraries (default 160)")
    parser.add_argument("--text", type=int, default=80, metavar="MIB", help="text files (default 80)")
    parser.add_argument("--heap", type=int, default=256, metavar="MIB", help="a heap of mixed pages (default 256)")
    parser.add_argument("--ways", nargs="+", choices=METHODS, default=list(METHODS), help="only these")
    parser.add_argument("--rewriting", action="store_true", help="also the guest that rewrites equal content")
    parser.add_argument("--only-rewriting", action="store_true", help="that guest alone")
    return parser.parse_args(arguments)


def _measure_files(options: argparse.Namespace) -> list[Run]:
    """All rounds over the guest with real files, after one round that does not count."""
    files = Files(options.programs, options.text)
    workload = Workload(fill_mib=options.heap, fill="mixed", tick_ms=1000, files=files)
    methods = [METHODS[name] for name in options.ways]
    runs: list[Run] = []
    with _guest_on_link(options, workload, methods) as course:
        for number in range(options.rounds + 1):
            for method in methods:
                time.sleep(FREED_MEMORY_SETTLES_S)
                run = course.move(method)
                _say("warm-up" if not number else f"round {number}", run)
                if number:
                    runs.append(run)
    return runs


def _measure_rewriting(options: argparse.Namespace) -> list[Run]:
    """Both ways once over a guest whose pages are dirtied faster than the link carries and never change."""
    workload = Workload(fill_mib=_TOUCHED_MIB, tick_ms=20, touch_kib_per_s=_TOUCHED_KIB_PER_S)
    methods = [replace(METHODS[name], converge_s=_GIVE_UP_S) for name in ("plain", "sealed")]
    runs = []
    with _guest_on_link(options, workload, methods) as course:
        for method in methods:
            runs.append(course.move(method))
            _say("rewriting", runs[-1])
    return runs


@dataclass
class _Course:
    """A guest between two hosts; it moves to the other one each time."""

    pair: HostPair
    guest: Guest
    source: AgentHost
    destination: AgentHost

    def move(self, method: Method) -> Run:
        """Move it, and count what the link carried (both directions, with all headers) instead of what an end says."""
        before = _link_bytes(self.source)
        run = move(self.pair, self.guest, self.source, self.destination, method)
        run.bytes_sent = _link_bytes(self.source) - before
        if run.completed:
            self.source, self.destination = self.destination, self.source
        return run


@contextmanager
def _guest_on_link(options: argparse.Namespace, workload: Workload, methods: Sequence[Method]) -> Iterator[_Course]:
    """Two hosts, a link of the rate asked for, and a guest that runs on the first."""
    is_weak = any((method.options or {}).get("protection") for method in methods)
    qemu = find_qemu()
    with make_pair(network="netns", settings=_SETTINGS if is_weak else "") as pair:
        if is_weak:
            for end in (pair.a, pair.b):
                _allow_weak(end)
        limit_line(pair, options.rate)
        guest = pair.add_guest(hardware=Hardware(memory_mib=options.memory), workload=workload, qemu=qemu)
        pair.start_guest(guest, pair.a, warm=False)
        yield _Course(pair, guest, pair.a, pair.b)


def _allow_weak(end: AgentHost) -> None:
    """A host without policies of its own permits `sealed` alone."""
    directory = end.host.paths.config / "policy"
    directory.mkdir()
    (directory / "bench.cedar").write_text('@id("bench") permit (principal, action, resource);')


def _link_bytes(end: AgentHost) -> int:
    shown = json.loads(end.host.run("ip", "-s", "-j", "link", "show", "dev", INTERFACE).stdout)
    counters = shown[0]["stats64"]
    return int(counters["tx"]["bytes"]) + int(counters["rx"]["bytes"])


def _say(label: str, run: Run) -> None:
    end = "" if run.completed else "   GIVEN UP, it still runs at the source"
    print(
        f"{label:9} {_TITLES[run.way]:32} {run.total_ms:7.0f} ms   down {run.downtime_ms:5.0f} ms   "
        f"{run.bytes_sent / 1e6:6.0f} MB   {run.iterations} rounds{end}",
        flush=True,
    )


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians by way, and the ratios that have goals; plain shapes for JSON."""
    names = [name for name in METHODS if any(run.way == name for run in runs)]
    medians = {name: _medians([run for run in runs if run.way == name]) for name in names}
    ratios = {}
    for what in GOALS:
        ours, theirs = what.split(" / ")
        if ours in medians and theirs in medians:
            ratios[what] = round(medians[ours]["total_ms"] / medians[theirs]["total_ms"], 3)
    return {"medians": medians, "ratios": ratios, "goals": {what: GOALS[what] for what in ratios}}


def _medians(runs: Sequence[Run]) -> dict[str, Any]:
    totals = [run.total_ms for run in runs]
    processes = sorted({name for run in runs for name in run.cpu_s})
    return {
        "total_ms": round(statistics.median(totals), 1),
        "total_ms_spread": [round(min(totals), 1), round(max(totals), 1)],
        "downtime_ms": round(statistics.median(run.downtime_ms for run in runs), 1),
        "bytes_link": int(statistics.median(run.bytes_sent for run in runs)),
        "cpu_s": {name: round(statistics.median(run.cpu_s.get(name, 0.0) for run in runs), 3) for name in processes},
    }


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """The table, and in words where a goal was missed."""
    summary = report["summary"]
    if summary["medians"]:
        yield f"\n{'median of rounds':32} {'total, ms':>10} {'(spread)':>15} {'down, ms':>9} {'link, MB':>9}  CPU, core-s"
    for name, median in summary["medians"].items():
        low, high = median["total_ms_spread"]
        cpu = ", ".join(f"{process} {seconds:.2f}" for process, seconds in median["cpu_s"].items() if seconds >= 0.01)
        yield (
            f"{_TITLES[name]:32} {median['total_ms']:10.0f} {f'({low:.0f} to {high:.0f})':>15} {median['downtime_ms']:9.0f} "
            f"{median['bytes_link'] / 1e6:9.0f}  {sum(median['cpu_s'].values()):.2f}: {cpu}"
        )
    for what, value in summary["ratios"].items():
        goal = summary["goals"][what]
        verdict = "met" if value <= goal else f"MISSED by {value - goal:.2f}"
        yield f"total, {what}: {value:.2f}, goal at most {goal:.2f}: {verdict}"
    for run in report["rewriting"]:
        words = f"moved in {run['total_ms']:.0f} ms" if run["completed"] else f"given up after {run['total_ms']:.0f} ms"
        megabytes = f"{run['bytes_sent'] / 1e6:.0f} MB"
        yield f"equal content rewritten, {_TITLES[run['way']]}: {words}, {run['iterations']} rounds, {megabytes}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Total time, bytes and CPU by way."""
    import matplotlib  # noqa: PLC0415 - a heavy import, for this function alone

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    medians = report["summary"]["medians"]
    names = list(medians)[::-1]
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 0.4 * len(names) + 1.6), sharey=True)
    values: dict[str, list[float]] = {
        "total time, s": [medians[name]["total_ms"] / 1e3 for name in names],
        "downtime, ms": [medians[name]["downtime_ms"] for name in names],
        "bytes on the link, MB": [medians[name]["bytes_link"] / 1e6 for name in names],
        "CPU of all processes, core-s": [sum(medians[name]["cpu_s"].values()) for name in names],
    }
    colours = ["#8a8f98" if METHODS[name].options is None else "#2f6f9f" for name in names]
    for axis, (title, bars) in zip(axes, values.items(), strict=True):
        axis.barh([_TITLES[name] for name in names], bars, color=colours)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    guest, machine = report["guest"], report["machine"]
    figure.suptitle(
        f"{guest['memory_mib']} MiB guest: {guest['programs_mib']} MiB of programs, {guest['text_mib']} of text,"
        f" {guest['heap_mib']} of mixed heap; {guest['rate_mbit']} Mb/s; QEMU {machine['qemu']}, {machine['cpu']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
