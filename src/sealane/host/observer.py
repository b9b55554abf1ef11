"""Who is told of migrations as they go: the metrics."""

from typing import Protocol

from sealane.host.models import Migration, Role


class Observer(Protocol):
    """Told from the agent's own thread; must not raise."""

    def begun(self, migration: Migration) -> None:
        """It is in progress now, after `waited_s` in the queue."""

    def ended(self, migration: Migration) -> None:
        """No job runs it any more."""

    def refused(self, role: Role, code: str, *, journalled: bool) -> None:
        """A peer's wish was refused before it became a migration."""


class Unobserved:
    """Nobody listens."""

    def begun(self, migration: Migration) -> None:
        """Nothing."""

    def ended(self, migration: Migration) -> None:
        """Nothing."""

    def refused(self, role: Role, code: str, *, journalled: bool) -> None:
        """Nothing."""
