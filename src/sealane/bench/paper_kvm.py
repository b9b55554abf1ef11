"""`./run bench paper-kvm`: the measurements of Fan et al. (2016), section 4.2, in the paper's layout and beside its verdicts.

Figures 11 to 16 (total time, downtime, peak CPU; a guest that writes, and one that reads; 128, 256, 512 MB) and table 1 (pages that
are re-encoded, and their share of all data). The paper prints its figures as pictures, without numbers: what it claims is their
order, Normal < Modified < ssl. Normal is QEMU plain, Modified the codec `hrt` on user pages, ssl QEMU TLS (PSK). Ways alternate
within each run. Peak CPU is the whole machine's, in the busiest 0.3 s, so measure on a machine that does nothing else.
"""

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from sealane.bench.micro import cpu_model
from sealane.bench.movers import Method, move
from sealane.lab.sight import look
from sealane.seal.protect import PROTECTIONS
from sealane.testing.accel import choose_accel
from sealane.testing.lab.guest import LabWorkload
from sealane.testing.lab.stage import overhear
from sealane.testing.machine import Hardware
from sealane.testing.pair import Guest, HostPair, make_pair
from sealane.testing.problems import RigError
from sealane.testing.qemu import find_qemu

LOADS: Final = ("write", "read")
WAYS: Final = ("normal", "hrt", "selective", "sealed", "rc4", "ssl")
METRICS: Final = {
    "total_ms": ("total time, ms", {"write": "figure 11", "read": "figure 12"}),
    "downtime_ms": ("downtime, ms", {"write": "figure 13", "read": "figure 14"}),
    "peak_cpu_percent": ("peak CPU, % of the machine", {"write": "figure 15", "read": "figure 16"}),
}
# Table 1 of the paper: pages, bytes migrated in all, and the share that it prints
TABLE_1: Final = ((9560, 54594028, 75.23), (9712, 54956455, 75.74), (9938, 51890006, 75.23), (9925, 51837185, 75.23))
_WRITE_KIB_PER_S: Final = 8192
_READ_KIB_PER_S: Final = 65536
_EVERY_S, _WINDOW = 0.1, 3
_PERMIT_ALL: Final = '@id("bench") permit (principal, action, resource);'


@dataclass
class Sample:
    """One move of one guest."""

    load: str
    memory_mib: int
    way: str
    total_ms: float
    downtime_ms: float
    peak_cpu_percent: float
    bytes_sent: int


class CpuPeak:
    """The busiest stretch of the whole machine while it lasts, as /proc/stat tells it. A context manager."""

    def __init__(self) -> None:
        self.percent = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu peak", daemon=True)

    def __enter__(self) -> "CpuPeak":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = [_machine_ticks()]
        while not self._stop.wait(_EVERY_S):
            seen = [*seen[-_WINDOW:], _machine_ticks()]
            busy, whole = (seen[-1][part] - seen[0][part] for part in (0, 1))
            if len(seen) > _WINDOW and whole:
                self.percent = max(self.percent, 100 * busy / whole)


def _machine_ticks() -> tuple[int, int]:
    """Busy and all ticks of all processors since the machine began (proc(5))."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def main(arguments: Sequence[str]) -> int:
    """Run the bench, print the tables, write JSON where asked."""
    parser = argparse.ArgumentParser(prog="./run bench paper-kvm", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="how often each way is taken (default 5)")
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[128, 256, 512], metavar="MIB", help="guests (128 256 512)"
    )
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="only these")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    options = parser.parse_args(arguments)
    samples: list[Sample] = []
    encoded: list[dict[str, Any]] = []
    for load in options.loads:
        for memory in options.memory:
            with _guest_of(load, memory) as (pair, guest):
                samples += _measure(pair, guest, load, memory, options.runs)
                if memory == min(options.memory):
                    encoded += [_count_encoded(pair, guest, load, memory) for _ in range(2)]
    qemu = find_qemu()
    report = {
        "command": "./run bench " + " ".join(["paper-kvm", *arguments]),
        "machine": {
            "qemu": ".".join(map(str, qemu.version)),
            "accel": choose_accel("auto", qemu).name,
            "cpus": cpu_model(),
            "kernel": platform.release(),
        },
        "samples": [asdict(sample) for sample in samples],
        "verdicts": verdicts(samples),
        "table_1": {"paper": TABLE_1, "here": encoded},
    }
    print_report(samples, report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


@contextmanager
def _guest_of(load: str, memory_mib: int) -> Iterator[tuple[HostPair, Guest]]:
    """Two hosts that allow every protection, and a guest under load on the first."""
    with make_pair(settings=f"allowed_protections = {list(PROTECTIONS)!r}\n") as pair:
        for end in (pair.a, pair.b):
            directory = end.host.paths.config / "policy"
            directory.mkdir(exist_ok=True)
            (directory / "bench.cedar").write_text(_PERMIT_ALL)
        workload = LabWorkload(
            fill_mib=memory_mib // 4,
            rewrite_kib_per_s=_WRITE_KIB_PER_S if load == "write" else 0,
            read_kib_per_s=_READ_KIB_PER_S if load == "read" else 0,
        )
        guest = pair.add_guest(hardware=Hardware(memory_mib=memory_mib), workload=workload)
        pair.start_guest(guest, pair.a, warm=False)
        yield pair, guest


def _method(way: str) -> Method:
    if way in ("normal", "ssl"):
        return Method(way, tls=way == "ssl")
    return Method(way, options={"protection": way, "i_know_this_is_weak": way != "sealed"})


def _measure(pair: HostPair, guest: Guest, load: str, memory: int, runs: int) -> list[Sample]:
    """All runs; the guest goes to and fro. The first round warms caches where there are more than one."""
    samples = []
    source, destination = pair.a, pair.b
    for number in range(runs + (runs > 1)):
        for way in WAYS:
            with CpuPeak() as peak:
                run = move(pair, guest, source, destination, _method(way))
            if not run.completed:
                raise RigError(f"{way}: the guest did not arrive")
            source, destination = destination, source
            guest.wait_ticks(1)
            if number or runs == 1:
                samples.append(
                    Sample(load, memory, way, run.total_ms, run.downtime_ms, round(peak.percent, 1), run.bytes_sent)
                )
            print(
                f"{load:5} {memory:4} MiB {way:10} {run.total_ms:7.0f} ms  down {run.downtime_ms:5.0f} ms", flush=True
            )
    return samples


def _count_encoded(pair: HostPair, guest: Guest, load: str, memory: int) -> dict[str, Any]:
    """Table 1: how many pages `hrt` encoded, counted in a capture as anybody on the wire can."""
    source = pair.a if guest.travelled[-1] == pair.a.name else pair.b
    destination = pair.b if source is pair.a else pair.a
    with overhear(destination.host, destination.host.port, name=f"table-{time.monotonic_ns()}") as heard:
        if heard.how == "relay":
            source.trust(destination, address=heard.address[0], port=heard.address[1])
        ended = pair.migrate(
            guest, source, destination, protection="hrt", i_know_this_is_weak=True, multifd_channels=0, reduce=False
        )
    if ended.state != "completed":
        raise RigError(f"hrt: {ended.problem}")
    sight = look(heard.conversations)
    share = 100 * len(sight.coded) * 4096 / sight.total_bytes
    return {
        "load": load,
        "memory_mib": memory,
        "pages": len(sight.coded),
        "bytes": sight.total_bytes,
        "share_percent": round(share, 1),
    }


def verdicts(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For each figure and size whether the paper's order Normal < Modified < ssl holds here, by medians."""
    found = []
    for load in dict.fromkeys(sample.load for sample in samples):
        for metric, (_, figures) in METRICS.items():
            for memory in dict.fromkeys(sample.memory_mib for sample in samples):
                medians = {way: _median(samples, load, memory, way, metric) for way in WAYS}
                found.append(
                    {
                        "figure": figures[load],
                        "memory_mib": memory,
                        "normal_below_modified": medians["normal"] < medians["hrt"],
                        "modified_below_ssl": medians["hrt"] < medians["ssl"],
                        "sealed_below_modified": medians["sealed"] < medians["hrt"],
                        "medians": {way: round(value, 1) for way, value in medians.items()},
                    }
                )
    return found


def _values(samples: Sequence[Sample], load: str, memory: int, way: str, metric: str) -> list[float]:
    return [getattr(each, metric) for each in samples if (each.load, each.memory_mib, each.way) == (load, memory, way)]


def _median(samples: Sequence[Sample], load: str, memory: int, way: str, metric: str) -> float:
    return statistics.median(_values(samples, load, memory, way, metric) or [0.0])


def print_report(samples: Sequence[Sample], report: dict[str, Any]) -> None:
    """Each figure as a table: sizes down, ways across, median and spread; then verdicts, then table 1."""
    for load in dict.fromkeys(sample.load for sample in samples):
        for metric, (title, figures) in METRICS.items():
            print(f"\n{figures[load]}: {title}, a guest that {load}s")
            print("  MiB  " + "".join(f"{way:>22}" for way in WAYS))
            for memory in dict.fromkeys(sample.memory_mib for sample in samples):
                cells = []
                for way in WAYS:
                    values = _values(samples, load, memory, way, metric)
                    cells.append(f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})")
                print(f"  {memory:4} " + "".join(f"{cell:>22}" for cell in cells))
    print("\nThe paper: Normal < Modified < ssl in every figure. Here:")
    for each in report["verdicts"]:
        words = [
            f"Normal < Modified {'holds' if each['normal_below_modified'] else 'does NOT hold'}",
            f"Modified < ssl {'holds' if each['modified_below_ssl'] else 'does NOT hold'}",
            f"sealed is {'below' if each['sealed_below_modified'] else 'not below'} Modified",
        ]
        print(f"  {each['figure']}, {each['memory_mib']} MiB: {'; '.join(words)}")
    print("\ntable 1: pages re-encoded, bytes in all, share of the data")
    for pages, size, share in TABLE_1:
        print(
            f"  paper   {pages:6} {size:12} {share:6.2f} % printed, {100 * pages * 4096 / size:.1f} % by its own counts"
        )
    for row in report["table_1"]["here"]:
        print(
            f"  here    {row['pages']:6} {row['bytes']:12} {row['share_percent']:6.1f} % ({row['load']}, {row['memory_mib']} MiB)"
        )
    print(
        "not measured: an ssh tunnel (no sshd is set up here); the load is the guest's own program, no standard generator"
    )
