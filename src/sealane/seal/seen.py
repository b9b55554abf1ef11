"""What the destination's memory holds, as far as is certain: a digest for each page that was sent.

A page may be left out only where the destination will hold the same content without it. That is a question of order, and only
QEMU's epochs give one between lanes: everything before a SYNC is loaded before anything behind it; within an epoch each lane
keeps its own order, and two lanes have none. So each entry has the epoch and the lane that it comes from, and

 1. a page that was sent before, in an earlier epoch or by this lane, and has the same digest, may be left out,
    if every lane has reached this lane's epoch: otherwise another lane may still send an older content for it;
 2. a page that two lanes send in one epoch is not known for the rest of it;
 3. a page of an earlier epoch than its entry is sent and changes nothing;
 4. a page that comes twice in one call is sent both times, and is not known afterwards;
 5. an epoch in which another lane passed pages that cannot be read, or of a block that was not listed yet, makes nothing known;
 6. after `stop` nothing is left out: postcopy throws pages away at the destination.

Wherever the epochs are not certain the answer is to send.
"""

import threading
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sealane.limits import LANES_MAX, SEEN_MEMORY_MAX
from sealane.seal.digests import PAGE_BYTES, Digests

Offsets: TypeAlias = NDArray[np.uint64]
Mask: TypeAlias = NDArray[np.bool_]

_LANE_BITS: Final = LANES_MAX.bit_length()
_SEVERAL_LANES: Final = (1 << _LANE_BITS) - 1  # instead of a lane, where more than one sent the page in an epoch
_BYTES_A_PAGE: Final = 16 + 4
_NOT_KNOWN: Final = np.uint64(0)  # both words: that a digest is 0 has a chance of 2^-128, and costs only a page


@dataclass
class _Block:
    digests: Digests  # n, 2; zeros: not known
    stamps: NDArray[np.uint32]  # epoch and lane


class PagesSeen:
    """One table for all lanes of a migration; every method may be called from any lane's thread.

    Memory: 20 bytes for each page of 4096 that was touched, at most SEEN_MEMORY_MAX; blocks beyond that are never known.
    """

    def __init__(self, lanes: int) -> None:
        self._lock = threading.Lock()
        self._epochs = [1] * lanes  # 0 stands for: not sent yet
        self._unread = [0] * lanes  # the last epoch in which the lane passed pages unread
        self._blocks: dict[str, _Block] = {}
        self._left = SEEN_MEMORY_MAX
        self._stopped = False
        self.used = False

    def list_block(self, name: str, length: int) -> None:
        """A RAM block of so many bytes; named again, nothing of it is known."""
        pages = length // PAGE_BYTES
        with self._lock:
            old = self._blocks.pop(name, None)
            if old is not None:
                self._left += len(old.stamps) * _BYTES_A_PAGE
            if pages * _BYTES_A_PAGE <= self._left:
                self._left -= pages * _BYTES_A_PAGE
                # zeros cost no memory until they are written
                self._blocks[name] = _Block(np.zeros((pages, 2), np.uint64), np.zeros(pages, np.uint32))

    def next_epoch(self, lane: int) -> None:
        """This lane has passed a SYNC."""
        with self._lock:
            self._epochs[lane] += 1

    def stop(self) -> None:
        """From now on nothing is left out."""
        with self._lock:
            self._stopped = True

    @property
    def may_pass_unread(self) -> bool:
        """Whether pages need not be noted: nothing is known yet, and no other lane's order depends on them."""
        return not self.used and len(self._epochs) == 1

    def passed_unread(self, lane: int) -> None:
        """Pages of this lane's present epoch went by and nobody could read which."""
        with self._lock:
            self._unread[lane] = self._epochs[lane]

    def forget(self, lane: int, name: str, offsets: Offsets) -> None:
        """These pages are sent, with contents that nobody knows."""
        with self._lock:
            block = self._blocks.get(name)
            if block is None:
                self._unread[lane] = self._epochs[lane]
            else:
                self._note(lane, block, self._indexes(block, offsets), None)

    def needed(self, lane: int, name: str, offsets: Offsets, digests: Digests) -> Mask:
        """Which of these pages must be sent (bool, n), noting all of them as sent. `offsets` are bytes in the block."""
        with self._lock:
            block = self._blocks.get(name)
            self.used = True
            if block is None:
                self._unread[lane] = self._epochs[lane]
                return np.ones(len(offsets), np.bool_)
            indexes = self._indexes(block, offsets)
            if len(indexes) != len(offsets):  # a page outside its block: QEMU's affair
                return np.ones(len(offsets), np.bool_)
            return self._note(lane, block, indexes, digests)

    def _note(self, lane: int, block: _Block, indexes: Offsets, digests: Digests | None) -> Mask:
        epoch = self._epochs[lane]
        stamp = np.uint32(epoch << _LANE_BITS | lane)
        stamps = block.stamps[indexes]
        before = stamps >> np.uint32(_LANE_BITS)
        in_order = (before < epoch) | (stamps == stamp)
        needed = np.ones(len(indexes), np.bool_)
        fresh = np.zeros((len(indexes), 2), np.uint64) if digests is None else digests.copy()
        if digests is not None and not self._stopped and min(self._epochs) >= epoch:  # rules 1 and 6
            known = block.digests[indexes]
            needed = ~((known == digests).all(axis=1) & known.any(axis=1) & in_order)
        repeated = _repeated(indexes)
        if repeated is not None:  # rule 4
            needed |= repeated
            fresh[repeated] = _NOT_KNOWN
        if any(unread >= epoch for other, unread in enumerate(self._unread) if other != lane):  # rule 5
            fresh[:] = _NOT_KNOWN
        fresh[~in_order] = _NOT_KNOWN  # rule 2
        marks = np.where(in_order, stamp, np.uint32(epoch << _LANE_BITS | _SEVERAL_LANES))
        late = before > epoch
        if late.any():  # rule 3
            indexes, fresh, marks = indexes[~late], fresh[~late], marks[~late]
        block.digests[indexes] = fresh
        block.stamps[indexes] = marks
        return needed

    @staticmethod
    def _indexes(block: _Block, offsets: Offsets) -> Offsets:
        indexes = offsets // np.uint64(PAGE_BYTES)
        return indexes[indexes < len(block.stamps)]


def _repeated(indexes: Offsets) -> Mask | None:
    """Which indexes occur more than once; None where, as usual, they only grow."""
    if len(indexes) < 2 or bool((indexes[1:] > indexes[:-1]).all()):
        return None
    _, inverse, counts = np.unique(indexes, return_inverse=True, return_counts=True)
    repeated: Mask = counts[inverse] > 1
    return repeated
