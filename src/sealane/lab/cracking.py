"""Cryptanalysis of the seeds' page codecs, from captured pages alone.

What is known to the attacker: what each codec does (docs/codecs.md), and that memory holds zeros, text and small numbers more
than anything else. Nothing of Sealane's own code is used. Every attack gives the key's parameters, which decode pages; whether
they are right, decoding shows: memory that was decoded with a wrong key looks like noise.

Positions in a page are counted from 0 here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sealane.lab.sight import PAGE_BYTES, Pages

Floats: TypeAlias = NDArray[np.float64]
_SAMPLE_PAGES: Final = 1024
_TABLE: Final = 256
_JUDGED_KEYS: Final = 1024
_MOST: Final = 0.95
_TEXTS: Final = 16  # so many pages of text are better than thousands of all kinds
_ODD: Final = np.arange(1, 256, 2, dtype=np.uint8)
_INVERSES: Final = np.array([pow(int(a), -1, 256) for a in _ODD], np.uint8)
_BYTES: Final = np.arange(256, dtype=np.uint8)
# How many of a hundred characters of English text are each: Kasiski's and Friedman's tests need no more than that they differ.
_LETTERS: Final = " etaoinsrhldcumfpgwybvkxjqz"
_PERCENT: Final = (18, 10, 7, 6, 6, 6, 6, 5, 5, 5, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 0.6, 0.2, 0.2, 0.1, 0.1)
_ENGLISH: Final = dict(zip(_LETTERS, _PERCENT, strict=True))


@dataclass
class Broken:
    """What an attack recovered. `key` is empty where it did not, and `how` says from what it was concluded."""

    codec: str
    key: dict[str, Any] = field(default_factory=dict)
    how: list[str] = field(default_factory=list)
    pages_used: int = 0

    @property
    def is_broken(self) -> bool:
        """Whether there is a key."""
        return bool(self.key)

    def decode(self, pages: Pages) -> Pages:
        """The pages in clear; ValueError where there is no key."""
        match self.codec if self.key else "":
            case "affine":
                return decode_affine(pages, self.key["a"], self.key["b"])
            case "shift":
                return decode_shift(pages, bytes.fromhex(self.key["table"]))
            case "hrt":
                return decode_hrt(
                    pages, self.key["a"], self.key["b"], np.frombuffer(bytes.fromhex(self.key["q"]), np.uint8)
                )
        raise ValueError(f"no key of {self.codec} was recovered")


def decode_affine(pages: Pages, a: int, b: int) -> Pages:
    """x = a⁻¹·(y - b)."""
    return _affine_table(a, b)[pages]


def _affine_table(a: int, b: int) -> NDArray[np.uint8]:
    return ((_BYTES - np.uint8(b)) * np.uint8(pow(a, -1, 256))).astype(np.uint8)


def decode_shift(pages: Pages, table: bytes) -> Pages:
    """x = y - K."""
    return pages - np.resize(np.frombuffer(table, np.uint8), PAGE_BYTES)


def decode_hrt(pages: Pages, a: int, b: int, q: Pages) -> Pages:
    """`q` are the 128 entries of Q that are ever used: those of the even positions, in their order."""
    affine, plain = _affine_table(a, b), np.empty_like(pages)
    first, second = pages[:, 0::2], pages[:, 1::2]
    plain[:, 0::2] = affine[first] ^ np.resize(q, PAGE_BYTES // 2)
    plain[:, 1::2] = affine[second] - first
    return plain


def _classes() -> list[tuple[float, Floats]]:
    """What memory is made of, each with its share: zeros, text, small numbers, and noise (which code is too, here)."""
    text = np.full(256, 0.02 / 256)
    for letter, percent in _ENGLISH.items():
        text[ord(letter)] += 0.82 * percent / 100
    text[[*range(0x30, 0x3A), *range(0x41, 0x5B), *map(ord, "\n.,-_/:=")]] += 0.16 / 44
    zeros, small = np.full(256, 0.01 / 256), np.full(256, 0.1 / 256)
    zeros[0] += 0.99
    small[0] += 0.4
    small[1:17] += 0.4 / 16
    small[255] += 0.1
    return [(0.35, zeros), (0.3, text / text.sum()), (0.1, small), (0.25, np.full(256, 1 / 256))]


@cache
def byte_model() -> Floats:
    """The logarithm of how likely each byte is in memory."""
    logarithms: Floats = np.log(sum(weight * shares for weight, shares in _classes()))
    return logarithms


@cache
def pair_model() -> Floats:
    """The same of two neighbours (256, 256): letters stand beside letters, and zeros beside zeros."""
    logarithms: Floats = np.log(sum(weight * np.outer(shares, shares) for weight, shares in _classes()))
    return logarithms


def coincidence(counts: NDArray[Any]) -> float:
    """The index of coincidence: how often two bytes are equal. 1/256 for noise, 0.065 for English letters."""
    total = int(counts.sum())
    return float((counts * (counts - 1.0)).sum() / (total * (total - 1.0))) if total > 1 else 0.0


def _histogram(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.bincount(data.reshape(-1), minlength=256)


def _is_noise(pages: Pages) -> bool:
    """Whether the bytes are spread as evenly as those of a good cipher."""
    return coincidence(_histogram(pages)) < 1.05 / 256


def break_affine(pages: Pages) -> Broken:
    """All 32 768 keys, each judged by how much what it decodes looks like memory."""
    broken = Broken("affine", pages_used=len(pages))
    if not len(pages) or _is_noise(pages):
        broken.how.append("the bytes are spread evenly: no key would make memory of them")
        return broken
    counts = _histogram(pages)
    # scores[a, b] = sum over y of counts[y] · model[a⁻¹·(y - b)]
    decoded = (_BYTES[None, None, :] - _BYTES[None, :, None]) * _INVERSES[:, None, None]
    scores = (byte_model()[decoded] @ counts).reshape(-1)
    # single bytes do not tell like keys apart; what stands beside what does
    best = np.argsort(scores)[-_JUDGED_KEYS:]
    pairs = _pairs(pages[:: max(1, len(pages) // _SAMPLE_PAGES)])
    tables = decoded.reshape(-1, 256)
    judged = np.array([float((pair_model()[np.ix_(tables[key], tables[key])] * pairs).sum()) for key in best])
    order = np.argsort(judged)
    ahead = (judged[order[-1]] - judged[order[-2]]) / pairs.sum()
    a, b = divmod(int(best[order[-1]]), 256)
    broken.how.append(
        f"{scores.size} keys tried, the best {len(best)} by neighbours too; {ahead:.3f} nats a pair ahead"
    )
    broken.key = {"a": int(_ODD[a]), "b": b}
    return broken


def _pairs(pages: Pages) -> NDArray[np.int64]:
    """How often each byte (row) stands before each other (column)."""
    words = np.ascontiguousarray(pages).reshape(-1).view("<u2")
    return np.bincount(words, minlength=65536).reshape(256, 256).T


# ---- shift


def kasiski(pages: Pages, *, longest: int = 2048) -> dict[int, int]:
    """How often eight bytes come again in a page at each distance (Kasiski's test); the period divides most of them."""
    windows = np.lib.stride_tricks.sliding_window_view(pages[:64], 8, axis=1)
    words = np.ascontiguousarray(windows).view("<u8")[..., 0]
    found: dict[int, int] = {}
    order = np.argsort(words, axis=1, kind="stable")
    ordered = np.take_along_axis(words, order, axis=1)
    steps = np.diff(order, axis=1)[ordered[:, 1:] == ordered[:, :-1]]
    for distance, count in enumerate(np.bincount(steps[(steps > 0) & (steps <= longest)], minlength=1).tolist()):
        if count:
            found[distance] = count
    return found


def find_period(pages: Pages) -> tuple[int, list[str]]:
    """The length of the table: what divides nearly all of Kasiski's distances, confirmed by the index of coincidence."""
    distances = kasiski(pages)
    total = sum(distances.values())
    if not total:
        return 0, ["no eight bytes come again in a page"]
    common = sorted(distances, key=lambda distance: -distances[distance])[:32]
    candidates = {math.gcd(first, second) for first in common for second in common}
    shares = {
        period: sum(count for distance, count in distances.items() if distance % period == 0) / total
        for period in candidates
    }
    # the period divides nearly all distances, and so do its divisors
    period = max((period for period, share in shares.items() if share > _MOST), default=1)
    columns = pages[:, : PAGE_BYTES // period * period].reshape(len(pages), -1, period)
    picked = np.unique(np.linspace(0, period - 1, min(period, 32)).astype(int))
    inside = float(np.mean([coincidence(_histogram(columns[:, :, column])) for column in picked]))
    whole = coincidence(_histogram(pages))
    said = [
        f"Kasiski: {shares.get(period, 1):.0%} of {total} repeats lie a multiple of {period} apart",
        f"index of coincidence {inside:.3f} at that period, {whole:.4f} without one",
    ]
    return period if period > 1 and inside > 1.3 * whole else 0, said


def break_shift(pages: Pages) -> Broken:
    """Kasiski's test and the index of coincidence find the table's length, frequencies its bytes."""
    broken = Broken("shift", pages_used=len(pages))
    sample = pages[:: max(1, len(pages) // _SAMPLE_PAGES)]
    period, broken.how = find_period(sample) if len(sample) else (0, ["no pages"])
    if not period:
        return broken
    table = bytearray(_best_keys(pages, period, _SHIFTED))
    texts = _text_pages(decode_shift(pages, bytes(table)))
    if len(texts) >= _TEXTS:
        broken.how.append(f"the table once more, from the {len(texts)} pages that turned out to be text")
        table = bytearray(_best_keys(pages[texts], period, _SHIFTED, _text_model()))
    broken.key = {"m": period, "table": bytes(table).hex()}
    return broken


# which plain byte an encoded one (row) is under each key (column)
_SHIFTED: Final = (_BYTES[:, None] - _BYTES[None, :]).astype(np.uint8)
_XORED: Final = (_BYTES[:, None] ^ _BYTES[None, :]).astype(np.uint8)


def _best_keys(
    pages: NDArray[np.uint8], period: int, plain: NDArray[np.uint8], model: Floats | None = None
) -> list[int]:
    """For each column of a period the key under which its bytes look most like memory."""
    likely = (byte_model() if model is None else model)[plain]
    return [int((_histogram(pages[:, column::period]) @ likely).argmax()) for column in range(period)]


def _text_pages(decoded: Pages) -> NDArray[np.intp]:
    """The numbers of the pages that are text for the most part, wrong bytes among it."""
    is_text = np.zeros(256, np.bool_)
    is_text[[9, 10, *range(32, 127)]] = True
    return np.flatnonzero(is_text[decoded].mean(axis=1) > 0.85)


@cache
def _text_model() -> Floats:
    """Bytes of text, with zeros behind it."""
    (_, zeros), (_, text), *_ = _classes()
    logarithms: Floats = np.log(0.9 * text + 0.1 * zeros)
    return logarithms


# ---- hrt


def break_hrt(pages: Pages) -> Broken:
    """a and b from neighbours, Q from frequencies.

    An odd-numbered byte is a·(p + y) + b, where y is the encoded byte before it, which everybody sees: taking a·y off leaves an
    affine cipher, whatever Q is. The even-numbered bytes are then Vigenère's with XOR, of period 256 and known a, b.
    """
    broken = Broken("hrt", pages_used=len(pages))
    if not len(pages):
        broken.how.append("no pages")
        return broken
    sample = pages[:: max(1, len(pages) // _SAMPLE_PAGES)]
    pairs = _pairs(sample).T  # [second, first]
    scores = np.empty((len(_ODD), 256))
    model = byte_model()
    for row, (odd, inverse) in enumerate(zip(_ODD, _INVERSES, strict=True)):
        places = (_BYTES[:, None] - odd * _BYTES[None, :]).reshape(-1)  # y2 - a·y1 = a·p + b
        rest = np.bincount(places, weights=pairs.reshape(-1), minlength=256)
        scores[row] = model[((_BYTES[None, :] - _BYTES[:, None]) * inverse).astype(np.uint8)] @ rest
    best = int(scores.argmax())
    if scores.max() / pairs.sum() < float(model.mean()) + 0.5:
        broken.how.append("what is left after taking any a·y off is spread evenly: not hrt, or nothing but noise in it")
        return broken
    a, b = int(_ODD[best // 256]), best % 256
    gap = (scores.max() - np.partition(scores.reshape(-1), -2)[-2]) / pairs.sum()
    broken.how.append(f"a={a}, b={b} from {int(pairs.sum())} neighbours, {gap:.2f} nats a pair ahead of the next key")
    mixed = _affine_table(a, b)[pages[:, 0::2]]
    q = bytes(_best_keys(mixed, _TABLE // 2, _XORED))
    texts = _text_pages(decode_hrt(pages, a, b, np.frombuffer(q, np.uint8)))
    if len(texts) >= _TEXTS:
        broken.how.append(f"Q once more, from the {len(texts)} pages that turned out to be text")
        q = bytes(_best_keys(mixed[texts], _TABLE // 2, _XORED, _text_model()))
    broken.how.append(f"{len(set(q))} different entries among the 128 of Q that are ever used; the other 128 never are")
    broken.key = {"a": a, "b": b, "q": q.hex()}
    return broken


_ELF: Final = tuple(bytes.fromhex(f"7f454c46020101{abi}0000000000000000") for abi in ("00", "03"))


def known_header(pages: Pages, known: Sequence[bytes] = _ELF) -> tuple[int, int] | None:
    """a and b of hrt from one page that begins with known bytes, by default a program's header; None where none does."""
    for header in known:
        places = np.arange(1, len(header), 2)
        total = np.frombuffer(header, np.uint8)[places][None, :] + pages[:, places - 1]
        rest = pages[None, :, places] - _ODD[:, None, None] * total[None, :, :]
        # a page whose encoded bytes are all alike fits any a
        fits = (rest == rest[..., :1]).all(axis=2) & (total != total[:, :1]).any(axis=1)[None, :]
        hits = np.argwhere(fits)
        if len(hits):
            row, page = hits[0]
            return int(_ODD[row]), int(rest[row, page, 0])
    return None


def repeats(pages: Pages) -> int:
    """How many encoded pages are equal to one before: under one key and table, equal pages stay equal."""
    return len(pages) - len({page.tobytes() for page in pages})


# ---- rc4


def keystream_reuse(first: Pages, second: Pages) -> float:
    """How many standard deviations more often than by chance two captures agree at the same place of their streams.

    Below 5 there is no reuse. Where the keystream is the same, equal plaintext shows as equal bytes, and zeros as the other
    capture's plaintext.
    """
    length = min(first.size, second.size)
    if not length:
        return 0.0
    equal = int(np.count_nonzero(first.reshape(-1)[:length] == second.reshape(-1)[:length]))
    return (equal - length / 256) / math.sqrt(length / 256 * (1 - 1 / 256))


def read_with_crib(first: Pages, second: Pages, known: Pages) -> Pages:
    """What was encoded as `second`, where the same keystream made `first` of `known`."""
    count = min(len(first), len(second), len(known))
    return first[:count] ^ known[:count] ^ second[:count]


def rc4_bias(*, keys: int = 1 << 15, seed: int = 1) -> float:
    """How often RC4's second byte is zero under random keys, against 1/256: Mantin and Shamir's bias, about 2."""
    random = np.random.default_rng(seed)
    key = random.integers(0, 256, (keys, 16), dtype=np.uint8)
    state = np.tile(_BYTES, (keys, 1))
    rows, j = np.arange(keys), np.zeros(keys, np.uint8)

    def swap(i: int) -> None:
        state[rows, i], state[rows, j] = state[rows, j].copy(), state[:, i].copy()

    for i in range(256):
        j = j + state[:, i] + key[:, i % 16]
        swap(i)
    j = np.zeros(keys, np.uint8)
    for i in (1, 2):
        j = j + state[:, i]
        swap(i)
    second = state[rows, state[:, 2] + state[rows, j]]
    return float(np.count_nonzero(second == 0) / keys * 256)


def break_codec(codec: str, pages: Pages) -> Broken:
    """The attack on a codec of that name; under `rc4` none works on pages of one capture."""
    attacks = {"affine": break_affine, "shift": break_shift, "hrt": break_hrt}
    if not len(pages):
        return Broken(codec, how=["no encoded pages in the capture: nothing to attack"])
    if codec in attacks:
        return attacks[codec](pages)
    return Broken(codec, how=["no attack on pages of one capture"], pages_used=len(pages))


def try_all(pages: Pages) -> list[Broken]:
    """Every attack on pages of which the codec is not known."""
    return [break_codec(codec, pages) for codec in ("affine", "shift", "hrt")]
