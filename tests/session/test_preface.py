"""The preface: any 32 bytes give a Preface or a PeerError."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import PeerError
from sealane.limits import LANES_MAX
from sealane.session.preface import (
    PREFACE_BYTES,
    PROTOCOL_VERSION,
    ConnectionKind,
    Preface,
    encode_preface,
    parse_preface,
)
from tests.seal.rig import PROPERTY

ID = bytes(range(16))
GOOD = encode_preface(Preface(ConnectionKind.LANE, ID, 3))


@PROPERTY
@given(st.binary(max_size=64) | st.binary(min_size=32, max_size=32).map(lambda tail: GOOD[:9] + tail[9:]))
def test_any_bytes(data: bytes) -> None:
    code, preface = None, None
    try:
        preface = parse_preface(data)
    except PeerError as error:
        code = error.code
    if preface is None:
        assert code in {"peer.preface", "peer.version"}
    else:
        assert encode_preface(preface) == data


@PROPERTY
@given(st.binary(min_size=16, max_size=16), st.integers(0, LANES_MAX - 1))
def test_round_trip(label: bytes, lane: int) -> None:
    for preface in (Preface(ConnectionKind.LANE, label, lane), Preface(ConnectionKind.CHANNEL, label)):
        assert parse_preface(encode_preface(preface)) == preface


def test_layout() -> None:
    by_hand = b"sealane" + bytes([PROTOCOL_VERSION, 2, 0, 0, 3, 0, 0, 0, 0]) + ID
    assert by_hand == GOOD
    assert len(by_hand) == PREFACE_BYTES


@pytest.mark.parametrize("length", [0, 31, 33])
def test_length(length: int) -> None:
    with pytest.raises(PeerError, match=r"peer\.preface"):
        parse_preface((GOOD + b"\0")[:length])


@pytest.mark.parametrize(
    ("position", "value", "code"),
    [
        *[(n, 0, "peer.preface") for n in range(7)],
        (7, 0, "peer.version"),
        (7, PROTOCOL_VERSION - 1, "peer.version"),
        (7, PROTOCOL_VERSION + 1, "peer.version"),
        (8, 0, "peer.preface"),
        (8, 1, "peer.preface"),  # a channel with a lane number
        (8, 3, "peer.preface"),
        (9, 1, "peer.preface"),
        (10, 1, "peer.preface"),
        (11, LANES_MAX, "peer.preface"),
        *[(n, 1, "peer.preface") for n in range(12, 16)],
    ],
)
def test_each_byte_is_checked(position: int, value: int, code: str) -> None:
    changed = bytearray(GOOD)
    changed[position] = value
    with pytest.raises(PeerError) as raised:
        parse_preface(bytes(changed))
    assert raised.value.code == code
