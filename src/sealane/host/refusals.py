"""What a peer asked for and was refused before it became a migration: journalled within bounds, and counted."""

import time
from collections.abc import Callable
from typing import Any

import structlog

from sealane.errors import SealaneError
from sealane.host.job import Clock, Issue
from sealane.host.limits import TokenBuckets
from sealane.host.models import Migration, Role
from sealane.host.observer import Observer
from sealane.host.problems import problem_of
from sealane.host.store import Store

_log = structlog.get_logger()


class Refusals:
    """The refused wishes of all peers."""

    def __init__(
        self,
        store: Store,
        per_peer_per_hour: int,
        *,
        issue: Issue,
        observer: Observer,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._issue, self._observer, self._clock = store, issue, observer, clock
        self._buckets = TokenBuckets(per_peer_per_hour, 3600.0, clock=monotonic)
        self._dropped: dict[str, int] = {}

    def refuse(self, error: SealaneError, *, vm: str, role: Role, peer: str, id: str, **details: Any) -> None:
        """Journal a peer's wish that was refused before it became a job, and write its receipt; never raises.

        So many an hour for each peer (`limits.refusals_per_peer_per_hour`): no peer fills the journal. The others are counted.
        """
        journalled = self._buckets.take(peer)
        self._observer.refused(role, error.code, journalled=journalled)
        if not journalled:
            self._count_dropped(peer)
            return
        if dropped := self._dropped.pop(peer, 0):
            _log.warning("refused wishes of a peer were not journalled", peer=peer, count=dropped)
        try:
            if self._store.find(id):
                return
            now = self._clock()
            migration = Migration(
                id=id,
                number=self._store.next_number(),
                vm=vm,
                role=role,
                peer=peer,
                state="aborted",
                runs_at="source",
                started_at=now,
                ended_at=now,
                problem=problem_of(error),
                **details,
            )
            self._store.journal(migration)
            self._issue(migration)
        except SealaneError as failure:
            _log.error("a refusal was not journalled", migration=id[:8], code=failure.code, detail=failure.detail)

    def turned_away(self, error: SealaneError) -> None:
        """Count a peer's wish that was not even heard: it asks too often, or has too much under way."""
        self._observer.refused("destination", error.code, journalled=False)

    def _count_dropped(self, peer: str) -> None:
        if peer not in self._dropped:
            _log.warning("a peer has wishes refused faster than they are journalled", peer=peer)
        self._dropped[peer] = self._dropped.get(peer, 0) + 1
