"""Small makers of the models for the host's tests."""

from datetime import UTC, datetime
from typing import Any

from sealane.host.models import Migration

NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


def migration(number: int = 1, **changes: Any) -> Migration:
    """A migration with id 000…number."""
    facts = {
        "id": f"{number:032x}", "number": number, "vm": "web01", "role": "source", "peer": "host-b",
        "state": "preparing", "runs_at": "source", "started_at": NOW,
    }  # fmt: skip
    return Migration.model_validate({**facts, **changes})
