"""Keyed page digests."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from sealane.crypto.kdf import expand
from sealane.seal.digests import PAGE_BYTES, PageDigests, Pages

KEY = bytes(range(32))


def random_pages(count: int, seed: int = 1) -> Pages:
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_BYTES), dtype=np.uint8)


def reference(key: bytes, page: bytes) -> bytes:
    """The docstring's formula, a block at a time."""
    masks = expand(key, b"sealane v1 page digest masks", PAGE_BYTES)
    aes = Cipher(algorithms.AES(expand(key, b"sealane v1 page digest key", 32)), modes.ECB()).encryptor()
    total = 0
    for at in range(0, PAGE_BYTES, 16):
        block = int.from_bytes(page[at : at + 16]) ^ int.from_bytes(masks[at : at + 16])
        total ^= int.from_bytes(aes.update(block.to_bytes(16)))
    return total.to_bytes(16)


def test_the_formula() -> None:
    pages = random_pages(3)
    assert [row.tobytes() for row in PageDigests(KEY).of(pages)] == [reference(KEY, page.tobytes()) for page in pages]


@given(count=st.integers(0, 130), seed=st.integers(0, 9))
def test_a_page_has_the_same_digest_wherever_it_stands(count: int, seed: int) -> None:
    pages = random_pages(count, seed)
    digests = PageDigests(KEY)
    together = digests.of(pages)
    assert together.shape == (count, 2)
    for at in {0, count // 2, count - 1} - {-1}:
        if at < count:
            assert np.array_equal(digests.of(pages[at : at + 1])[0], together[at])
    assert np.array_equal(digests.of(pages[::-1]), together[::-1])


def test_pages_may_lie_apart_in_a_stream() -> None:
    stream = np.random.default_rng(3).integers(0, 256, 9 * 4104, dtype=np.uint8)
    apart = np.ndarray((9, PAGE_BYTES), np.uint8, stream.data, 8, (4104, 1))
    assert np.array_equal(PageDigests(KEY).of(apart), PageDigests(KEY).of(apart.copy()))


def test_every_single_bit_changes_it() -> None:
    page = random_pages(1)
    bits = range(0, PAGE_BYTES * 8, 61)
    changed = np.repeat(page, len(bits), axis=0)
    for row, bit in enumerate(bits):
        changed[row, bit // 8] ^= 1 << bit % 8
    digests = {row.tobytes() for row in PageDigests(KEY).of(np.concatenate([page, changed]))}
    assert len(digests) == len(bits) + 1


@given(first=st.integers(0, 255), second=st.integers(0, 255))
def test_exchanged_or_equal_blocks_do_not_cancel(first: int, second: int) -> None:
    """Without the masks an XOR of AES blocks would not see their order, nor two equal ones."""
    page = random_pages(1, seed=5)
    blocks = page.reshape(-1, 16)
    exchanged = page.copy().reshape(-1, 16)
    exchanged[[first, second]] = blocks[[second, first]]
    doubled = np.zeros_like(blocks)
    doubled[[first, second]] = blocks[0]
    both = PageDigests(KEY).of(np.stack([page[0], exchanged.reshape(-1), doubled.reshape(-1), np.zeros_like(page[0])]))
    assert np.array_equal(both[0], both[1]) == (first == second)
    assert not np.array_equal(both[2], both[3])


def test_another_key_gives_other_digests() -> None:
    pages = random_pages(4)
    assert not (PageDigests(KEY).of(pages) == PageDigests(bytes(32)).of(pages)).any()


@pytest.mark.parametrize("shape", [(PAGE_BYTES,), (1, PAGE_BYTES - 1), (2, 2 * PAGE_BYTES)])
def test_what_is_no_page_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        PageDigests(KEY).of(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError):
        PageDigests(KEY).of(np.zeros((1, PAGE_BYTES), np.int8))
