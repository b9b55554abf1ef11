"""The seeds' codecs: the paper's vectors, byte-by-byte references, round trips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sealane.seal.codecs import CODECS, PAGE_BYTES, Affine, Hrt, PageCodec, Pages, Rc4Codec, Shift

KEY = bytes(range(32))
PAPER_A, PAPER_B = 3, 5

keys = st.binary(min_size=32, max_size=32)
contents = st.one_of(
    st.just(bytes(PAGE_BYTES)),
    st.just(b"\xff" * PAGE_BYTES),
    st.binary(min_size=1, max_size=64).map(lambda part: (part * PAGE_BYTES)[:PAGE_BYTES]),
    st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).bytes(PAGE_BYTES)),
)
names = st.sampled_from(sorted(CODECS))


def as_pages(*pages: bytes) -> Pages:
    return np.frombuffer(b"".join(pages), np.uint8).reshape(-1, PAGE_BYTES).copy()


def encoded(codec: PageCodec, pages: Pages) -> Pages:
    out = np.empty_like(pages)
    codec.encode_into(pages, out)
    return out


def table_with(**entries: int) -> NDArray[np.uint8]:
    """A permutation with `i0=3` meaning that entry 0 is 3."""
    wanted = {int(name[1:]): value for name, value in entries.items()}
    rest = iter(sorted(set(range(256)) - set(wanted.values())))
    return np.array([wanted[i] if i in wanted else next(rest) for i in range(256)], np.uint8)


def hrt_reference(a: int, b: int, table: list[int], page: bytes) -> bytes:
    """The paper's formulas, a byte at a time."""
    q, out = 0, bytearray()
    for i, p in enumerate(page, start=1):
        if i % 2:
            q = (a * (p ^ table[(i - 1) % 256]) + b) % 256
            out.append(q)
        else:
            out.append((a * (p + q) + b) % 256)
    return bytes(out)


@pytest.mark.parametrize(
    ("text", "expected"),
    # the paper prints 98 for the third of `efg`, which is 103 XOR 5 before the affine step (docs/codecs.md)
    [(b"efg", [55, 220, 43]), (b"eee", [55, 217, 37])],
)
def test_the_papers_vectors_from_an_odd_position(text: bytes, expected: list[int]) -> None:
    codec = Hrt.with_parameters(PAPER_A, PAPER_B, table_with(i0=3, i2=5))
    page = as_pages(text.ljust(PAGE_BYTES, b"\0"))
    assert encoded(codec, page)[0, :3].tolist() == expected


@pytest.mark.parametrize(("text", "expected"), [(b"efg", [156, 64, 250]), (b"eee", [156, 67, 253])])
def test_the_papers_vectors_from_an_even_position(text: bytes, expected: list[int]) -> None:
    codec = Hrt.with_parameters(PAPER_A, PAPER_B, table_with(i2=15))
    first_entry = int(table_with(i2=15)[0])
    gives_x = (
        pow(PAPER_A, -1, 256) * (ord("x") - PAPER_B) % 256
    ) ^ first_entry  # so that q is 'x', as the paper has it
    page = as_pages(bytes([gives_x]) + text.ljust(PAGE_BYTES - 1, b"\0"))
    assert encoded(codec, page)[0, :4].tolist() == [ord("x"), *expected]


@given(a=st.integers(0, 127), b=st.integers(0, 255), seed=st.integers(0, 2**32 - 1), content=contents)
def test_hrt_is_the_papers_formula_byte_by_byte(a: int, b: int, seed: int, content: bytes) -> None:
    table = np.random.default_rng(seed).permutation(256).astype(np.uint8)
    codec = Hrt.with_parameters(2 * a + 1, b, table)
    assert encoded(codec, as_pages(content)).tobytes() == hrt_reference(2 * a + 1, b, table.tolist(), content)


@given(a=st.integers(0, 127), b=st.integers(0, 255), content=contents)
def test_affine_is_its_formula(a: int, b: int, content: bytes) -> None:
    out = encoded(Affine.with_parameters(2 * a + 1, b), as_pages(content))
    assert out.tobytes() == bytes(((2 * a + 1) * x + b) % 256 for x in content)


@given(table=st.binary(min_size=1, max_size=PAGE_BYTES), content=contents)
def test_shift_is_its_formula_for_every_period(table: bytes, content: bytes) -> None:
    out = encoded(Shift.with_parameters(table), as_pages(content))
    assert out.tobytes() == bytes((x + table[i % len(table)]) % 256 for i, x in enumerate(content))


def test_rc4_is_rc4() -> None:
    """RFC 6229 gives the keystream for this key, from offset 0 on."""
    from sealane.crypto.rc4 import Rc4  # noqa: PLC0415

    key = bytes.fromhex("0102030405060708090a0b0c0d0e0f10")
    stream = bytearray(32)
    Rc4(key).apply_into(memoryview(bytes(32)), stream)
    assert stream.hex() == "9ac7cc9a609d1ef7b2932899cde41b975248c4959014126a6e8a84f11d1a9e1c"


def test_rc4_never_uses_a_part_of_its_keystream_twice() -> None:
    codec, zeros = Rc4Codec(KEY), as_pages(bytes(PAGE_BYTES))
    assert not np.array_equal(encoded(codec, zeros), encoded(codec, zeros))


@given(name=names, key=keys, pages=st.lists(contents, min_size=1, max_size=5), in_place=st.booleans())
def test_round_trip(name: str, key: bytes, pages: list[bytes], in_place: bool) -> None:
    original = as_pages(*pages)
    work = original.copy()
    out = work if in_place else np.empty_like(work)
    CODECS[name](key).encode_into(work, out)
    CODECS[name](key).decode_into(out, out)
    assert np.array_equal(out, original)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_byte_and_position_comes_back(name: str) -> None:
    """Page k holds byte (i + k) mod 256 at position i: 256 pages have every byte at every position."""
    positions = np.arange(PAGE_BYTES)
    original = ((positions[None, :] + np.arange(256)[:, None]) % 256).astype(np.uint8)
    codec, decoder = CODECS[name](KEY), CODECS[name](KEY)
    coded = encoded(codec, original)
    assert (coded != original).mean() > 0.9
    decoder.decode_into(coded, coded)
    assert np.array_equal(coded, original)


@given(name=names, count=st.integers(1, 70), step=st.sampled_from([8, 9, 4096]))
def test_rows_may_lie_apart(name: str, count: int, step: int) -> None:
    """Pages are views of QEMU's stream, with headers between them."""
    row = PAGE_BYTES + step
    stream = np.random.default_rng(count).integers(0, 256, count * row, dtype=np.uint8)
    apart = np.lib.stride_tricks.as_strided(stream, (count, PAGE_BYTES), (row, 1))
    together = apart.copy()
    assert np.array_equal(encoded(CODECS[name](KEY), apart), encoded(CODECS[name](KEY), together))


@given(name=names, key=keys, other=keys)
def test_another_key_gives_another_page(name: str, key: bytes, other: bytes) -> None:
    page = as_pages(np.random.default_rng(7).bytes(PAGE_BYTES))
    same = np.array_equal(encoded(CODECS[name](key), page), encoded(CODECS[name](other), page))
    # affine has 2^15 keys: two may be the same one
    assert same == (key == other) or (name == "affine" and same)


def test_keys_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError):
        Affine.with_parameters(2, 0)
    with pytest.raises(ValueError):
        Hrt.with_parameters(3, 5, np.zeros(256, np.uint8))
    with pytest.raises(ValueError):
        Shift.with_parameters(b"")


def test_a_codec_shows_no_key() -> None:
    assert [repr(CODECS[name](KEY)) for name in sorted(CODECS)] == ["Affine()", "Hrt()", "Rc4Codec()", "Shift()"]
