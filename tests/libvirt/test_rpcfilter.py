"""What a source may say to the destination's libvirtd. Each rule has a message that only this rule refuses."""

import uuid
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealane.errors import PeerError
from sealane.libvirt.rpc import HEADER_BYTES, MessageReader, Procedure
from sealane.libvirt.rpcfilter import Agreed, MigrateFlag, Phase, RpcFilter
from sealane.limits import RPC_CALLS_WAITING_MAX, RPC_MESSAGE_MAX, RPC_PARAMETERS_MAX
from tests.libvirt.rig import (
    AGREED,
    DOMAIN,
    FLAGS,
    SOCKET,
    auth_list,
    close,
    connect_open,
    domain_xml,
    feature,
    finish,
    get_state,
    keepalive,
    message,
    migration,
    opened,
    prepare,
    reply,
    text,
    word,
)

OTHER = uuid.UUID(int=7)
DISKS = Agreed(AGREED.uri, DOMAIN, SOCKET, channels_max=4, disks_uri="unix:///run/sealane-migrate/1f/nbd.sock")


def say(*messages: bytes, agreed: Agreed = AGREED) -> RpcFilter:
    """All of it goes through, unchanged, and libvirtd answers each."""
    rpc = RpcFilter(agreed)
    for each in messages:
        assert rpc.from_source(each) == each
        procedure, serial = int.from_bytes(each[12:16], "big"), int.from_bytes(each[20:24], "big")
        rpc.from_daemon(reply(procedure, serial))
    return rpc


def refusal(rpc: RpcFilter, said: bytes) -> str:
    """What the filter says of it; that it refuses it, and stays where it was, is seen to here."""
    phase = rpc.phase
    with pytest.raises(PeerError) as raised:
        rpc.from_source(said)
    assert raised.value.code == "libvirt.refused"
    assert rpc.phase is phase
    return str(raised.value)


def test_a_migration_goes_through() -> None:
    rpc = say(*migration())
    assert rpc.phase is Phase.CLOSED
    assert rpc.has_finished


def test_features_may_be_asked_before_the_connection_is_opened() -> None:
    assert say(auth_list(), feature(), connect_open(serial=3)).phase is Phase.OPEN


def test_a_session_is_opened_with_what_its_client_sends_along() -> None:
    agreed = Agreed("qemu:///session", DOMAIN, SOCKET)
    assert say(auth_list(), connect_open("qemu:///session", flags=6), agreed=agreed).phase is Phase.OPEN
    for flags in (1, 8, 7):
        assert "a connection with flags" in refusal(
            say(auth_list(), agreed=agreed), connect_open("qemu:///session", flags=flags)
        )


def test_lookups_of_the_domain_and_keepalive_go_through() -> None:
    say(
        *opened(),
        message(Procedure.DOMAIN_LOOKUP_BY_NAME, text(DOMAIN.name), serial=7),
        message(Procedure.DOMAIN_LOOKUP_BY_UUID, DOMAIN.uuid.bytes, serial=8),
    )
    rpc = RpcFilter(AGREED)
    assert rpc.from_source(keepalive(1)) == keepalive(1)
    assert rpc.from_daemon(keepalive(2)) == keepalive(2)


# ---- the order


@pytest.mark.parametrize(
    ("before", "said", "words"),
    [
        ([], connect_open(), "CONNECT_OPEN while the connection is fresh"),
        ([], prepare(), "while the connection is fresh"),
        ([], feature(), "while the connection is fresh"),
        ([auth_list()], auth_list(9), "while the connection is greeted"),
        ([auth_list()], get_state(), "while the connection is greeted"),
        (opened(), connect_open(serial=9), "while the connection is open"),
        (opened(), finish(), "while the connection is open"),
        ([*opened(), prepare()], prepare(serial=9), "while the connection is prepared"),
        ([*opened(), prepare(), finish()], finish(serial=9), "while the connection is finished"),
        ([*opened(), prepare(), finish()], prepare(serial=9), "while the connection is finished"),
        ([*opened(), close()], get_state(), "after its close"),
    ],
)
def test_what_comes_out_of_turn_is_refused(before: list[bytes], said: bytes, words: str) -> None:
    assert words in refusal(say(*before), said)


# ---- programs, procedures, kinds of message


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (message(Procedure.AUTH_LIST, program=0x20008087), "program 0x20008087"),  # QEMU's: monitor commands
        (message(Procedure.AUTH_LIST, version=2), "version 2"),
        (message(Procedure.AUTH_LIST, kind=4), "type 4"),  # with descriptors
        (message(Procedure.AUTH_LIST, kind=3), "type 3"),  # a stream's data
        (message(Procedure.AUTH_LIST, kind=1), "type 1"),
        (message(Procedure.AUTH_LIST, status=1), "type 0"),
        (keepalive(3), "keepalive"),
        (keepalive(1)[:16] + word(0) + keepalive(1)[20:], "keepalive"),
    ],
)
def test_other_kinds_of_message_are_refused(said: bytes, words: str) -> None:
    assert words in refusal(RpcFilter(AGREED), said)


def test_a_keepalive_with_a_body_is_refused() -> None:
    assert "keepalive" in refusal(RpcFilter(AGREED), message(1, b"more", kind=2, program=0x6B656570))


def test_every_other_procedure_is_refused() -> None:
    allowed = {
        Procedure.AUTH_LIST,
        Procedure.CONNECT_OPEN,
        Procedure.CONNECT_CLOSE,
        Procedure.CONNECT_SUPPORTS_FEATURE,
        Procedure.DOMAIN_GET_STATE,
        Procedure.DOMAIN_LOOKUP_BY_NAME,
        Procedure.DOMAIN_LOOKUP_BY_UUID,
        Procedure.DOMAIN_MIGRATE_PREPARE3_PARAMS,
        Procedure.DOMAIN_MIGRATE_FINISH3_PARAMS,
    }
    for number in set(range(500)) - allowed:
        assert f"procedure {number}" in refusal(say(*opened()), message(number, serial=9))


# ---- arguments


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (connect_open("qemu:///session"), "a connection to qemu:///session"),
        (connect_open("test:///default"), "a connection to test"),
        (connect_open(flags=2), "a connection with flags"),
        (message(Procedure.CONNECT_OPEN, word(0) + word(0), serial=1), "any hypervisor"),
    ],
)
def test_another_connection_is_refused(said: bytes, words: str) -> None:
    assert words in refusal(say(auth_list()), said)


@pytest.mark.parametrize(
    "said",
    [
        get_state("other"),
        get_state(DOMAIN.name, OTHER),
        message(Procedure.DOMAIN_LOOKUP_BY_NAME, text("other")),
        message(Procedure.DOMAIN_LOOKUP_BY_UUID, OTHER.bytes),
    ],
)
def test_another_domain_is_refused(said: bytes) -> None:
    assert "another domain" in refusal(say(*opened()), said)


def test_a_state_with_flags_is_refused() -> None:
    assert "flags" in refusal(say(*opened()), get_state(flags=1))


def prepared_with(**changes: str | int) -> bytes:
    values: Mapping[str, str | int] = {"migrate_uri": SOCKET, "destination_xml": domain_xml(), **changes}
    return prepare(values)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (prepared_with(migrate_uri="tcp://0.0.0.0:49152"), "listens elsewhere"),
        (prepare({"destination_xml": domain_xml()}), "listens elsewhere"),
        (prepare({"migrate_uri": SOCKET}), "without its XML"),
        (prepared_with(listen_address="0.0.0.0"), "this listen_address"),
        (prepared_with(graphics_uri="spice://x"), "this graphics_uri"),
        (prepared_with(disks_port=1), "this disks_port"),
        (prepared_with(disks_uri="tcp://0.0.0.0:1"), "this disks_uri"),
        (prepared_with(destination_name="other"), "this destination_name"),
        (prepared_with(**{"parallel.connections": 5}), "this parallel.connections"),
        (prepared_with(**{"parallel.connections": 0}), "this parallel.connections"),
        (prepared_with(**{"parallel.connections": "4"}), "this parallel.connections"),
        (prepared_with(bandwidth="much"), "this bandwidth"),
        (prepared_with(persistent_xml=1), "this persistent_xml"),
        (prepared_with(destination_xml=domain_xml("other")), "another domain"),
        (prepared_with(persistent_xml=domain_xml("other")), "another domain"),
        (prepare(flags=FLAGS & ~MigrateFlag.PAUSED), "runs as soon as"),
        (prepare(flags=FLAGS | 1 << 1), "flags 0x2"),  # peer to peer
        (prepare(flags=FLAGS | 1 << 2), "flags 0x4"),  # tunnelled: RAM in the connection
        (prepare(flags=FLAGS | 1 << 10), "flags 0x400"),  # offline: defines a domain and moves nothing
        (prepare(flags=FLAGS | 1 << 15), "flags 0x8000"),  # postcopy
        (prepare(flags=FLAGS | 1 << 16), "flags 0x10000"),  # QEMU's own TLS
        (prepare(flags=FLAGS | MigrateFlag.NON_SHARED_DISK), "flags 0x40"),
        (prepare(flags=FLAGS | 1 << 31), "flags 0x80000000"),
        (prepare(cookie=f"<qemu-migration>{domain_xml('other')}</qemu-migration>"), "another domain"),
        (prepare(cookie="<other/>"), "in place of <qemu-migration>"),
    ],
)
def test_another_migration_is_refused(said: bytes, words: str) -> None:
    assert words in refusal(say(*opened()), said)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (finish({"destination_name": "other"}), "another domain's migration"),
        (finish(flags=FLAGS & ~MigrateFlag.PAUSED), "runs as soon as"),
        (finish({"listen_address": "::"}), "this listen_address"),
        (finish({"migrate_uri": "tcp://0.0.0.0:49152"}), "this migrate_uri"),
        (finish(cookie=f"<qemu-migration>{domain_xml('other')}</qemu-migration>"), "another domain"),
    ],
)
def test_another_end_is_refused(said: bytes, words: str) -> None:
    assert words in refusal(say(*opened(), prepare()), said)


def test_disks_go_where_it_was_agreed_and_nowhere_else() -> None:
    disk = FLAGS | MigrateFlag.NON_SHARED_DISK
    values = {"migrate_uri": SOCKET, "destination_xml": domain_xml(), "disks_uri": DISKS.disks_uri}
    say(*opened(), prepare(values, flags=disk), agreed=DISKS)
    assert "this disks_uri" in refusal(
        say(*opened(), agreed=DISKS), prepare({**values, "disks_uri": "tcp://0.0.0.0:1"}, flags=disk)
    )


DISK = "<disk type='file' device='disk'><source file='/images/a.raw'/><target dev='vda'/></disk>"


@pytest.mark.parametrize(
    "disks",
    [
        "",
        DISK.replace("a.raw", "b.raw"),
        DISK.replace("vda", "vdb"),
        DISK.replace("type='file'", "type='block'").replace("file=", "dev="),
        DISK.replace("type='file'", "type='block'"),
        DISK + DISK.replace("vda", "vdb").replace("a.raw", "b.raw"),
        DISK + DISK,
        DISK.replace("<target", "<source file='/etc/shadow'/><target"),
        DISK.replace("</disk>", "<target dev='vdb'/></disk>"),
        DISK.replace("<target", "<x:source xmlns:x='urn:x' file='/etc/shadow'/><target"),
        DISK.replace("</disk>", "<readonly/></disk>"),
        DISK.replace("</disk>", "<shareable/></disk>"),
    ],
)
def test_disks_that_are_copied_are_those_that_were_agreed(disks: str) -> None:
    agreed = Agreed(
        AGREED.uri, DOMAIN, SOCKET, channels_max=4, disks_uri=DISKS.disks_uri, disks={"vda": "/images/a.raw"}
    )
    flags = FLAGS | MigrateFlag.NON_SHARED_DISK

    def said(devices: str) -> bytes:
        xml = domain_xml(devices=devices)
        return prepare({"migrate_uri": SOCKET, "destination_xml": xml, "disks_uri": DISKS.disks_uri}, flags=flags)

    kept = "<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/><readonly/></disk>"
    below = DISK.replace("<target", "<backingStore type='file'><source file='/images/base'/></backingStore><target")
    for fitting in (DISK, DISK + kept, below):
        assert say(*opened(), said(fitting), agreed=agreed).has_prepared
    assert "disk" in refusal(say(*opened(), agreed=agreed), said(disks))


def test_it_is_prepared_when_libvirtd_says_so() -> None:
    rpc = say(*opened())
    rpc.from_source(prepare())
    assert not rpc.has_prepared
    rpc.from_daemon(reply(Procedure.DOMAIN_MIGRATE_PREPARE3_PARAMS, 3, status=1))
    assert not rpc.has_prepared


def test_calls_that_wait_are_bounded_and_have_serials_of_their_own() -> None:
    rpc = say(*opened())
    for serial in range(RPC_CALLS_WAITING_MAX):
        rpc.from_source(feature(serial=100 + serial))
    assert "more calls at once" in refusal(rpc, feature(serial=99))
    rpc = say(*opened())
    rpc.from_source(feature(serial=7))
    assert "more calls at once" in refusal(rpc, feature(serial=7))


# ---- what is no protocol at all


@pytest.mark.parametrize(
    "said",
    [
        word(HEADER_BYTES - 4) + bytes(40),
        word(RPC_MESSAGE_MAX + 4),
        word(HEADER_BYTES + 1) + bytes(40),
        message(Procedure.AUTH_LIST, b"more"),
    ],
)
def test_bytes_that_are_no_message_end_it(said: bytes) -> None:
    with pytest.raises(PeerError) as raised:
        RpcFilter(AGREED).from_source(said)
    assert raised.value.code == "libvirt.malformed"


def test_padding_that_is_not_zero_ends_it() -> None:
    for good, bad in ((b"system\0\0", b"system\0\1"), (b"\0\0\0\x0e", b"\0\0\0\x0d")):
        changed = connect_open().replace(good, bad)
        assert changed != connect_open()
        with pytest.raises(PeerError) as raised:
            say(auth_list()).from_source(changed)
        assert raised.value.code == "libvirt.malformed"


@pytest.mark.parametrize(
    "values", [{f"a{number}": 1 for number in range(RPC_PARAMETERS_MAX + 1)}, {"migrate_uri": SOCKET + "\0"}]
)
def test_too_many_parameters_or_a_zero_byte_end_it(values: Mapping[str, str | int]) -> None:
    with pytest.raises(PeerError) as raised:
        say(*opened()).from_source(prepare(values))
    assert raised.value.code == "libvirt.malformed"


def test_a_length_that_is_no_multiple_of_four_ends_it() -> None:
    with pytest.raises(PeerError) as raised:
        RpcFilter(AGREED).from_source((HEADER_BYTES + 1).to_bytes(4, "big") + auth_list()[4:] + b"x")
    assert raised.value.code == "libvirt.malformed"
    with pytest.raises(PeerError):
        MessageReader().feed((HEADER_BYTES + 1).to_bytes(4, "big") + auth_list()[4:] + b"x")


@pytest.mark.parametrize(
    "arguments",
    [
        word(RPC_PARAMETERS_MAX + 1),
        word(2) + 2 * (text("bandwidth") + word(1) + word(1)),
        word(1) + text("bandwidth") + word(8) + word(1),
        word(1) + text("bandwidth") + word(6) + word(2),
        word(1) + text("bandwidth\0"),
        word(1) + word(2) + b"\xff\xff\0\0",
        word(1) + word(2) + b"ab\0\1",
        word(1) + word(1 << 30),
    ],
)
def test_arguments_that_are_no_xdr_end_it(arguments: bytes) -> None:
    with pytest.raises(PeerError) as raised:
        say(*opened()).from_source(message(Procedure.DOMAIN_MIGRATE_PREPARE3_PARAMS, arguments, serial=9))
    assert raised.value.code == "libvirt.malformed"


# ---- the way back


def test_only_answers_to_what_was_asked_go_back() -> None:
    rpc = RpcFilter(AGREED)
    rpc.from_source(auth_list())
    answer = reply(Procedure.AUTH_LIST, 0)
    assert rpc.from_daemon(reply(Procedure.AUTH_LIST, 1)) == b""
    assert rpc.from_daemon(message(1, kind=2)) == b""  # an event
    assert rpc.from_daemon(message(Procedure.AUTH_LIST, kind=2)) == b""
    rpc = RpcFilter(AGREED)
    rpc.from_source(auth_list())
    assert rpc.from_daemon(answer) == answer
    assert rpc.from_daemon(answer) == b""


def test_a_finish_that_failed_has_not_finished() -> None:
    rpc = say(*opened(), prepare())
    rpc.from_source(finish())
    rpc.from_daemon(reply(Procedure.DOMAIN_MIGRATE_FINISH3_PARAMS, 4, status=1))
    assert not rpc.has_finished


# ---- any bytes


@given(st.lists(st.integers(min_value=1, max_value=997), max_size=20))
def test_any_cut_of_the_stream_gives_the_same(cuts: list[int]) -> None:
    whole = b"".join(migration())
    rpc, out, start = RpcFilter(AGREED), b"", 0
    for cut in [*cuts, len(whole)]:
        out += rpc.from_source(whole[start : start + cut])
        start += cut
    assert out + rpc.from_source(whole[start:]) == whole


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_or_wait_for_more(data: bytes) -> None:
    try:
        passed = RpcFilter(AGREED).from_source(data)
    except PeerError as error:
        assert error.code in {"libvirt.refused", "libvirt.malformed"}  # noqa: PT017
    else:
        assert data.startswith(passed)


@settings(max_examples=300)
@given(st.integers(min_value=0, max_value=6), st.data())
def test_a_changed_migration_is_refused_or_a_migration(which: int, data: st.DataObject) -> None:
    said = migration()
    changed = bytearray(said[which])
    for _ in range(data.draw(st.integers(min_value=1, max_value=4))):
        changed[data.draw(st.integers(min_value=0, max_value=len(changed) - 1))] = data.draw(st.integers(0, 255))
    rpc = RpcFilter(AGREED)
    try:
        for each in (*said[:which], bytes(changed), *said[which + 1 :]):
            for passed in MessageReader().feed(rpc.from_source(each)):
                assert passed.procedure in set(Procedure) or passed.program == 0x6B656570
            procedure, serial = int.from_bytes(each[12:16], "big"), int.from_bytes(each[20:24], "big")
            rpc.from_daemon(reply(procedure & 0x7FFFFFFF, serial))
    except PeerError as error:
        assert error.code in {"libvirt.refused", "libvirt.malformed"}  # noqa: PT017
