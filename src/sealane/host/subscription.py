"""One reader of a migration's events, or of several migrations' at once."""

import asyncio
from collections import deque
from typing import Final, Self

from sealane.host.models import Event

# Progress events that wait for a slow subscriber; older ones are dropped first.
PROGRESS_WAITING_MAX: Final = 16


class Subscription:
    """`async for event in subscription`; the last one is the `ends`th of type "end"."""

    def __init__(self, *, ends: int = 1) -> None:
        self._waiting: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._ends_left = ends

    def push(self, event: Event) -> None:
        """Add an event; never blocks. Past the bound the oldest progress goes."""
        self._waiting.append(event)
        progress = [waiting for waiting in self._waiting if waiting.type == "progress"]
        if len(progress) > PROGRESS_WAITING_MAX:
            self._waiting.remove(progress[0])
        self._arrived.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._ends_left <= 0:
            raise StopAsyncIteration
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._waiting.popleft()
        self._ends_left -= event.type == "end"
        return event
