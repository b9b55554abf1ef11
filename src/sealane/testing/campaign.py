"""The fault campaign: `python -m sealane.testing.campaign`, or `./run faults`.

It goes two ways, one after the other: precopy, and postcopy (`trips.py`). On each it first migrates without a fault and
notes every point that is reached. Then each fault is injected at each of these points, one at a time, in an order that
follows from the seed; then, on the way of precopy, faults while a doubt is resolved; then pairs: a single fault, and a second
one at a point that was reached after it, perhaps in the recovery from it. `--count`, `--doubts` and `--pairs` bound how many,
on each way; `--minutes` how long it lasts. What an earlier run's file holds need not be done again (`--after`), and several
runs side by side can share what is left (`--part`). The exit status is 0 where everything held after every fault.
"""

import argparse
import json
import random
import statistics
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from sealane.testing.campaignrig import CampaignRig, Outcome, make_rig
from sealane.testing.faultdirector import FAULTS, Fault, Injection
from sealane.testing.problems import RigError
from sealane.testing.qemu import find_qemu
from sealane.testing.trips import POSTCOPY, PRECOPY, REJOINED, Trip, trip_of

Way = Literal["precopy", "postcopy"]
WAYS: Final[tuple[Way, ...]] = get_args(Way)

# What a full disk can meet is an entry of the journal, at its beginning.
_DISK: Final[frozenset[Fault]] = frozenset({"disk-full", "disk-full-once"})
# Each leaves the source in doubt: the ticket is not journalled; the receipt never arrives.
OPENINGS: Final = (
    Injection("destination:hear:ticket", "kill-agent"),
    Injection("destination:say:receipt:before", "kill-enclave"),
)
SIGNS: Final = {
    "completed": "C",
    "aborted": "A",
    "in-doubt, home": "h",
    "in-doubt, away": "a",
    "in-doubt, brought back": "b",
    "lost": "L",
    "split, decided": "s",
    "": "?",
}
LEGEND: Final = (
    "C completed; A aborted, the VM runs on at the source; h, a: the source was in doubt, asked, and took the VM back (h) or "
    "ended its paused copy because the destination had the VM (a); b: the destination had lost it, and an operator brought back "
    "the copy at the source; L the fault killed the QEMU in which the VM, or in postcopy a half of its memory, was; s "
    "the lanes broke as QEMU made its switch to postcopy, which the source's QEMU called failed and the destination's had made: an "
    "operator ended the one and brought back the other; ! a check failed"
)


class OutOfTime(Exception):
    """The time that the campaign was given is over."""


@dataclass(frozen=True)
class Part:
    """One of `of` runs that share the single faults and the doubts; by their names, as each run finds them in its own order."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, told: str) -> "Part":
        """From `2/4`; raises ValueError."""
        number, _, of = told.partition("/")
        part = cls(int(number), int(of))
        if not 1 <= part.number <= part.of:
            raise ValueError(told)
        return part

    def holds(self, injection: Injection) -> bool:
        """Whether it is this run's."""
        return zlib.crc32(str(injection).encode()) % self.of == self.number - 1


ALL: Final = Part()


class Campaign:
    """Runs attempts one after the other, with a fresh rig where the last one is worn; raises OutOfTime after `deadline`
    (monotonic clock, seconds)."""

    def __init__(
        self, seed: int, deadline: float | None = None, done: frozenset[str] = frozenset(), part: Part = ALL
    ) -> None:
        """`done`: single faults that are left out, as they call themselves."""
        self._deadline, self._done, self._part = deadline, done, part
        self.outcomes: list[Outcome] = []
        self._random = random.Random(f"{seed} {part.number}")  # noqa: S311 - to be repeated, not to be secret
        self._traces: dict[Injection, list[str]] = {}
        self._stack = ExitStack()
        self._rig: CampaignRig | None = None

    def close(self) -> None:
        """End the hosts."""
        self._rig = None
        self._stack.close()

    def points(self, way: Way = "precopy") -> list[str]:
        """What migrations without a fault reach, there and back, in the order of the first; by postcopy the second is joined
        again after a cut."""
        trips = (PRECOPY, PRECOPY) if way == "precopy" else (POSTCOPY, REJOINED)
        first, second = (self._undisturbed(trip) for trip in trips)
        for outcome in (first, second):
            if outcome.problems or outcome.ending != "completed":
                told = f"{outcome.ending} {outcome.codes}, {outcome.problems}; it came to {outcome.trace[-20:]}"
                raise RigError(f"without any fault: {told}")
        return list(dict.fromkeys(first.trace + second.trace))

    def _undisturbed(self, trip: Trip) -> Outcome:
        """A second try where the first one aborts: the first enclave of a fresh clone is slow, and an agent does not wait long."""
        outcome = self._attempt([], trip)
        return self._attempt([], trip) if outcome.ending == "aborted" else outcome

    def singles(self, points: Sequence[str]) -> list[Injection]:
        """Every fault at every point where it can happen, shuffled by the seed."""
        found = [
            Injection(point, fault)
            for point in points
            for fault in FAULTS
            if fault not in _DISK or (":journal:" in point and ":before" in point)
        ]
        self._random.shuffle(found)
        return found

    def left(self, singles: Sequence[Injection]) -> list[Injection]:
        """Those of this part that no earlier run had."""
        return [each for each in singles if self._part.holds(each) and str(each) not in self._done]

    def pairs(self, singles: Sequence[Injection]) -> Iterator[list[Injection]]:
        """A single fault, and one more at a point that is reached after it; endless."""
        while True:
            first = self._random.choice(singles)
            if first not in self._traces:
                self.attempt([first])
            later = self._traces[first]
            if later:
                second = self.singles([self._random.choice(later)])
                yield [first, second[0]]

    def doubts(self) -> list[list[Injection]]:
        """What opens a doubt, and every fault at every point that is reached until it has ended; shuffled by the seed."""
        found = []
        for opening in OPENINGS:
            outcome = self._attempt([opening], PRECOPY)
            if outcome.problems or not outcome.ending.startswith("in-doubt"):
                raise RigError(f"{opening}: {outcome.ending}, {outcome.problems}")
            later = self.singles(outcome.trace[outcome.traced_when_fired :])
            found += [[opening, each] for each in later if self._part.holds(each)]
        self._random.shuffle(found)
        return found

    def attempt(self, injections: list[Injection]) -> Outcome:
        """One attempt, kept among the outcomes."""
        outcome = self._attempt(injections, trip_of(each.point for each in injections))
        self.outcomes.append(outcome)
        if len(injections) == 1:
            self._traces[injections[0]] = outcome.trace[outcome.traced_when_fired :]
        return outcome

    def _attempt(self, injections: list[Injection], trip: Trip) -> Outcome:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime
        if self._rig is None or self._rig.worn or self._rig.workload != trip.workload:
            self.close()
            self._rig = self._stack.enter_context(make_rig(trip.workload))
        return self._rig.attempt(injections, trip)


def run(campaign: Campaign, way: Way, count: int, pairs: int, doubts: int, report: "Report") -> None:
    """Up to `count` single faults, all of them where they are fewer, up to `doubts` in doubts, then `pairs` pairs."""
    points = campaign.points(way)
    report.points += points
    singles = campaign.singles(points)
    for injection in campaign.left(singles)[:count]:
        report.tell(campaign.attempt([injection]))
    for injections in campaign.doubts()[:doubts] if doubts and way == "precopy" else []:
        report.tell(campaign.attempt(injections))
    drawn = campaign.pairs(singles)
    for _ in range(pairs):
        before = len(campaign.outcomes)
        pair = next(drawn)
        for outcome in campaign.outcomes[before:]:  # a single fault whose trace was needed
            report.tell(outcome)
        report.tell(campaign.attempt(pair))


class Report:
    """Tells each outcome as it comes, and all of them at the end. What came so far lies in `path` at any moment."""

    def __init__(self, seed: int, path: Path | None = None) -> None:
        self.points: list[str] = []
        self.outcomes: list[Outcome] = []
        self._seed, self._path = seed, path

    def tell(self, outcome: Outcome) -> None:
        """One line on standard error, and the file."""
        self.outcomes.append(outcome)
        how = "; ".join(outcome.problems) or f"{outcome.total_s:.1f} s"
        what = " then ".join(outcome.injections)
        missed = "" if len(outcome.fired) == len(outcome.injections) else f" ({len(outcome.fired)} fired)"
        print(f"{len(self.outcomes):4} {outcome.ending or '?':14} {what}{missed}: {how}", file=sys.stderr, flush=True)
        self.save()

    def save(self) -> None:
        """All outcomes, without the traces, in place of what the file held."""
        if self._path is None:
            return
        kept = [{name: value for name, value in asdict(each).items() if name != "trace"} for each in self.outcomes]
        beside = self._path.with_name(self._path.name + ".new")
        beside.write_text(json.dumps({"seed": self._seed, "points": self.points, "outcomes": kept}, indent=1))
        beside.replace(self._path)


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many attempts ended how, and how long recovery took, as Markdown."""
    injected = sum(len(each.fired) for each in outcomes)
    failed = [each for each in outcomes if each.problems]
    endings = Counter(each.ending or "?" for each in outcomes)
    lines = [
        f"{len(outcomes)} attempts with {injected} injected faults; a check failed after {len(failed)}.",
        "",
        "| kind | attempts | injected faults |",
        "| --- | --- | --- |",
        *_by_kind(outcomes),
        "",
        "| ended | attempts |",
        "| --- | --- |",
        *(f"| {ending} | {count} |" for ending, count in endings.most_common()),
        "",
        "| fault | attempts | to rest, median | longest |",
        "| --- | --- | --- | --- |",
    ]
    for fault in FAULTS:
        times = [each.recovery_s for each in outcomes if each.recovery_s is not None and _ends_with(each, fault)]
        if times:
            lines.append(f"| {fault} | {len(times)} | {statistics.median(times):.1f} s | {max(times):.1f} s |")
    return "\n".join(lines)


def _by_kind(outcomes: Sequence[Outcome]) -> list[str]:
    attempts, faults = Counter[str](), Counter[str]()
    for each in outcomes:
        kind = _kind(each)
        attempts[kind] += 1
        faults[kind] += len(each.fired)
    return [f"| {kind} | {count} | {faults[kind]} |" for kind, count in sorted(attempts.items())]


def _kind(outcome: Outcome) -> str:
    trip = trip_of(each.partition(" at ")[2] for each in outcome.injections)
    if len(outcome.injections) == 1:
        return f"{trip.name}, single faults"
    opens = outcome.injections[0] in map(str, OPENINGS)
    return f"{trip.name}, in a doubt" if opens else f"{trip.name}, pairs"


def _ends_with(outcome: Outcome, fault: Fault) -> bool:
    return bool(outcome.fired) and outcome.fired[-1].startswith(f"{fault} ")


def table(points: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Points x faults for the single ones, as Markdown."""
    cells: dict[tuple[str, str], str] = {}
    for outcome in outcomes:
        if len(outcome.injections) == 1:
            fault, point = outcome.injections[0].split(" at ")
            sign = SIGNS.get(outcome.ending, "?") if outcome.fired else "-"
            if sign != "-" or not cells.get((point, fault)):
                cells[point, fault] = sign + ("!" if outcome.problems else "")
    lines = ["| point | " + " | ".join(FAULTS) + " |", "| --- " * (len(FAULTS) + 1) + "|"]
    for point in points:
        lines.append(f"| `{point}` | " + " | ".join(cells.get((point, fault), "") for fault in FAULTS) + " |")
    return "\n".join(lines)


def page(points: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """The whole result, as Markdown."""
    failed = [each for each in outcomes if each.problems]
    lines = [summary(outcomes), "", LEGEND + ".", "", table(points, outcomes)]
    if failed:
        lines += ["", "What failed:", ""]
        lines += [f"* {' then '.join(each.injections)}: {'; '.join(each.problems)[:400]}" for each in failed]
    return "\n".join(lines)


def _read(path: Path) -> tuple[list[str], list[Outcome]]:
    told = json.loads(path.read_text())
    return told["points"], [Outcome(**each) for each in told["outcomes"]]


def main() -> int:
    """Run the campaign, or draw the tables of earlier ones."""
    parser = argparse.ArgumentParser(prog="./run faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="orders the faults and draws the pairs [1]")
    parser.add_argument("--only", choices=WAYS, help="one of the two ways")
    parser.add_argument("--count", type=int, help="single faults to inject on each way [all]")
    parser.add_argument(
        "--pairs", type=int, default=100, help="pairs of faults to inject after them, on each way [100]"
    )
    parser.add_argument("--doubts", type=int, default=100, help="faults to inject while a doubt is resolved [100]")
    parser.add_argument("--minutes", type=float, help="begin nothing more after that time [no limit]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome there, as it comes")
    parser.add_argument("--after", type=Path, nargs="+", metavar="FILE", help="no single fault that such files hold")
    parser.add_argument(
        "--part", type=Part.parse, default=ALL, metavar="K/N", help="the K-th of N runs side by side [1/1]"
    )
    parser.add_argument("--draw", type=Path, nargs="+", metavar="FILE", help="only draw the tables of such files")
    arguments = parser.parse_args()
    if arguments.draw:
        read = [_read(path) for path in arguments.draw]
        points = list(dict.fromkeys(point for each, _ in read for point in each))
        print(page(points, [outcome for _, outcomes in read for outcome in outcomes]))
        return 0
    done = frozenset(
        each.injections[0]
        for path in arguments.after or []
        for each in _read(path)[1]
        if len(each.injections) == 1 and each.fired and not each.problems
    )
    report, begun = Report(arguments.seed, arguments.json), time.monotonic()
    deadline = None if arguments.minutes is None else begun + arguments.minutes * 60
    campaign = Campaign(arguments.seed, deadline, done, arguments.part)
    try:
        count = sys.maxsize if arguments.count is None else arguments.count
        with suppress(OutOfTime):
            for way in [arguments.only] if arguments.only else WAYS:
                run(campaign, way, count, arguments.pairs, arguments.doubts, report)
    finally:
        campaign.close()
        report.save()
    print(page(report.points, report.outcomes))
    print(f"\n{find_qemu()}, seed {arguments.seed}, {time.monotonic() - begun:.0f} s")
    return 1 if any(each.problems for each in report.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
