"""What is read from others: any bytes give a value or one typed error, in bounded memory."""

import contextlib
import json
import struct
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import HostError, InternalError, SealaneError
from sealane.limits import VTPM_BLOB_MAX
from sealane.vtpm.control import BlobType, Command, Request, RequestReader
from sealane.vtpm.envelope import OVERHEAD_BYTES, Journey, StateSealer
from sealane.vtpm.link import FRAME_MAX, Frame, What, encode_frame, parse_frame
from sealane.vtpm.record import PAST_MAX, KeyReference, Record, parse_record
from sealane.vtpm.swtpm import parse_version
from tests.seal.rig import PROPERTY

SECRET = bytes(range(32))
JOURNEY = Journey("web01", 7, b"m" * 16)
TYPES = list(BlobType)


def sealer(secret: bytes = SECRET, journey: Journey = JOURNEY) -> StateSealer:
    return StateSealer(secret, journey, lambda count: b"n" * count)


# ---- the envelope


@given(st.sampled_from(TYPES), st.binary(max_size=4096))
@PROPERTY
def test_a_state_comes_out_as_it_went_in(blob_type: BlobType, state: bytes) -> None:
    sealed = sealer().volatile_state_enc(blob_type, state)
    assert len(sealed) == len(state) + OVERHEAD_BYTES
    assert sealer().volatile_state_dec(blob_type, sealed) == state


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
@PROPERTY
def test_no_changed_byte_goes_through(at: int, change: int) -> None:
    sealed = bytearray(sealer().volatile_state_enc(BlobType.PERMANENT, b"state" * 20))
    sealed[at % len(sealed)] ^= change
    with pytest.raises(SealaneError, match=r"vtpm\.blob-"):
        sealer().volatile_state_dec(BlobType.PERMANENT, bytes(sealed))


@given(st.sampled_from(TYPES), st.binary(max_size=300))
@PROPERTY
def test_any_bytes_are_refused(blob_type: BlobType, sealed: bytes) -> None:
    with pytest.raises(SealaneError, match=r"vtpm\.blob-"):
        sealer().volatile_state_dec(blob_type, sealed)


@pytest.mark.parametrize(
    ("journey", "blob_type", "code"),
    [
        (Journey("web02", 7, b"m" * 16), BlobType.VOLATILE, "vtpm.blob-foreign"),
        (Journey("web01", 8, b"m" * 16), BlobType.VOLATILE, "vtpm.blob-epoch"),
        (Journey("web01", 6, b"m" * 16), BlobType.VOLATILE, "vtpm.blob-epoch"),
        (JOURNEY, BlobType.PERMANENT, "vtpm.blob-type"),
        (Journey("web01", 7, b"x" * 16), BlobType.VOLATILE, "vtpm.blob-migration"),
    ],
)
def test_a_state_of_something_else_is_told_from_one_that_was_changed(
    journey: Journey, blob_type: BlobType, code: str
) -> None:
    sealed = sealer().volatile_state_enc(BlobType.VOLATILE, b"state")
    with pytest.raises(SealaneError) as refused:
        sealer(journey=journey).volatile_state_dec(blob_type, sealed)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("field", "value"), [(slice(5, 6), b"\x01"), (slice(6, 22), b"x" * 16), (slice(22, 30), b"\0" * 7 + b"\x08")]
)
def test_a_header_that_was_made_to_fit_is_refused(field: slice, value: bytes) -> None:
    """The words of the header are believed only with the tag: type, migration and epoch of another state, relabelled."""
    sealed = bytearray(sealer().volatile_state_enc(BlobType.VOLATILE, b"state"))
    sealed[field] = value
    wanted = Journey("web01", int.from_bytes(sealed[22:30], "big"), bytes(sealed[6:22]))
    with pytest.raises(SealaneError) as refused:
        sealer(journey=wanted).volatile_state_dec(BlobType(sealed[5]), bytes(sealed))
    assert refused.value.code == "vtpm.blob-altered"


def test_another_migrations_secret_opens_nothing() -> None:
    sealed = sealer().volatile_state_enc(BlobType.VOLATILE, b"state")
    with pytest.raises(SealaneError, match=r"vtpm\.blob-altered"):
        sealer(bytes(32)).volatile_state_dec(BlobType.VOLATILE, sealed)


def test_each_type_has_a_key_of_its_own() -> None:
    sealed = {each: sealer().volatile_state_enc(each, bytes(64))[58 : 58 + 64] for each in TYPES}
    assert len(set(sealed.values())) == len(TYPES)  # the same nonce and state, and still nothing alike


# ---- QEMU's requests


def encode(request: Request) -> bytes:
    return struct.pack(">I", request.command) + request.data + request.blob


REQUESTS = [
    Request(Command.GET_CAPABILITY, b""),
    Request(Command.INIT, bytes(4)),
    Request(Command.SET_LOCALITY, b"\x03\0\0\0"),
    Request(Command.GET_STATEBLOB, struct.pack(">III", 1, 2, 0)),
    Request(Command.SET_STATEBLOB, struct.pack(">III", 0, 1, 5), b"state"),
    Request(Command.SET_STATEBLOB, struct.pack(">III", 0, 3, 0)),
    Request(Command.LOCK_STORAGE, bytes(4)),
    Request(Command.SHUTDOWN, b""),
]


@given(st.lists(st.sampled_from(REQUESTS), max_size=8), st.lists(st.integers(1, 20), max_size=20))
@PROPERTY
def test_requests_are_the_same_in_any_chunks(requests: list[Request], cuts: list[int]) -> None:
    data, reader = b"".join(map(encode, requests)), RequestReader()
    found: list[Request] = []
    for cut in cuts:
        found += reader.receive(data[:cut])
        data = data[cut:]
    found += reader.receive(data)
    assert found == requests


@given(st.lists(st.binary(max_size=64), max_size=20))
@PROPERTY
def test_any_bytes_give_requests_or_one_error(chunks: list[bytes]) -> None:
    reader = RequestReader()
    with contextlib.suppress(HostError):
        for chunk in chunks:
            for request in reader.receive(chunk):
                assert len(request.blob) <= VTPM_BLOB_MAX


@pytest.mark.parametrize(
    "data",
    [struct.pack(">I", 10), struct.pack(">I", 0), struct.pack(">IIII", Command.SET_STATEBLOB, 0, 1, VTPM_BLOB_MAX + 1)],
)
def test_what_qemu_never_asks_is_refused(data: bytes) -> None:
    with pytest.raises(SealaneError, match=r"vtpm\.control"):
        list(RequestReader().receive(data))


def test_a_state_of_unknown_type_is_refused() -> None:
    with pytest.raises(SealaneError, match=r"vtpm\.control"):
        _ = Request(Command.GET_STATEBLOB, struct.pack(">III", 1, 9, 0)).blob_type


# ---- the link


@given(st.sampled_from(list(What)), st.sampled_from(TYPES), st.binary(max_size=200), st.binary(max_size=20))
@PROPERTY
def test_frames(what: What, blob_type: BlobType, data: bytes, more: bytes) -> None:
    frame = Frame(what, blob_type, data)
    encoded = encode_frame(frame)
    assert parse_frame(encoded + more) == (frame, len(encoded))
    assert all(parse_frame(encoded[:at]) is None for at in range(len(encoded)))


@given(st.binary(max_size=64))
@PROPERTY
def test_any_bytes_give_a_frame_or_one_error(data: bytes) -> None:
    try:
        found = parse_frame(data)
    except InternalError:
        return
    assert found is None or found[1] <= len(data)


def test_a_frame_cannot_be_too_long() -> None:
    with pytest.raises(InternalError):
        parse_frame(struct.pack(">BBI", What.WANTED, BlobType.PERMANENT, FRAME_MAX + 1))


# ---- the record and the version


KEY = asdict(KeyReference(root="file", counter=1))
RECORD = Record(
    vm="web01", status="here", epoch=1, key=KeyReference(root="file", counter=1), storage="/s", directory="d"
)


@given(st.binary(max_size=300))
@PROPERTY
def test_any_bytes_give_a_record_or_one_error(data: bytes) -> None:
    with pytest.raises(SealaneError, match=r"vtpm\.record"):
        parse_record(data)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "there"},
        {"more": 1},
        {"digest": "x"},
        {"past": ["a" * 64] * (PAST_MAX + 1)},
        {"past": [1]},
        {"past": "a"},
        {"key": None},
        {"key": {"root": "file"}},
        {"key": {**KEY, "counter": -1}},
        {"key": {**KEY, "root": "x"}},
        {"epoch": True},
        {"epoch": -1},
        {"version": 1.0},
        {"mac": None},
    ],
)
def test_a_record_that_does_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(SealaneError, match=r"vtpm\.record"):
        parse_record(json.dumps({**asdict(RECORD), **change}).encode())


def test_every_field_of_a_record_is_authenticated() -> None:
    record, key = RECORD.authenticated(SECRET), SECRET
    record.verify(key)
    changes: dict[str, Any] = {
        "vm": "web02", "status": "gone", "epoch": 2, "version": 1, "storage": "/t", "directory": "e", "digest": "a" * 64,
        "past": ("b" * 64,), "ek_sha256": "c" * 64, "migration": "m", "running": True, "mac": "d" * 64,
        "key": KeyReference(root="file", counter=2),
    }  # fmt: skip
    assert set(changes) == {each.name for each in fields(Record)}
    for name, value in changes.items():
        with pytest.raises(SealaneError, match=r"vtpm\.altered"):
            replace(record, **{name: value}).verify(key)
    with pytest.raises(SealaneError, match=r"vtpm\.altered"):
        record.verify(bytes(32))


def test_what_was_written_before_is_remembered_to_a_bound() -> None:
    record = RECORD
    for number in range(PAST_MAX + 5):
        record = record.written(f"{number:064x}")
    assert record.version == PAST_MAX + 5
    assert record.digest == f"{PAST_MAX + 4:064x}"
    assert record.past == tuple(f"{number:064x}" for number in range(4, PAST_MAX + 4))
    assert record.written(record.digest) is record


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("TPM emulator version 0.7.1, Copyright (c) 2014-2021 IBM Corp.\n", (0, 7, 1)),
        ("TPM emulator version 0.10.0, Copyright (c) 2014-2022 IBM Corp. and others", (0, 10, 0)),
        ("version 0.8", None),
        ("", None),
    ],
)
def test_versions_of_swtpm(said: str, version: tuple[int, int, int] | None) -> None:
    assert parse_version(said) == version
