"""Metrics: what is exposed is what is documented, bounded in labels, and told truly."""

from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sealane.errors import make_error
from sealane.host.metrics import METRICS, ROLES, STATES, Metrics
from sealane.host.models import Migration, NotSent, Progress, Result
from sealane.host.problems import problem_of
from tests.cli.generate_docs import DOCS, metrics_table, with_generated
from tests.host.factories import NOW, migration

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Facts:
    def __init__(self) -> None:
        self.under_way: list[Migration] = []
        self.queue_length, self.peers_count, self.last_receipt = 2, 3, 17
        self.total_rate_max = 5_000_000
        self.not_after = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def facts() -> Facts:
    return Facts()


@pytest.fixture
def metrics(facts: Facts) -> Metrics:
    made = Metrics()
    made.look_at(facts)
    return made


def read(metrics: Metrics) -> Samples:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return read(metrics)[name, tuple(sorted(labels.items()))]


def test_what_is_exposed_is_documented_and_no_other(metrics: Metrics) -> None:
    families = text_string_to_metric_families(metrics.exposition().decode())
    found = {family.name: family for family in families if family.name.startswith("sealane_")}
    told = {name.removesuffix("_total") if one.kind == "counter" else name: one for name, one in METRICS.items()}
    assert set(found) == set(told)
    for name, one in told.items():
        assert (found[name].type, found[name].documentation) == (one.kind, one.words)
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert page == with_generated(page, metrics_table()), "run: python -m tests.cli.generate_docs"


def ended(number: int = 1, **changes: Any) -> Migration:
    facts: dict[str, Any] = {"state": "completed", "runs_at": "destination", "ended_at": NOW}
    return migration(number, **(facts | changes))


def test_a_migration_from_its_wait_to_its_end(metrics: Metrics, facts: Facts) -> None:
    facts.under_way = [migration(1, state="copying", waited_s=7.0, progress=Progress(bytes_wire=100))]
    metrics.begun(facts.under_way[0])
    assert value(metrics, "sealane_migrations", role="source", state="copying") == 1
    assert value(metrics, "sealane_wire_bytes_total", role="source") == 100
    assert value(metrics, "sealane_wire_bytes_total", role="source") == 100
    result = Result(total_ms=4000, downtime_ms=31, bytes_wire=250, not_sent=NotSent(same_bytes=9))
    facts.under_way = []
    metrics.ended(ended(result=result))
    assert value(metrics, "sealane_wire_bytes_total", role="source") == 250
    assert value(metrics, "sealane_migrations_ended_total", role="source", outcome="completed") == 1
    assert value(metrics, "sealane_migration_seconds_sum", role="source") == 4
    assert value(metrics, "sealane_migration_downtime_seconds_bucket", le="0.05") == 1
    assert value(metrics, "sealane_migration_downtime_seconds_bucket", le="0.025") == 0
    assert value(metrics, "sealane_not_sent_bytes_total", reason="same") == 9
    assert value(metrics, "sealane_queue_wait_seconds_sum") == 7
    assert value(metrics, "sealane_migrations", role="source", state="copying") == 0


def test_labels_stay_bounded_whatever_comes(metrics: Metrics) -> None:
    before = len(read(metrics))
    for number in range(50):
        problem = problem_of(make_error("lane.cut")).model_copy(update={"code": f"newer.{number}"})
        metrics.ended(ended(number, vm=f"vm{number}", peer=f"p{number}", state="aborted", problem=problem))
        metrics.refused("destination", f"newer.{number}", journalled=number < 20)
    assert value(metrics, "sealane_migration_problems_total", role="source", code="unknown") == 50
    assert value(metrics, "sealane_refused_wishes_total", code="unknown") == 50
    assert value(metrics, "sealane_refused_wishes_unjournalled_total") == 30
    assert len(read(metrics)) <= before + 4
    assert not [key for key in read(metrics) if "vm1" in str(key) or "p1'" in str(key)]


def test_every_state_has_its_gauge(metrics: Metrics, facts: Facts) -> None:
    facts.under_way = [migration(number, state=state) for number, state in enumerate(STATES)]
    assert set(STATES) == set(Migration.model_fields["state"].annotation.__args__)  # type: ignore[union-attr]
    for state in STATES:
        assert value(metrics, "sealane_migrations", role=ROLES[0], state=state) == 1
