"""The experiments of `sealane lab` that need hosts and a guest; each says what it got."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sealane.cli.output import Output
from sealane.errors import make_error
from sealane.lab.pcap import Conversation
from sealane.testing.lab.attacks import ATTACKS, Outcome
from sealane.testing.lab.guest import USERS
from sealane.testing.lab.leak import CELLS, LeakTable, measure
from sealane.testing.lab.stage import WAYS, Stage, make_stage, way_name
from sealane.testing.problems import RigError


@contextmanager
def staged(**options: int) -> Iterator[Stage]:
    """The stage; what the rig could not do becomes `lab.failed`."""
    try:
        with make_stage(**options) as stage:  # type: ignore[arg-type]
            yield stage
    except RigError as error:
        raise make_error("lab.failed", str(error)) from error


def overheard(ways: Sequence[str]) -> Iterator[tuple[str, list[Conversation]]]:
    """One guest's migrations in these ways, one after the other: the name and the connections of each."""
    with staged() as stage:
        for way in ways:
            take = stage.move(way)
            if not take.completed:
                raise make_error("lab.failed", f"{way_name(way)}: the guest did not arrive: {take.problem}")
            yield way, take.conversations


def leak(out: Output, ways: Sequence[str] | None = None) -> None:
    """The leak meter."""
    with staged() as stage:
        table = measure(stage, ways=tuple(ways or WAYS), say=out.line)
    out.object({"type": "leak", **table.as_dict()})
    tell_leak(out, table)


def tell_leak(out: Output, table: LeakTable) -> None:
    """The table in words."""
    ways = list(table.captured_bytes)
    out.line()
    rows = [
        [f"{place}{' *' if place in USERS else ''}", *(row[way] for way in ways)] for place, row in table.cells.items()
    ]
    rows.append(["in all", *(str(table.count(way)) for way in ways)])
    out.table(["secret", *map(way_name, ways)], rows)
    out.line()
    out.line("* in pages that a process has mapped")
    for cell, meaning in CELLS.items():
        out.line(f"{cell}: {meaning}")
    for told in table.breaking:
        out.line(f"{told.way}: {told.verdict}, in {told.seconds:.1f} s; {'; '.join(told.how)}")
    out.line(table.premise)


def attack(out: Output, name: str, ways: Sequence[str]) -> list[Outcome]:
    """One attack of ATTACKS on each way, on hosts of its own."""
    found = []
    with staged() as stage:
        for way in ways:
            found.append(ATTACKS[name](stage, way))
            out.object({"type": name, **found[-1].as_dict()})
            tell_attack(out, found[-1])
    return found


def tell_attack(out: Output, told: Outcome) -> None:
    """One outcome in words."""
    out.line(f"{'✗' if told.attacker_won else '✓'} {told.attack} against {way_name(told.way)}: {told.got}")
    said = f"; {told.said}{f' [{told.code}]' if told.code else ''}" if told.said else ""
    out.line(f"    the VM {told.vm}{said}")
