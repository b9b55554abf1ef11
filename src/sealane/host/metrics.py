"""What the agent counts, in Prometheus' text format: `GET /metrics` on the agent's socket, and `sealane metrics`.

Labels are bounded: roles, states, error codes of the catalogue, never a VM's or a peer's name. `METRICS` is the table of
docs/metrics.md.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import sealane
from sealane.errors import CATALOGUE
from sealane.host.models import Migration, Role

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
ROLES: Final = ("source", "destination")
STATES: Final = (
    "queued",
    "preparing",
    "copying",
    "switching-over",
    "handing-over",
    "postcopy",
    "postcopy-paused",
    "in-doubt",
    "completed",
    "aborted",
)
_COPYING: Final = ("copying", "postcopy")
OUTCOMES: Final = ("completed", "aborted", "in-doubt")
REASONS: Final = ("zero", "same", "zstd")
# Small guests on a fast line take a second, large ones over a slow line hours.
_MIGRATION_S: Final = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)
_DOWNTIME_S: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)
_WAITED_S: Final = (0.1, 1, 10, 60, 300, 900, 1800, 3600, 7200, 14400)


class Described(NamedTuple):
    """One metric as the documentation has it; `labels` with the values that each can have, as words."""

    kind: Literal["counter", "gauge", "histogram"]
    labels: str
    words: str


METRICS: Final[dict[str, Described]] = {
    "sealane_build_info": Described("gauge", "version", "Always 1; which Sealane this agent is."),
    "sealane_migrations_ended_total": Described(
        "counter", "role, outcome (completed, aborted, in-doubt)", "Migrations that ended here since the agent's start."
    ),
    "sealane_migration_problems_total": Described(
        "counter", "role, code (docs/errors.md)", "Migrations that ended with an error, by its code."
    ),
    "sealane_migrations": Described(
        "gauge",
        "role, state",
        "Migrations that have not ended, by state; `aborted` and `completed` still have a rest to do.",
    ),
    "sealane_queue_length": Described("gauge", "", "Migrations that wait for their turn."),
    "sealane_queue_wait_seconds": Described(
        "histogram", "", "How long migrations that began had waited for their turn; 0 where they had not to."
    ),
    "sealane_migration_seconds": Described(
        "histogram", "role", "How long completed migrations took, without the queue: to the receipt."
    ),
    "sealane_migration_downtime_seconds": Described(
        "histogram", "", "How long guests stood still in migrations that completed from here."
    ),
    "sealane_wire_bytes_total": Described(
        "counter", "role", "Bytes of migrations on the wire, those of migrations under way included."
    ),
    "sealane_not_sent_bytes_total": Described(
        "counter", "reason (zero, same, zstd)", "Bytes that completed migrations from here did not have to send."
    ),
    "sealane_refused_wishes_total": Described(
        "counter", "code (docs/errors.md)", "Wishes of peers that were refused before they became a migration."
    ),
    "sealane_refused_wishes_unjournalled_total": Described(
        "counter", "", "Those of them that came too fast to be journalled (limits.refusals_per_peer_per_hour)."
    ),
    "sealane_rate_limit_bytes_per_second": Described(
        "gauge",
        "",
        "Bound of all copies to other hosts together; 0 is none (limits.total_rate_max_bytes_per_s, `sealane rate`).",
    ),
    "sealane_rate_bytes_per_second": Described(
        "gauge", "", "Rate of all copies to other hosts together, as their QEMUs told it last."
    ),
    "sealane_peers": Described("gauge", "", "Hosts that are trusted."),
    "sealane_receipts": Described("gauge", "", "Number of the last receipt of this host's chain."),
    "sealane_certificate_not_after_timestamp_seconds": Described(
        "gauge", "", "When this host's certificate expires, as Unix time."
    ),
}


class Facts(Protocol):
    """What is looked up when somebody asks."""

    @property
    def under_way(self) -> Iterable[Migration]:
        """Migrations that have not ended."""

    @property
    def queue_length(self) -> int:
        """How many wait."""

    @property
    def total_rate_max(self) -> int:
        """The bound of all copies to other hosts together."""

    @property
    def peers_count(self) -> int:
        """How many hosts are trusted."""

    @property
    def last_receipt(self) -> int:
        """The number of the last receipt."""

    @property
    def not_after(self) -> datetime:
        """When the certificate expires."""


class Metrics:
    """One agent's figures; told of migrations as `sealane.host.observer.Observer`, rendered by `exposition`."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the text format has no place for them but a series each
        self.registry = CollectorRegistry()
        self._ended = self._counter("sealane_migrations_ended_total", "role", "outcome")
        self._problems = self._counter("sealane_migration_problems_total", "role", "code")
        self._wire = self._counter("sealane_wire_bytes_total", "role")
        self._not_sent = self._counter("sealane_not_sent_bytes_total", "reason")
        self._refused = self._counter("sealane_refused_wishes_total", "code")
        self._unjournalled = self._counter("sealane_refused_wishes_unjournalled_total")
        self._waited = self._histogram("sealane_queue_wait_seconds", _WAITED_S)
        self._took = self._histogram("sealane_migration_seconds", _MIGRATION_S, "role")
        self._downtime = self._histogram("sealane_migration_downtime_seconds", _DOWNTIME_S)
        self._facts: Facts | None = None
        self._wire_told: dict[str, int] = {}  # of migrations under way, by id
        for role in ROLES:  # a series that appears with its first event has no rate before the second
            self._wire.labels(role)
            for outcome in OUTCOMES:
                self._ended.labels(role, outcome)
        for reason in REASONS:
            self._not_sent.labels(reason)
        ProcessCollector(registry=self.registry)

    def look_at(self, facts: Facts) -> None:
        """Have the gauges looked up there from now on."""
        self._facts = facts
        self.registry.register(_Gauges(facts))

    def exposition(self) -> bytes:
        """All of it, in the text format."""
        for migration in self._facts.under_way if self._facts is not None else ():
            self._count_wire(migration)
        return generate_latest(self.registry)

    # sealane.host.observer.Observer

    def begun(self, migration: Migration) -> None:
        """A migration is in progress."""
        if migration.role == "source":
            self._waited.observe(migration.waited_s)

    def ended(self, migration: Migration) -> None:
        """No job runs it any more; `leave`s count when recovery has ended them, by their state."""
        self._count_wire(migration)
        self._wire_told.pop(migration.id, None)
        if migration.state in OUTCOMES:
            self._ended.labels(migration.role, migration.state).inc()
        if migration.problem is not None:
            self._problems.labels(migration.role, _known(migration.problem.code)).inc()
        result = migration.result
        if migration.state != "completed" or result is None:
            return
        self._took.labels(migration.role).observe(result.total_ms / 1e3)
        if result.downtime_ms is not None:
            self._downtime.observe(result.downtime_ms / 1e3)
        if migration.role == "source":
            for reason in REASONS:
                self._not_sent.labels(reason).inc(max(0, getattr(result.not_sent, f"{reason}_bytes")))

    def refused(self, role: Role, code: str, *, journalled: bool) -> None:
        """A peer's wish was refused."""
        self._refused.labels(_known(code)).inc()
        if not journalled:
            self._unjournalled.inc()

    def _count_wire(self, migration: Migration) -> None:
        """Add what has crossed since the last look; a counter never goes back."""
        crossed = migration.result.bytes_wire if migration.result is not None else migration.progress.bytes_wire
        told = self._wire_told.get(migration.id, 0)
        if crossed > told:
            self._wire.labels(migration.role).inc(crossed - told)
            self._wire_told[migration.id] = crossed

    def _counter(self, name: str, *labels: str) -> Counter:
        return Counter(name, METRICS[name].words, labels, registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, METRICS[name].words, labels, buckets=buckets, registry=self.registry)


class _Gauges(Collector):
    """What is looked up at each question, so that no gauge can be left behind."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def describe(self) -> Iterator[Metric]:
        """Nothing is looked up at the registration."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The gauges now."""
        facts = self._facts
        counts = {(role, state): 0 for role in ROLES for state in STATES}
        rate = 0.0
        for migration in facts.under_way:
            counts[migration.role, migration.state] += 1
            if migration.role == "source" and migration.state in _COPYING:
                rate += migration.progress.rate_bytes_per_s or 0.0
        yield _gauge("sealane_migrations", counts, "role", "state")
        yield _gauge("sealane_build_info", {(sealane.__version__,): 1}, "version")
        yield _gauge("sealane_queue_length", {(): facts.queue_length})
        yield _gauge("sealane_rate_limit_bytes_per_second", {(): facts.total_rate_max})
        yield _gauge("sealane_rate_bytes_per_second", {(): rate})
        yield _gauge("sealane_peers", {(): facts.peers_count})
        yield _gauge("sealane_receipts", {(): facts.last_receipt})
        yield _gauge("sealane_certificate_not_after_timestamp_seconds", {(): facts.not_after.timestamp()})


def _gauge(name: str, values: Mapping[Any, float], *labels: str) -> Metric:
    family = GaugeMetricFamily(name, METRICS[name].words, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _known(code: str) -> str:
    """A code of this catalogue: a newer peer's must not make a new series each."""
    return code if code in CATALOGUE else "unknown"
