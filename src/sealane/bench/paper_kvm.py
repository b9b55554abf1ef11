"""`./run bench paper-kvm`: the measurements of Fan et al. (2016), section 4.2, in the paper's layout and beside its verdicts.

Figures 11 to 16 (total time, downtime, peak CPU; a guest that writes, and one that reads; 128, 256, 512 MB) and table 1 (pages
that are re-encoded, and their share of all data). Normal is QEMU plain, Modified the codec `hrt` on user pages, ssl QEMU TLS with
a pre-shared key; `ssh` is QEMU plain through OpenSSH with its default cipher. Sealane runs without its reduction, so that every
way carries the same bytes. In the guest works stress-ng, held to a share of a processor. Ways alternate within each round; the
first round warms caches and is not counted. Peak CPU is the whole machine's, in the busiest 0.3 s.

Markdown goes to standard output, progress to standard error. The defaults take 4 minutes on two quiet cores
under TCG, 25 on busy ones. Measure on a machine that does nothing else.
"""

import argparse
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from sealane.bench.micro import cpu_model
from sealane.bench.movers import PLAIN_PORT, Method, move
from sealane.bench.paper import Report, conclude, make_parser, say, timed
from sealane.bench.paper_kvm_report import LOADS, WAYS, as_markdown, judge
from sealane.bench.tunnel import SshTunnel
from sealane.bench.turns import in_turn
from sealane.lab.sight import look
from sealane.seal.protect import PROTECTIONS
from sealane.testing.accel import choose_accel
from sealane.testing.guest.stress import READY, StressWorkload, stress_version
from sealane.testing.lab.stage import overhear
from sealane.testing.machine import Hardware
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair
from sealane.testing.problems import RigError
from sealane.testing.qemu import find_qemu

NAME: Final = "paper-kvm"
_FILL: Final = 6  # the guest's own data: a sixth of its memory
_LOAD_MIB, _LOAD_PERCENT = 12, 40
_EVERY_S, _WINDOW_S = 0.05, 0.3
_CONVERGE_S: Final = 60.0
_PERMIT_ALL: Final = '@id("bench") permit (principal, action, resource);'


@dataclass
class Sample:
    """One move of one guest. `cpu_s` is what the whole machine worked meanwhile, the guest and its load included."""

    load: str
    memory_mib: int
    way: str
    round: int
    total_ms: float
    downtime_ms: float
    peak_cpu_percent: float
    cpu_s: float
    bytes_sent: int


class CpuPeak:
    """The busiest stretch of the whole machine while it lasts, and its work, as /proc/stat tells it. A context manager.

    A stretch is _WINDOW_S long, or all there was of what took less: /proc/stat counts in hundredths of a second.
    """

    def __init__(self) -> None:
        self.percent = 0.0
        self.busy_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu peak", daemon=True)
        self._seen: list[tuple[int, int]] = []

    def __enter__(self) -> "CpuPeak":
        self._seen = [_machine_ticks()]
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._seen.append(_machine_ticks())
        self.busy_s = (self._seen[-1][0] - self._seen[0][0]) / _TICKS_PER_S
        self.percent = busiest(self._seen, round(_WINDOW_S * _TICKS_PER_S) * (os.cpu_count() or 1))

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._seen.append(_machine_ticks())


def busiest(seen: Sequence[tuple[int, int]], window: int) -> float:
    """The largest share, in percent, of busy ticks in any stretch of at least `window` ticks; of all, where that is shorter.

    `seen`: busy ticks and all ticks, as they grew.
    """
    first, last = seen[0], seen[-1]
    if last[1] - first[1] <= window:
        return 100 * (last[0] - first[0]) / max(1, last[1] - first[1])
    most, begin = 0.0, 0
    for end in seen:
        while begin + 1 < len(seen) and end[1] - seen[begin + 1][1] >= window:
            begin += 1
        if (whole := end[1] - seen[begin][1]) >= window:
            most = max(most, 100 * (end[0] - seen[begin][0]) / whole)
    return most


_TICKS_PER_S: Final = 100  # USER_HZ, which proc(5) counts in


def _machine_ticks() -> tuple[int, int]:
    """Busy and all ticks of all processors since the machine began (proc(5))."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--runs", type=int, default=15, help="how often each way is taken (default 15)")
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[128, 256, 512], metavar="MIB", help="guests (128 256 512)"
    )
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="only these")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="only these")
    parser.add_argument("--quick", action="store_true", help="the smallest guest alone, 3 runs")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the bench, print Markdown, write JSON where asked; 1 where `--against` finds a contradiction."""
    options = _parse(arguments)
    return conclude(NAME, options, lambda: timed(NAME, arguments, lambda: measure(options)), as_markdown)


def measure_quickly() -> Report:
    """What `--quick` measures. Raises RigError."""
    return timed(NAME, ["--quick"], lambda: measure(_parse(["--quick"])))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    if options.quick:
        options.memory, options.runs = [min(options.memory)], min(options.runs, 3)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures and the verdicts on them. Raises RigError."""
    samples: list[Sample] = []
    encoded: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    broken: list[str] = []
    tunnels: dict[str, Any] = {}
    for load in options.loads:
        for memory in options.memory:
            try:
                with _guest_of(load, memory) as (pair, guest):
                    bench = _Bench(pair, guest, load, memory, samples, lost)
                    bench.measure(options.ways, options.runs, tunnels)
                    if memory == min(options.memory):
                        encoded += [_count_encoded(pair, guest, load, memory) for _ in range(2)]
            except RigError as error:  # what was measured before is not thrown away
                broken.append(f"{memory} MB, a guest that {load}s: {error}")
                say(f"broken off: {broken[-1]}")
    if not samples:
        raise RigError("; ".join(broken) or "nothing was measured")
    report: dict[str, Any] = {
        "machine": _machine(tunnels),
        "rounds": options.runs,
        "samples": [asdict(sample) for sample in samples],
        "not_arrived": lost,
        "broken_off": broken,
        "table_1": encoded,
    }
    return report | {"claims": judge(report)}


def _machine(tunnels: dict[str, Any]) -> dict[str, str]:
    qemu = find_qemu()
    load = f"stress-ng {stress_version()} of Debian on {_LOAD_MIB} MiB with {_LOAD_PERCENT} % of a processor"
    found = {
        "QEMU": f"{'.'.join(map(str, qemu.version))}, {choose_accel('auto', qemu).name}",
        "processor": f"{cpu_model()}, {os.cpu_count()} of them",
        "host kernel": platform.release(),
        "guest": f"one processor; a sixth of its memory filled; {load}",
    }
    return found | ({"ssh": f"{tunnels['version']}, {tunnels['cipher']}"} if tunnels else {})


@contextmanager
def _guest_of(load: str, memory_mib: int) -> Iterator[tuple[HostPair, Guest]]:
    """Two hosts that allow every protection, and a guest under load on the first."""
    with make_pair(settings=f"allowed_protections = {list(PROTECTIONS)!r}\n") as pair:
        for end in (pair.a, pair.b):
            directory = end.host.paths.config / "policy"
            directory.mkdir(exist_ok=True)
            (directory / "bench.cedar").write_text(_PERMIT_ALL)
        workload = StressWorkload(
            fill_mib=memory_mib // _FILL,
            fill="mixed",
            load="write" if load == "write" else "read",
            load_mib=_LOAD_MIB,
            load_percent=_LOAD_PERCENT,
        )
        guest = pair.add_guest(hardware=Hardware(memory_mib=memory_mib), workload=workload)
        try:
            pair.start_guest(guest, pair.a, warm=False)
            guest.machines[pair.a.name].wait_for(READY)
            yield pair, guest
        finally:
            for machine in guest.machines.values():
                machine.stop()


class _Bench:
    """One guest that goes to and fro. What is measured goes into `samples` at once.

    Into `lost` goes what was given up, because the guest wrote faster than it went.
    """

    def __init__(
        self,
        pair: HostPair,
        guest: Guest,
        load: str,
        memory_mib: int,
        samples: list[Sample],
        lost: list[dict[str, Any]],
    ) -> None:
        self._pair, self._guest, self._load, self._memory = pair, guest, load, memory_mib
        self._source, self._destination = pair.a, pair.b
        self._samples, self._lost = samples, lost

    def measure(self, ways: Sequence[str], runs: int, tunnels: dict[str, Any]) -> None:
        """All rounds, and one more before them that is not counted."""
        with ExitStack() as stack:
            through = self._open_tunnels(stack, tunnels) if "ssh" in ways else {}
            for number in range(runs + 1):
                for way in in_turn(ways, number):
                    sample = self._move(way, number, through.get(self._source.name, ""))
                    if sample is not None and number:
                        self._samples.append(sample)

    def _open_tunnels(self, stack: ExitStack, tunnels: dict[str, Any]) -> dict[str, str]:
        found = {}
        for source, destination in ((self._pair.a, self._pair.b), (self._pair.b, self._pair.a)):
            tunnel = stack.enter_context(SshTunnel(source.host, destination.host, PLAIN_PORT))
            found[source.name] = tunnel.uri
            tunnels.update(version=tunnel.version, cipher=tunnel.cipher, setup_ms=tunnel.setup_ms)
        return found

    def _move(self, way: str, number: int, through: str) -> Sample | None:
        with CpuPeak() as peak:
            run = move(self._pair, self._guest, self._source, self._destination, method_of(way, through))
        where = f"{self._load:5} {self._memory:4} MiB round {number} {way:10}"
        if not run.completed:
            self._lost.append({"load": self._load, "memory_mib": self._memory, "way": way, "round": number})
            say(f"{where} given up after {_CONVERGE_S:.0f} s")
            return None
        self._source, self._destination = self._destination, self._source
        self._guest.wait_ticks(1)
        say(
            f"{where} {run.total_ms:7.0f} ms, down {run.downtime_ms:5.0f} ms, CPU {peak.percent:3.0f} %, {peak.busy_s:.1f} s"
        )
        return Sample(
            self._load,
            self._memory,
            way,
            number,
            round(run.total_ms, 1),
            round(run.downtime_ms, 1),
            round(peak.percent, 1),
            round(peak.busy_s, 2),
            run.bytes_sent,
        )


def method_of(way: str, through: str = "") -> Method:
    """How a way of the paper's, or one of those beside it, moves the guest."""
    if way in ("normal", "tls", "ssh"):
        return Method(way, tls=way == "tls", through=through if way == "ssh" else "", converge_s=_CONVERGE_S)
    options = {"protection": way, "i_know_this_is_weak": way != "sealed", "reduce": False}
    return Method(way, options=options, converge_s=_CONVERGE_S)


def _count_encoded(pair: HostPair, guest: Guest, load: str, memory: int) -> dict[str, Any]:
    """Table 1: how many pages `hrt` encoded, counted in a capture as anybody on the wire can."""
    source, destination = _ends(pair, guest)
    with overhear(destination.host, destination.host.port, name=f"table-{time.monotonic_ns()}") as heard:
        if heard.how == "relay":
            source.trust(destination, address=heard.address[0], port=heard.address[1])
        ended = pair.migrate(
            guest, source, destination, protection="hrt", i_know_this_is_weak=True, multifd_channels=0, reduce=False
        )
    if heard.how == "relay":
        source.trust(destination)
    if ended.state != "completed":
        raise RigError(f"hrt: {ended.problem}")
    pair.await_end(destination, ended.id)
    guest.wait_ticks(1)
    sight = look(heard.conversations)
    return {"load": load, "memory_mib": memory, "pages": len(sight.coded), "bytes": sight.total_bytes}


def _ends(pair: HostPair, guest: Guest) -> tuple[AgentHost, AgentHost]:
    return (pair.a, pair.b) if guest.travelled[-1] == pair.a.name else (pair.b, pair.a)
