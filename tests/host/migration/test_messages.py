"""What agents say to each other: any words give a message or `peer.message`; nothing unknown, nothing unbounded."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import PeerError
from sealane.host.migration.messages import (
    Arrived,
    Loaded,
    Message,
    PostcopyTicket,
    Prepare,
    Prepared,
    Receipt,
    Rejoin,
    Rejoined,
    Ticket,
    TicketHeld,
    TicketRefused,
    parse_message,
)
from sealane.host.models import VtpmFacts
from sealane.limits import CHANNEL_MESSAGE_MAX, LANES_MAX
from tests.seal.rig import PROPERTY

DIGEST = "0123456789abcdef" * 4
PREPARE = Prepare(
    vm="web01",
    uuid="3b1e7f5c-6d0c-4a51-9d7e-0d3f1f0c7a11",
    qemu_version=(7, 2, 0),
    machine_type="pc-q35-7.2",
    memory_bytes=1 << 30,
    cpus=2,
    capabilities=["events", "multifd", "return-path"],
    multifd_channels=None,
    postcopy=True,
    epoch=0,
    vtpm=None,
    domain=None,
)
MESSAGES: list[Message] = [
    PREPARE,
    Prepared(multifd_channels=LANES_MAX - 2, preempt=True),
    Loaded(digest=DIGEST),
    Ticket(vm="web01", epoch=1, digest=DIGEST, vtpm=VtpmFacts(ek_sha256=DIGEST, version=7, counter=2)),
    Receipt(vm="web01", epoch=1, since_resume_ms=0.5),
    TicketRefused(code="vm.not-running", detail="QEMU did not resume the VM"),
    PostcopyTicket(vm="web01", epoch=1),
    TicketHeld(epoch=1),
    Arrived(epoch=1, digest=DIGEST),
    Rejoin(vm="web01", epoch=1),
    Rejoined(lanes=2),
]
EACH = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)


def changed(message: Message, **changes: Any) -> str:
    return json.dumps({**message.model_dump(mode="json"), **changes})


@EACH
def test_round_trip(message: Message) -> None:
    assert parse_message(message.model_dump_json()) == message


@EACH
def test_a_field_more_or_less_is_refused(message: Message) -> None:
    with pytest.raises(PeerError, match=r"more.*peer\.message"):
        parse_message(changed(message, more=1))
    for name in message.model_dump():
        without = {key: value for key, value in json.loads(changed(message)).items() if key != name}
        with pytest.raises(PeerError, match=r"peer\.message"):
            parse_message(json.dumps(without))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (PREPARE, {"vm": ""}),
        (PREPARE, {"vtpm": {"ek_sha256": "x", "version": 0, "counter": 0}}),
        (PREPARE, {"vtpm": {"ek_sha256": "", "version": -1, "counter": 0}}),
        (PREPARE, {"vm": "../etc"}),
        (PREPARE, {"vm": "a" * 65}),
        (PREPARE, {"uuid": "x" * 201}),
        (PREPARE, {"qemu_version": [7, 2]}),
        (PREPARE, {"qemu_version": [7, 2, -1]}),
        (PREPARE, {"memory_bytes": 0}),
        (PREPARE, {"qemu_version": [7, 2, 10**400]}),
        (PREPARE, {"memory_bytes": 10**400}),
        (PREPARE, {"cpus": 0}),
        (PREPARE, {"cpus": 10**400}),
        (PREPARE, {"capabilities": ["x"] * 101}),
        (PREPARE, {"capabilities": ["x" * 201]}),
        (PREPARE, {"capabilities": "events"}),
        (PREPARE, {"multifd_channels": LANES_MAX - 1}),
        (PREPARE, {"multifd_channels": -1}),
        (PREPARE, {"epoch": -1}),
        (MESSAGES[1], {"multifd_channels": LANES_MAX - 1}),
        (MESSAGES[1], {"multifd_channels": None}),
        (MESSAGES[2], {"digest": DIGEST[1:]}),
        (MESSAGES[2], {"digest": DIGEST + "\n"}),
        (MESSAGES[2], {"digest": DIGEST.upper()}),
        (MESSAGES[3], {"epoch": 0}),
        (MESSAGES[4], {"since_resume_ms": -1}),
        (MESSAGES[4], {"since_resume_ms": "soon"}),
        (MESSAGES[4], {"since_resume_ms": float("nan")}),
        (MESSAGES[4], {"since_resume_ms": float("inf")}),
        (MESSAGES[5], {"detail": "x" * 1001}),
        (MESSAGES[5], {"kind": "prepared"}),
        (MESSAGES[5], {"kind": "launch"}),
    ],
)
def test_bounds(message: Message, changes: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match=r"peer\.message"):
        parse_message(changed(message, **changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.just("kind"), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@PROPERTY
@given(
    st.text(max_size=60)
    | st.binary(max_size=60).map(lambda data: data.decode("utf-8", "replace"))
    | JSON.map(json.dumps)
    | st.builds(lambda message, changes: changed(message, **changes), st.sampled_from(MESSAGES),
                st.dictionaries(st.sampled_from([*PREPARE.model_dump(), "digest"]), JSON, max_size=2))
)  # fmt: skip
def test_any_words(words: str) -> None:
    message, code = None, None
    try:
        message = parse_message(words)
    except PeerError as error:
        code = error.code
    if message is None:
        assert code == "peer.message"
    else:
        assert parse_message(message.model_dump_json()) == message


def test_an_error_does_not_repeat_what_the_peer_said() -> None:
    with pytest.raises(PeerError) as raised:
        parse_message(changed(PREPARE, vm="\x1b[31m secret"))
    assert "secret" not in str(raised.value)


def test_the_largest_prepare_fits_a_channel_message() -> None:
    largest = PREPARE.model_copy(update={"vm": "v" * 64, "uuid": "u" * 200, "capabilities": ["c" * 200] * 100})
    assert len(largest.model_dump_json()) < CHANNEL_MESSAGE_MAX
    assert parse_message(largest.model_dump_json()) == largest


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(PeerError, match=r"peer\.message"):
        parse_message('{"kind":' * 5_000 + "1" + "}" * 5_000)
