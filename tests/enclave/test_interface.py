"""The codec of ecalls and ocalls: any bytes give a call or an InternalError."""

import json
import os
import socket
from dataclasses import fields
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.enclave.interface import (
    AttachVm,
    Begin,
    Call,
    CallSocket,
    Counters,
    Ecall,
    LanesClosed,
    LanesOpen,
    Message,
    Ocall,
    OpenLanes,
    SendMessage,
    close_descriptors,
    encode_call,
    parse_call,
    socket_pair,
)
from sealane.enclave.process import Enclave, EnclaveOver
from sealane.errors import InternalError, SealaneError
from sealane.limits import CHANNEL_MESSAGE_MAX, ECALL_MESSAGE_MAX, LANES_MAX
from tests.seal.rig import PROPERTY
from tests.session.rig import NOW, SOURCE

CALLS: list[type[Any]] = [*get_args(Ecall), *get_args(Ocall)]
TEXT = st.text(max_size=30)
VALUES = {
    str: TEXT,
    int: st.integers(0, 2**63),
    bool: st.booleans(),
    float: st.floats(0, 1e9),
    dict[str, str]: st.dictionaries(TEXT, TEXT, max_size=3),
    list[int]: st.lists(st.integers(0, 2**64 - 1), max_size=9),
}


def calls(cls: type[Any]) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{each.name: VALUES[each.type] for each in fields(cls)})  # type: ignore[index]


@PROPERTY
@given(st.data())
@pytest.mark.parametrize("cls", CALLS)
def test_round_trip(cls: type[Any], data: st.DataObject) -> None:
    call = data.draw(calls(cls))
    assert parse_call(encode_call(call)) == call


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.sampled_from([c.__name__ for c in CALLS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(["call", "lane"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@PROPERTY
@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(packet: bytes) -> None:
    try:
        call = parse_call(packet)
    except InternalError:
        return
    assert parse_call(encode_call(call)) == call


@pytest.mark.parametrize(
    "packet",
    [
        b"", b"\xff", b"{}", b"[]", b"null", b'"OpenLanes"', b"[" * 100_000,
        b'{"call": "Nothing"}', b'{"call": ["OpenLanes"]}', b'{"call": "OpenLanes", "more": 1}', b'{"call": "AttachVm"}',
        b'{"call": "AttachVm", "lane": "1"}', b'{"call": "AttachVm", "lane": true}', b'{"call": "AttachVm", "lane": 1.0}',
        b'{"call": "AttachVm", "lane": null}', b'{"call": "Failed", "code": "a", "detail": "b", "by_peer": 0}',
        b'{"call": "socket_pair"}', b'{"call": "__class__"}',
    ],
)  # fmt: skip
def test_what_does_not_fit(packet: bytes) -> None:
    with pytest.raises(InternalError, match="a call that does not fit"):
        parse_call(packet)


def test_trusted_is_a_mapping_of_strings() -> None:
    good = json.loads(
        encode_call(Begin("source", "0" * 32, "key", "certificate", {"a": "b"}, "sealed", "now", "vm", 1, 9.0))
    )
    for spoiled in ({"a": 1}, ["a"], "a", None):
        with pytest.raises(InternalError):
            parse_call(json.dumps({**good, "trusted": spoiled}).encode())


def test_the_largest_message_fits_and_more_does_not() -> None:
    assert parse_call(encode_call(SendMessage("x" * CHANNEL_MESSAGE_MAX))) == SendMessage("x" * CHANNEL_MESSAGE_MAX)
    with pytest.raises(InternalError, match="SendMessage of"):
        encode_call(SendMessage("x" * ECALL_MESSAGE_MAX))


def test_keys_are_not_in_reprs() -> None:
    begin = Begin("source", "0" * 32, "SECRET KEY", "certificate", {}, "sealed", "now", "vm", 1, 9.0)
    assert "SECRET" not in repr(begin)


def ends() -> tuple[CallSocket, CallSocket]:
    one, other = socket_pair()
    for end in (one, other):
        end.settimeout(5)
    return CallSocket(one), CallSocket(other)


def test_descriptors_travel_beside_a_call() -> None:
    agent, enclave = ends()
    pairs = [socket.socketpair() for _ in range(LANES_MAX + 1)]
    agent.send(OpenLanes(), [there.fileno() for _, there in pairs])
    close_descriptors([there.detach() for _, there in pairs])
    received = enclave.receive()
    assert received is not None
    call, sockets = received
    assert call == OpenLanes()
    for number, ((here, _), there) in enumerate(zip(pairs, sockets, strict=True)):
        here.sendall(bytes([number]))
        assert there.recv(1) == bytes([number])
        assert not os.get_inheritable(there.fileno())
        here.close()
        there.close()
    agent.close()
    enclave.close()


def test_calls_stay_apart_and_in_order() -> None:
    agent, enclave = ends()
    sent: list[Call] = [Message("a"), Message(""), LanesOpen(), Counters(1, 2), AttachVm(3), LanesClosed("d", 1, 2)]
    for call in sent:
        agent.send(call)
    agent.close()
    heard = []
    while (received := enclave.receive()) is not None:
        heard.append(received)
    assert heard == [(call, []) for call in sent]
    with pytest.raises(OSError):
        enclave.send(LanesOpen())
    enclave.close()


def test_a_call_that_was_cut_short_leaves_no_descriptor_behind() -> None:
    agent, enclave = ends()
    here, there = socket.socketpair()
    for packet in (b"x" * (ECALL_MESSAGE_MAX + 1), b"nonsense"):
        socket.send_fds(agent.connection, [packet], [there.fileno()])
        with pytest.raises(InternalError):
            enclave.receive()
    there.close()
    here.settimeout(5)
    assert here.recv(1) == b""  # every copy of the other end is closed
    for each in (agent, enclave, here):
        each.close()


# ---- what an enclave makes of calls in any order


def serve_all(served: list[tuple[Any, int]]) -> None:
    """Each call is served, refused with a SealaneError, or the end; nothing else comes out, and no descriptor stays open."""
    agent, calls = ends()
    enclave = Enclave(calls)
    before = len(os.listdir("/proc/self/fd"))
    try:
        for call, count in served:
            sockets = [socket.socket(socket.AF_UNIX) for _ in range(count)]
            try:
                enclave.serve(call, sockets)
            except EnclaveOver:
                break
            except (SealaneError, OSError):
                continue
            finally:
                for each in sockets:
                    each.close()
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        enclave._close_all()
        enclave.close()
        agent.close()


KEY, CERTIFICATE = SOURCE.key_pem.decode(), SOURCE.certificate_pem.decode()
EXAMPLES: list[Any] = [
    *(
        Begin(
            role,
            "00" * 16,
            SOURCE.key_pem.decode(),
            SOURCE.certificate_pem.decode(),
            {},
            "sealed",
            NOW.isoformat(),
            "vm",
            1,
            9.0,
        )
        for role in ("source", "destination")
    ),
    *(cls(*[0] * len(fields(cls))) for cls in get_args(Ecall) if all(each.type is int for each in fields(cls))),
    SendMessage("words"),
]
SENSIBLE = st.sampled_from(EXAMPLES)


@PROPERTY
@given(
    st.lists(st.tuples(SENSIBLE | st.one_of([calls(cls) for cls in get_args(Ecall)]), st.integers(0, 3)), max_size=6)
)
def test_any_order_of_any_calls(served: list[tuple[Any, int]]) -> None:
    serve_all(served)
