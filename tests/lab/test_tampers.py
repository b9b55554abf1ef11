"""The man in the middle's edits, however the bytes are cut; and the impostor's greetings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.lab.impostor import preface
from sealane.lab.tampers import OldVersions, Replace
from sealane.session.preface import parse_preface


@given(st.lists(st.sampled_from([b"alice", b"al", b"ice", b"a", b"x" * 7]), max_size=30), st.data())
def test_replacing_does_not_depend_on_the_pieces(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts) + b"."
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=8)))
    replace = Replace(b"alice", b"mallo", least=1)
    pieces = [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    changed = b"".join(replace(0, "forward", 0, piece) for piece in pieces)
    assert changed == whole.replace(b"alice", b"mallo")
    assert replace.hits == whole.count(b"alice")


def test_connections_and_directions_are_apart() -> None:
    replace = Replace(b"alice", b"mallo", least=2)
    assert replace(0, "forward", 0, b"al") == b""
    assert replace(1, "forward", 0, b"ice") == b"ice"
    assert replace(0, "back", 0, b"ice") == b"ice"
    assert replace(0, "forward", 2, b"ice") == b"mallo"
    with pytest.raises(ValueError, match="as many"):
        Replace(b"alice", b"bob")


def test_what_ends_like_the_wanted_bytes_by_chance_does_not_wait() -> None:
    """It may be the last of a flight, and the other end answers nothing before it is whole."""
    replace = Replace(b"alice", b"mallo")
    assert [replace(0, "forward", 0, piece) for piece in (b"..a", b"..ali", b"..alic", b"e")] == [
        b"..a",
        b"..ali",
        b"..",
        b"mallo",
    ]


def test_versions_of_a_hello() -> None:
    hello = b"\x16\x03\x01" + bytes(20) + b"\x00\x2b\x00\x03\x02\x03\x04" + b"\x00\x33"
    old = OldVersions()
    assert old(0, "back", 0, hello) == hello
    assert old(0, "forward", 0, hello) == hello.replace(b"\x03\x02\x03\x04", b"\x03\x02\x03\x03")
    assert old.hits == 1


def test_the_attacker_greets_as_a_host_does() -> None:
    assert parse_preface(preface()).label != parse_preface(preface()).label
