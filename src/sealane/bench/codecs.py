"""`./run bench codecs`: what it costs one core to seal, encode, digest and compress pages.

Pages lie in pieces as the lanes have them: 512 KiB, a record's payload. `hrt`, `shift` and `affine` are measured in place.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from sealane.bench import micro
from sealane.bench.micro import Task
from sealane.crypto.aead import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Aead
from sealane.limits import MIB, RECORD_PAYLOAD_MAX
from sealane.seal.codecs import CODECS, PAGE_BYTES
from sealane.seal.digests import PageDigests
from sealane.seal.keys import Direction, LaneKeys
from sealane.seal.records import RecordReader, RecordSealer

_GOALS: Final = {"hrt": 1.2}
_SEALED_GOAL: Final = 6.0
_DIGEST_GOAL: Final = 3.0
_ZSTD_LEVELS: Final = (-5, -1, 1, 3)


def main(arguments: Sequence[str]) -> int:
    """Measure all of it."""
    return micro.run("codecs", __doc__, tasks, arguments)


def tasks() -> Iterator[Task]:
    """Everything that may happen to a page on its way through a lane."""
    yield from _sealing()
    yield from _codecs()
    yield from _digests()
    yield from _zstd()


def _sealing() -> Iterator[Task]:
    for size in (MIB, RECORD_PAYLOAD_MAX):
        aead = Aead(secrets.token_bytes(KEY_BYTES))
        frame = memoryview(bytearray(size + TAG_BYTES))
        nonce = bytes(NONCE_BYTES)  # one key, one plaintext, nothing leaves: only the time counts
        header = bytes(24)
        name = f"sealed, {size // 1024} KiB"
        yield Task(
            f"{name}: AES-256-GCM, in place",
            size,
            partial(aead.seal_into, nonce, frame[:size], header, frame),
            _SEALED_GOAL,
        )
    yield Task("sealed, 512 KiB: a lane's record, sealed", RECORD_PAYLOAD_MAX, _record_sealer(), _SEALED_GOAL)
    yield Task(
        "sealed, 512 KiB: a record sealed, copied, opened",
        RECORD_PAYLOAD_MAX,
        _record_both_ways(),
        note="both ends on one core",
    )


def _keys() -> LaneKeys:
    return LaneKeys(bytes(KEY_BYTES), lane=0, direction=Direction.TO_DESTINATION)


def _record_sealer() -> Callable[[], object]:
    sealer = RecordSealer(_keys())
    sealer.open_lane()
    return lambda: sealer.seal_data(RECORD_PAYLOAD_MAX)


def _record_both_ways() -> Callable[[], object]:
    sealer, reader = RecordSealer(_keys()), RecordReader(_keys())

    def carry(record: memoryview) -> None:
        while len(record):
            space = reader.space()
            count = min(len(space), len(record))
            space[:count] = record[:count]
            reader.filled(count)
            record = record[count:]

    carry(sealer.open_lane())
    return lambda: carry(sealer.seal_data(RECORD_PAYLOAD_MAX))


def _codecs() -> Iterator[Task]:
    pages = _random_pages()
    for name, kind in CODECS.items():
        goal = _GOALS.get(name)
        for way in ("encode", "decode"):
            work = getattr(kind(bytes(KEY_BYTES)), f"{way}_into")
            yield Task(f"{name}, {way}", pages.nbytes, partial(work, pages, pages), goal)


def _digests() -> Iterator[Task]:
    digests, pages = PageDigests(bytes(KEY_BYTES)), _random_pages()
    yield Task("digests, a piece of 128 pages", pages.nbytes, partial(digests.of, pages), _DIGEST_GOAL)
    # as they lie in a single stream: each behind 8 bytes of its record's head
    heads = np.zeros((len(pages), 8 + PAGE_BYTES), np.uint8)
    yield Task("digests, pages 8 bytes apart", pages.nbytes, partial(digests.of, heads[:, 8:]), _DIGEST_GOAL)


def _zstd() -> Iterator[Task]:
    for content, piece in (("random data", _random_pages().tobytes()), ("this program's libraries", _library_bytes())):
        for level in _ZSTD_LEVELS:
            compressor = zstandard.ZstdCompressor(level=level)
            packed = compressor.compress(piece)
            note = f"{len(packed) / len(piece):.2f} of the bytes"
            yield Task(f"zstd {level}, {content}", len(piece), partial(compressor.compress, piece), note=note)
        unpack = zstandard.ZstdDecompressor().decompress
        yield Task(f"zstd, {content}, back", len(piece), partial(unpack, packed))


def _random_pages() -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(secrets.token_bytes(RECORD_PAYLOAD_MAX)), np.uint8).reshape(-1, PAGE_BYTES)


def _library_bytes() -> bytes:
    """Machine code and data that every machine with numpy has: the middle of its largest shared library."""
    libraries = sorted(Path(np.__file__).parent.rglob("*.so"), key=lambda path: path.stat().st_size)
    data = libraries[-1].read_bytes()
    middle = len(data) // 2
    return data[middle : middle + RECORD_PAYLOAD_MAX]
