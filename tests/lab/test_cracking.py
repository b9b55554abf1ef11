"""The attacks against the product's codecs, with pages as a capture would have them; and against what they cannot break."""

import numpy as np
import pytest

from sealane.lab import cracking
from sealane.lab.cracking import Broken, break_codec, known_header
from sealane.seal.codecs import CODECS, Shift
from tests.lab.rig import memory

PAGES = memory()
KEYS = [bytes([number]) * 32 for number in (1, 2, 7)]


def encoded(codec: str, key: bytes) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    out = np.empty_like(PAGES)
    CODECS[codec](key).encode_into(PAGES, out)
    return out


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("codec", ["affine", "shift", "hrt"])
def test_pages_are_decoded_without_the_key(codec: str, key: bytes) -> None:
    pages = encoded(codec, key)
    broken = break_codec(codec, pages)
    assert broken.is_broken, broken.how
    assert np.array_equal(broken.decode(pages), PAGES)


@pytest.mark.parametrize("period", [3, 16, 100, 256])
def test_tables_of_other_lengths(period: int) -> None:
    table = np.random.default_rng(period).bytes(period)
    out = np.empty_like(PAGES)
    Shift.with_parameters(table).encode_into(PAGES, out)
    broken = break_codec("shift", out)
    assert (broken.key["m"], bytes.fromhex(broken.key["table"])) == (period, table)


def test_one_known_header_gives_a_and_b() -> None:
    pages = encoded("hrt", KEYS[0])
    key = break_codec("hrt", pages).key
    assert PAGES[0, :4].tobytes() == b"\x7fELF"
    assert known_header(pages) == (key["a"], key["b"])
    assert known_header(pages[1:2]) is None


@pytest.mark.parametrize("codec", ["affine", "shift", "hrt", "rc4"])
def test_nothing_is_found_in_noise_or_nothing(codec: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 4096), dtype=np.uint8)
    for pages in (noise, encoded("rc4", KEYS[0]), noise[:0]):
        broken = break_codec(codec, pages)
        assert not broken.is_broken, broken
        with pytest.raises(ValueError, match="no key"):
            broken.decode(pages)


@pytest.mark.parametrize("codec", ["affine", "shift", "hrt", "rc4"])
def test_no_pages_are_not_called_noise(codec: str) -> None:
    assert break_codec(codec, PAGES[:0]).how == ["no encoded pages in the capture: nothing to attack"]


def test_rc4_falls_where_a_key_is_used_twice() -> None:
    once, again = encoded("rc4", KEYS[0]), np.empty_like(PAGES)
    other = PAGES[::-1].copy()
    CODECS["rc4"](KEYS[0]).encode_into(other, again)
    assert cracking.keystream_reuse(once, again) > 50
    assert cracking.keystream_reuse(once, encoded("rc4", KEYS[1])) < 5
    assert np.array_equal(cracking.read_with_crib(once, again, PAGES), other)


def test_rc4s_second_byte() -> None:
    assert 1.7 < cracking.rc4_bias() < 2.3


def test_repeats() -> None:
    assert cracking.repeats(np.concatenate([encoded("hrt", KEYS[0])[:10]] * 3)) == 20


def test_a_broken_without_a_key_says_so() -> None:
    assert not Broken("hrt").is_broken
