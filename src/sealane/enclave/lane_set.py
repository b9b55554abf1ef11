"""All lanes of one migration: which are awaited, whom QEMU's connections are for, and what the lanes come to together.

At the source QEMU dials a listener, once for each lane and in their order; at the destination each connection to QEMU is
attached to the lane that asked for it.
"""

import hashlib
import socket
from collections.abc import Callable
from typing import TypeAlias

from sealane.enclave.lane import Lane, Reduction
from sealane.errors import InternalError, PeerError
from sealane.limits import LANES_MAX

MakeLane: TypeAlias = Callable[[int, socket.socket, Reduction | None], Lane]


class LaneSet:
    """`expect` so many lanes, `add` each, and note what happens to them; `end` whatever is left. Served by one thread."""

    def __init__(self, make: MakeLane) -> None:
        """`make` builds a lane of its number, its connection to the peer, and what all of them leave out together."""
        self._make = make
        self._lanes: dict[int, Lane] = {}
        self._expected = 0
        self._reduction: Reduction | None = None
        self._opened: set[int] = set()
        self._closed: set[int] = set()
        self.listener: socket.socket | None = None  # of the source, until QEMU has dialled for every lane
        self._dialled = self._to_dial = 0

    def __bool__(self) -> bool:
        return bool(self._lanes)

    # ---- which

    def expect(self, count: int, reduction: Reduction | None = None) -> None:
        """From now on lanes 0 to `count` - 1 may be added; raises InternalError for a number that cannot be."""
        if not 0 < count <= LANES_MAX:
            raise InternalError("internal.error", f"{count} lanes")
        self._expected, self._reduction = count, reduction

    def add(self, index: int, connection: socket.socket) -> Lane:
        """The lane of that number on this connection, to be started; raises `peer.preface` where none is awaited."""
        if index in self._lanes or not 0 <= index < self._expected:
            connection.close()
            raise PeerError("peer.preface", f"lane {index} is not expected")
        lane = self._lanes[index] = self._make(index, connection, self._reduction)
        return lane

    # ---- QEMU's connections

    def listen(self, listener: socket.socket, to_dial: int) -> None:
        """Source: QEMU dials here for the first `to_dial` lanes; the others' connections are attached."""
        listener.setblocking(False)
        self.listener, self._to_dial = listener, to_dial

    def accept(self) -> bool:
        """QEMU has dialled for the next lane; False where that was the last time."""
        assert self.listener is not None  # noqa: S101 - whoever calls watches it
        connection, _ = self.listener.accept()
        self._lanes[self._dialled].attach(connection)
        self._dialled += 1
        return self._dialled < self._to_dial

    def stop_listening(self) -> None:
        """Close the listener; nothing where there is none."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def attach(self, index: int, connection: socket.socket) -> None:
        """QEMU's connection for one lane; raises InternalError for one whose connection the listener brings."""
        if index < self._to_dial:
            connection.close()
            raise InternalError("internal.error", f"lane {index} is for whom the listener hears")
        self._lanes[index].attach(connection)

    # ---- how far

    def note_opened(self, index: int) -> bool:
        """Whether all lanes are open with this one."""
        self._opened.add(index)
        return self.are_open

    def note_closed(self, index: int) -> bool:
        """Whether both ends have closed all lanes with this one."""
        self._closed.add(index)
        return self.are_closed

    @property
    def are_open(self) -> bool:
        """Whether every lane that is awaited is open, or was."""
        return len(self._opened) == self._expected > 0

    @property
    def are_closed(self) -> bool:
        """Whether both ends have closed every lane."""
        return len(self._closed) == self._expected > 0

    @property
    def none_is_closed(self) -> bool:
        """Whether memory may still go over every lane."""
        return not self._closed

    # ---- what they come to

    @property
    def digest(self) -> str:
        """SHA-256 over the lanes' digests in their order, in hex; the same at both ends once closed."""
        return hashlib.sha256(b"".join(self._lanes[index].digests for index in sorted(self._lanes))).hexdigest()

    def count(self) -> tuple[int, int, int, int, int]:
        """The fields of `interface.Counters`, in their order, over all lanes."""
        every = self._lanes.values()
        saved = [lane.saved for lane in every]
        return (
            sum(lane.wire_bytes for lane in every),
            sum(lane.plaintext_bytes for lane in every),
            sum(one.zero for one in saved),
            sum(one.same for one in saved),
            sum(one.compressed for one in saved),
        )

    def end(self, grace_s: float) -> None:
        """Close every connection, the listener too, and wait so long for each lane's threads."""
        self.stop_listening()
        for lane in self._lanes.values():
            lane.abort()
        for lane in self._lanes.values():
            lane.join(grace_s)
