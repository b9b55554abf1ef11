"""What a migration looks like while it runs: a live bar on a terminal, a plain line now and then on a pipe, else nothing."""

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sealane.cli.output import Output, harmless
from sealane.cli.words import (
    STAGES,
    channel_parts,
    copied,
    headline,
    progress_figures,
    progress_parts,
    success_parts,
    trust_parts,
    warning,
)
from sealane.host.models import Migration

# On a pipe: often enough to see that it goes on, seldom enough for a log.
PLAIN_INTERVAL_S: Final = 5.0
_LABEL_WIDTH: Final = 10
_BAR_WIDTH: Final = 30
_WIDE: Final = 110  # columns from which the whole bar has room beside the figures


class Screen:
    """The plain form, and what both forms share: one line for each stage."""

    interval_s = PLAIN_INTERVAL_S

    def __init__(self, out: Output) -> None:
        self.out = out
        self._state: str | None = None
        self._channel_shown = False
        self._policy_shown = False
        self._warned = False
        self._last_line_at = 0.0

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def show(self, migration: Migration) -> None:
        """Take in the migration's present state."""
        self._warn(migration)
        entered = migration.state != self._state
        self._state = migration.state
        if migration.policy is not None and not self._policy_shown:
            self._policy_shown = True
            self.say(labelled(migration.peer, " · ".join(trust_parts(migration))))
            if migration.policy.decision == "allow":
                self.say(labelled("policy", f"{migration.policy.words} (sha256:{migration.policy.digest[:8]}…)"))
        if channel_parts(migration) and migration.state != "preparing" and not self._channel_shown:
            self._channel_shown = True
            self.say(labelled("channel", " · ".join([migration.protection, *channel_parts(migration)])))
        if migration.state == "in-doubt":
            if entered:
                self.say(f"? {headline(migration)}; {migration.detail or 'asking on'}")
        elif migration.state in STAGES:
            self.stage(migration, entered=entered)

    def _warn(self, migration: Migration) -> None:
        if warning(migration) and not self._warned:
            self._warned = True
            self.say(warning(migration))

    def stage(self, migration: Migration, *, entered: bool) -> None:
        """A line when a stage begins, and again while it lasts."""
        now = time.monotonic()
        if not entered and now - self._last_line_at < self.interval_s:
            return
        self._last_line_at = now
        self.say(stage_line(migration))

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        self.out.line(text)

    def success(self, migration: Migration) -> None:
        """The last line of a migration that succeeded."""
        self.stop()
        result = migration.result
        if result is not None and result.downtime_ms is not None:
            self.out.detail(labelled("copy", f"{result.copy_ms or 0:.0f} ms from QEMU's start to the receipt"))
        self.out.line(f"✓ {migration.vm} runs on {migration.peer}     {' · '.join(success_parts(migration))}")
        if warning(migration):
            self.out.line(warning(migration))
        if migration.receipt is not None:
            self.out.line(labelled("receipt", f"{migration.receipt} (sealane receipts verify {migration.receipt})"))

    def stop(self) -> None:
        """Leave the terminal as it was."""


class LiveScreen(Screen):
    """The form for a terminal: the copy is a bar that is redrawn in place."""

    def __init__(self, out: Output, console: Console | None = None) -> None:
        super().__init__(out)
        self._console = console or Console()
        self._live: Live | None = None
        self._copy: Migration | None = None

    def stage(self, migration: Migration, *, entered: bool) -> None:
        """The copy goes to the bar; the other stages are lines."""
        if migration.state == "copying":
            self._copy = migration
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=8, transient=False)
                self._live.start()
            self._live.update(copy_row(migration, self._console.width))
            return
        if entered:
            self.stop()
            self.say(stage_line(migration))

    def say(self, text: str) -> None:
        """One line, above the bar while it is drawn."""
        if self._live is None:
            self.out.line(text)
        else:
            self._live.console.print(Text(harmless(text)))

    def stop(self) -> None:
        """Leave the bar as it was last drawn."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class SilentScreen(Screen):
    """With --json or -q: events or failures say it all."""

    def show(self, migration: Migration) -> None:
        """Nothing is shown."""

    def success(self, migration: Migration) -> None:
        """Nothing is shown."""


def make_screen(out: Output) -> Screen:
    """The form that fits where the output goes."""
    if out.as_json or out.quiet:
        return SilentScreen(out)
    return LiveScreen(out) if out.live else Screen(out)


def labelled(label: str, text: str) -> str:
    """A label and what it tells, in columns."""
    return f"{label:<{_LABEL_WIDTH}} {text}".rstrip()


def stage_line(migration: Migration) -> str:
    """A stage in one plain line."""
    label = STAGES[migration.state]
    if migration.state == "copying":
        return labelled(label, "   ".join(progress_parts(migration)) or migration.detail or "begins")
    if migration.state == "postcopy" and migration.progress.postcopy_requests is not None:
        return labelled(label, "   ".join(progress_parts(migration)))
    default = {
        "queued": "others go first",
        "preparing": f"{migration.peer} is asked whether {migration.vm} may come",
        "switching-over": f"{migration.vm} is paused; the rest is copied",
        "handing-over": f"{migration.peer} takes over",
        "postcopy": f"{migration.vm} runs on {migration.peer}; the rest of its memory follows",
        "postcopy-paused": f"the lanes were cut; the two halves of {migration.vm} are joined again",
    }
    return labelled(label, migration.detail or default[migration.state])


def copy_row(migration: Migration, width: int) -> Table:
    """The copy as a bar and its figures, as many of them as `width` columns hold."""
    done = copied(migration)
    bar_width = _BAR_WIDTH if width >= _WIDE else _BAR_WIDTH // 3
    row = Table.grid(padding=(0, 1), expand=False)
    row.add_column(width=_LABEL_WIDTH)
    row.add_column(width=bar_width)
    row.add_column(overflow="ellipsis", no_wrap=True)
    bar = ProgressBar(total=100, completed=done or 0, width=bar_width, pulse=done is None)
    row.add_row("copy", bar, fitting(migration, width - _LABEL_WIDTH - bar_width - 3))
    return row


def fitting(migration: Migration, width: int) -> str:
    """The figures that fit, in their order; those that say least go first."""
    figures = progress_figures(migration)
    for least in ("", "sent", "limit", "copied", "iteration", "dirty", "rate"):
        figures.pop(least, None)
        if len(text := "   ".join(figures.values())) <= width:
            break
    return text
