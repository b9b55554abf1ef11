"""What an evacuation looks like while it runs: one live table on a terminal, a line for each change on a pipe, else nothing."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sealane.cli import format as words
from sealane.cli.output import Output, harmless
from sealane.cli.words import copied, progress_figures, success_parts

if TYPE_CHECKING:
    from sealane.cli.evacuate import Departure

PLAIN_INTERVAL_S: Final = 5.0
_BAR_WIDTH: Final = 20
_REFRESH_PER_S: Final = 8
# Lines of a terminal that the table leaves free: its head, the totals, and what was said before.
_LINES_FREE: Final = 5
_WORDS_MIN: Final = 10
# Those that move come first, what is settled last; a terminal shows as many as it has lines.
_ORDER: Final = {"switching-over": 0, "handing-over": 0, "copying": 1, "preparing": 2, "queued": 3}


class Screen:
    """The plain form: a line where something changed, and the totals now and then."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self._told: dict[str, str] = {}
        self._last_totals = time.monotonic()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def show(self, departures: Sequence["Departure"], *, changed: "Departure | None" = None) -> None:
        """Take in how all stand; `changed` has a new state."""
        if changed is not None and changed.migration is not None:
            state = changed.migration.state
            if self._told.get(changed.vm.name) != state:
                self._told[changed.vm.name] = state
                self.say(line_of(changed))
        if time.monotonic() - self._last_totals >= PLAIN_INTERVAL_S:
            self._last_totals = time.monotonic()
            self.say(totals(departures))

    def say(self, text: str) -> None:
        """One line, above the table where there is one."""
        self.out.line(text)

    def summary(self, departures: Sequence["Departure"], took_s: float) -> None:
        """The last lines: what did not arrive and why, then the totals."""
        if not departures:
            self.out.line("no VM runs here; nothing is to be moved")
            return
        for departure in departures:
            if departure.outcome != "arrived":
                self.out.line(line_of(departure))
        arrived = sum(each.outcome == "arrived" for each in departures)
        if arrived == len(departures):
            self.out.line(f"✓ all {arrived} VMs arrived in {words.duration(took_s)}")

    def stop(self) -> None:
        """Leave the terminal as it was."""


class LiveScreen(Screen):
    """The form for a terminal: a table that is redrawn in place."""

    def __init__(self, out: Output, console: Console | None = None) -> None:
        super().__init__(out)
        self._console = console or Console()
        self._live: Live | None = None

    def show(self, departures: Sequence["Departure"], *, changed: "Departure | None" = None) -> None:
        """Redraw; Live itself draws no oftener than the eye sees."""
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=_REFRESH_PER_S, transient=False)
            self._live.start()
        self._live.update(table_of(departures, width=self._console.width, height=self._console.height))

    def say(self, text: str) -> None:
        """One line, above the table while it is drawn."""
        if self._live is None:
            self.out.line(text)
        else:
            self._live.console.print(Text(harmless(text)))

    def stop(self) -> None:
        """Leave the table as it was last drawn."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class SilentScreen(Screen):
    """With --json or -q: events or failures say it all."""

    def show(self, departures: Sequence["Departure"], *, changed: "Departure | None" = None) -> None:
        """Nothing is shown."""

    def summary(self, departures: Sequence["Departure"], took_s: float) -> None:
        """With -q only failures are said."""


def make_screen(out: Output) -> Screen:
    """The form that fits where the output goes."""
    if out.as_json or out.quiet:
        return SilentScreen(out)
    return LiveScreen(out) if out.live else Screen(out)


def line_of(departure: "Departure") -> str:
    """One VM in one plain line."""
    name, migration, outcome = departure.vm.name, departure.migration, departure.outcome
    if outcome == "arrived" and migration is not None:
        return f"✓ {name} runs on {departure.host}     {' · '.join(success_parts(migration)[:3])}"
    if outcome == "in-doubt":
        return f"? {name} is in doubt: paused here, and may run on {departure.host}: {departure.why}"
    if outcome == "unknown":
        return f"? {name} may run here or on {departure.host}: {departure.why}"
    if outcome == "stayed":
        place = "runs nowhere" if migration is not None and migration.runs_at == "nowhere" else "stays here"
        return f"✗ {name} {place}: {departure.why}"
    if migration is None:
        return f"{name} is not asked for yet"
    return f"{name} → {departure.host}: {migration.state}, {migration.detail}".rstrip(", ")


def totals(departures: Sequence["Departure"]) -> str:
    """How many are where."""
    going = [each for each in departures if each.outcome == "going"]
    waiting = sum(each.migration is None or each.migration.state == "queued" for each in going)
    arrived = sum(each.outcome == "arrived" for each in departures)
    stayed = sum(each.outcome == "stayed" for each in departures)
    doubtful = len(departures) - len(going) - arrived - stayed
    parts = [f"{arrived} of {len(departures)} arrived"]
    parts += [f"{count} {what}" for count, what in ((len(going) - waiting, "move"), (waiting, "wait")) if count]
    parts += [f"{count} {what}" for count, what in ((stayed, "stay here"), (doubtful, "in doubt or unknown")) if count]
    rate = sum(each.migration.progress.rate_bytes_per_s or 0.0 for each in going if each.migration is not None)
    return " · ".join([*parts, *([words.rate(rate)] if rate else [])])


def table_of(departures: Sequence["Departure"], *, width: int, height: int) -> Group:
    """All VMs, as many as there are lines for, and the totals; what says most is cut last."""
    ordered = sorted(departures, key=_rank)
    room = max(3, height - _LINES_FREE)
    rows = [_row(departure) for departure in ordered[:room]]
    columns = [
        max(map(len, cells), default=0) for cells in ([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    ]
    for_words = max(_WORDS_MIN, width - sum(columns) - _BAR_WIDTH - 8)
    table = Table.grid(padding=(0, 2))
    for column in columns:
        table.add_column(no_wrap=True, min_width=column)
    table.add_column(width=_BAR_WIDTH)
    table.add_column(no_wrap=True)
    for name, host, state, bar, figures in rows:
        cut = figures if len(figures) <= for_words else f"{figures[: for_words - 1]}…"
        table.add_row(Text(name), Text(host), Text(state), bar, Text(cut))
    hidden = [Text(f"and {len(ordered) - room} more")] if len(ordered) > room else []
    return Group(table, *hidden, Text(totals(departures)))


def _rank(departure: "Departure") -> tuple[int, int, str]:
    migration = departure.migration
    if departure.outcome != "going" or migration is None:
        return ({"going": 4, "stayed": 5}.get(departure.outcome, 6), 0, departure.vm.name)
    return (_ORDER.get(migration.state, 3), migration.queue.place if migration.queue else 0, departure.vm.name)


def _row(departure: "Departure") -> tuple[str, str, str, Text | ProgressBar, str]:
    migration = departure.migration
    bar: Text | ProgressBar = Text("")
    figures = departure.why
    state = departure.outcome if departure.outcome != "going" or migration is None else migration.state
    if departure.outcome == "arrived" and migration is not None:
        bar, figures = ProgressBar(total=100, completed=100, width=_BAR_WIDTH), "   ".join(success_parts(migration)[:2])
    elif departure.outcome == "going" and migration is not None:
        figures = migration.detail
        if migration.state == "copying":
            done = copied(migration)
            bar = ProgressBar(total=100, completed=done or 0, width=_BAR_WIDTH, pulse=done is None)
            known = progress_figures(migration)
            figures = "   ".join(known[name] for name in ("share", "rate", "left") if name in known)
    return (departure.vm.name, f"→ {departure.host}" if departure.host else "", state, bar, harmless(figures))
