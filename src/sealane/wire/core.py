"""What all readers share: bytes in any pieces go in, events come out, and one error at most.

An element (a record, a section's head, a packet) is parsed where it lies in the bytes that were fed. Only an element that
is cut by the end of a piece is kept, completed from the next one, and parsed from that small copy. A parser says how many
bytes it needs *at least*, and never more than its element has, so nothing that follows is ever copied with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from sealane.errors import InternalError, WireError
from sealane.wire.events import Event, Opaque

Buffer: TypeAlias = bytes | bytearray | memoryview
# parses one element at `position` of the buffer, whose end is `end`; gives the bytes used, or what `Reader._want` gives
State: TypeAlias = Callable[[memoryview, int, int], int]


class Reader(ABC):
    """Reads one direction of one connection.

    `feed` takes bytes as they arrive and gives the events that they complete; `close` says that no more will come. Events
    hold views of the fed bytes: a caller that reuses its buffer has to be done with them before.

    Bytes that contradict the format give one WireError. Events from before it are given first: then the next call raises.
    With `carry` the rest of the connection becomes an `Opaque` event instead, so that a relay can pass it on.

    How events are cut follows the pieces that were fed: what has arrived is given at once. Memory is bounded by one
    element (limits.WIRE_ELEMENT_MAX) beyond what is fed.
    """

    def __init__(self, *, carry: bool = False) -> None:
        self.error: WireError | None = None
        self.carry = carry
        # Whether to pass over pages without an event, for who only keeps in step: events of pages then have no use, and
        # what they say (a page beyond its block) is not looked at. May be changed between two calls of `feed`.
        self.quiet = False
        self._state: State = self._begin
        self._pending = bytearray()
        self._need = 1
        self._offset = 0  # of the element that is being parsed, in the connection
        self._section = ""  # what an error says it was in
        self._events: list[Event] = []
        self._closed = False

    @abstractmethod
    def _begin(self, buffer: memoryview, position: int, end: int) -> int:
        """The state in which a connection opens."""

    @property
    def offset(self) -> int:
        """How many bytes of the connection stand in events so far."""
        return self._offset

    @property
    def pending(self) -> bytes:
        """The beginning of an element whose rest has not come: fed, and not yet in an event."""
        return bytes(self._pending)

    def take_back(self) -> bytes:
        """What `pending` has, which the reader forgets: the caller puts it in front of the next piece.

        An element that is cut then lies whole in that piece, and need not be parsed by itself.
        """
        pending = bytes(self._pending)
        self._pending.clear()
        return pending

    def feed(self, data: Buffer) -> list[Event]:
        """The events that `data` completes. Raises WireError; ValueError after `close`."""
        if self._closed:
            raise ValueError("the reader was closed")
        if self.error is not None:
            raise self.error
        events = self._events = []
        piece = memoryview(data).cast("B")
        position = 0
        try:
            position = self._complete_pending(piece)
            if not self._pending:
                position = self._parse_all(piece, position)
                if position < len(piece):
                    self._pending += piece[position:]
        except Misfit as problem:
            self._fail(problem.error, bytes(self._pending) + bytes(piece[problem.position :]))
        if self.error is not None and not events:
            raise self.error
        return events

    def close(self) -> list[Event]:
        """Says that the connection ended. Raises WireError `wire.truncated` where it ended inside an element."""
        self._closed = True
        if self.error is not None:
            raise self.error
        events = self._events = []
        reason = "the connection ended inside an element" if self._pending else self._why_not_end_here()
        if reason:
            self._fail(
                WireError("wire.truncated", reason, offset=self._offset, section=self._section), bytes(self._pending)
            )
            if self.error is not None:
                raise self.error
        return events

    def _why_not_end_here(self) -> str:
        """Why a connection may not end between two elements here; empty where it may."""
        return ""

    def _fail(self, error: WireError, rest: bytes) -> None:
        self._pending.clear()
        if not self.carry:
            self.error = error
            return
        self._state = self._opaque
        self._opaque_reason = error.detail
        if rest:
            self._emit(Opaque(memoryview(rest), self._offset, error.detail))
            self._offset += len(rest)

    def _complete_pending(self, piece: memoryview) -> int:
        """Completes and parses what was cut before, one element at a time; gives how much of `piece` that took."""
        position = 0
        while self._pending:
            missing = self._need - len(self._pending)
            if missing > 0:
                taken = piece[position : position + missing]
                self._pending += taken
                position += len(taken)
                if len(taken) < missing:
                    break
            buffer = memoryview(bytes(self._pending))
            used = self._step(buffer, 0, position)
            if used:
                # something is left where the element had to look at what follows it (RAM blocks with large pages)
                del self._pending[:used]
                self._need = 1
        return position

    def _parse_all(self, piece: memoryview, position: int) -> int:
        while position < len(piece):
            used = self._step(piece, position, position)
            if not used:
                break
            position += used
        return position

    def _step(self, buffer: memoryview, position: int, fed: int) -> int:
        """One element; `fed` is how much of the fed piece is used or copied, for the error."""
        try:
            used = self._state(buffer, position, len(buffer))
        except WireError as error:
            raise Misfit(error, fed) from error
        if not used and self._need <= len(buffer) - position:
            raise InternalError("internal.error", f"the reader asks for what it has, at offset {self._offset}")
        self._offset += used
        return used

    def _want(self, need: int) -> int:
        """Says that the present element has at least `need` bytes; gives the 0 that a state returns then."""
        self._need = need
        return 0

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _malformed(self, detail: str, *, at: int = 0) -> WireError:
        return WireError("wire.malformed", detail, offset=self._offset + at, section=self._section)

    def _beyond(self, detail: str, *, at: int = 0) -> WireError:
        return WireError("wire.limit", detail, offset=self._offset + at, section=self._section)

    _opaque_reason = ""

    def _go_opaque(self, reason: str) -> None:
        """Carries all that follows on this connection as it is."""
        self._opaque_reason = reason
        self._state = self._opaque

    def _opaque(self, buffer: memoryview, position: int, end: int) -> int:
        self._emit(Opaque(buffer[position:end], self._offset, self._opaque_reason))
        return end - position


class Misfit(Exception):
    """Carries a WireError from a state to `feed`, with how much of the fed piece was used before."""

    def __init__(self, error: WireError, position: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.position = position


def iterate_events(reader: Reader, pieces: Iterable[Buffer]) -> Iterator[Event]:
    """All events of one connection in order, then WireError where there is one; closes the reader."""
    for piece in pieces:
        yield from reader.feed(piece)
    yield from reader.close()
