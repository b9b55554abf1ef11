"""The channel, as transcripts of both ends in memory."""

import contextlib
import json
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL

from sealane.crypto.identity import Identity, create_identity
from sealane.crypto.tls import PREFERRED_GROUP, Side, TlsConnection
from sealane.errors import ControlError, InternalError, PeerError, make_error
from sealane.limits import CHANNEL_MESSAGE_MAX, KIB
from sealane.session.channel import (
    Channel,
    Established,
    FrameKind,
    FrameReader,
    MessageReceived,
    PeerRefused,
    PeerSaidBye,
    Role,
    encode_frame,
)
from sealane.session.preface import PROTOCOL_VERSION
from tests.seal.rig import PROPERTY
from tests.session.impostor import first_flight
from tests.session.rig import (
    DAY,
    DESTINATION,
    MIGRATION,
    NOW,
    SOURCE,
    STRANGER,
    SUBJECT,
    End,
    Puppet,
    carry,
    channel,
    converse,
    hello_of,
    old_peer,
)

ROLES: list[Role] = ["source", "destination"]


# ---- two ends that fit


def established(sizes: list[int] | None = None) -> tuple[End, End]:
    ends = converse(channel("source"), channel("destination"), sizes or [])
    assert [end.error for end in ends] == [None, None]
    return ends


@pytest.mark.parametrize("sizes", [[], [1], [1000]])
def test_both_ends_know_each_other_and_record_the_group(sizes: list[int]) -> None:
    source, destination = established(sizes)
    facts = ("TLSv1.3", PREFERRED_GROUP, "TLS_AES_256_GCM_SHA384")
    for end, peer in ((source, DESTINATION), (destination, SOURCE)):
        (event,) = end.events
        assert isinstance(event, Established)
        assert event == Established(peer.name, peer.fingerprint, *facts, event.attested)
        assert event.attested.subject == SUBJECT
        assert event.attested.verdict.accepted
    assert PREFERRED_GROUP == "X25519MLKEM768"


def test_messages_refusal_and_bye_cross_in_both_directions() -> None:
    for speaker, listener in ((0, 1), (1, 0)):
        ends = established()
        mouth, ear = ends[speaker], ends[listener]
        mouth.channel.send_message(b"one")
        mouth.channel.send_message(b"x" * CHANNEL_MESSAGE_MAX)
        mouth.channel.refuse(make_error("check.memory", "the memory is 1 GiB and 2 GiB"))
        mouth.channel.say_bye()
        carry(mouth, ear)
        _, one, large, refused, bye = ear.events
        assert one == MessageReceived(b"one")
        assert large == MessageReceived(b"x" * CHANNEL_MESSAGE_MAX)
        assert isinstance(refused, PeerRefused)
        assert isinstance(refused.error, ControlError)
        assert refused.error.code == "check.memory"
        assert refused.error.detail == "the peer says: the memory is 1 GiB and 2 GiB"
        assert bye == PeerSaidBye()
        assert repr(one) == "MessageReceived(3 bytes)"


def test_migration_secrets_are_equal_here_and_different_elsewhere() -> None:
    secrets = []
    for migration in (MIGRATION, MIGRATION, "f" * 32):
        ends = converse(channel("source", migration=migration), channel("destination", migration=migration))
        one, other = (end.channel.migration_secret() for end in ends)
        assert one == other
        assert len(one) == 32
        secrets.append(one)
    assert len(set(secrets)) == 3


@pytest.mark.parametrize("role", ROLES)
def test_the_secret_is_that_of_the_attested_peer(role: Role) -> None:
    peer = puppet(role)
    peer.say(FrameKind.HELLO, hello_of(role).encode())
    end = peer.attest()
    assert peer.attested is not None
    assert end.channel.migration_secret() == peer.attested.secret


def test_no_secret_and_no_message_before_the_hellos() -> None:
    fresh = channel("source")
    for attempt in (fresh.migration_secret, lambda: fresh.send_message(b"x")):
        with pytest.raises(InternalError):
            attempt()
    half = Puppet(channel("destination"), "client", SOURCE).end.channel  # its hello is out, the peer's is not in
    for attempt in (half.migration_secret, lambda: half.send_message(b"x")):
        with pytest.raises(InternalError):
            attempt()


def test_a_message_beyond_the_limit_is_our_own_fault() -> None:
    source, _ = established()
    with pytest.raises(InternalError):
        source.channel.send_message(b"x" * (CHANNEL_MESSAGE_MAX + 1))


def test_the_end_of_the_connection_is_an_error_unless_bye_came() -> None:
    with pytest.raises(PeerError) as raised:
        channel("destination").ended()
    assert raised.value.code == "peer.tls"
    source, _ = established()
    with pytest.raises(PeerError) as raised:
        source.channel.ended()
    assert raised.value.code == "peer.closed"


# ---- who the peer is


def refused_code(end: End) -> str | None:
    return next((event.error.code for event in end.events if isinstance(event, PeerRefused)), None)


@pytest.mark.parametrize("judge", ROLES)
def test_an_unknown_peer_is_refused_and_told(judge: Role) -> None:
    ends = converse(channel("source", **trusting_nobody(judge == "source")),
                    channel("destination", **trusting_nobody(judge == "destination")))  # fmt: skip
    mine, other = ends if judge == "source" else ends[::-1]
    assert mine.code == "peer.unknown"
    assert mine.events == []
    assert refused_code(other) == "peer.unknown"
    assert not any(isinstance(event, Established) for event in other.events)


def trusting_nobody(applies: bool) -> dict[str, object]:
    return {"trusted": {STRANGER.fingerprint: "stranger"}} if applies else {}


@pytest.mark.parametrize("judged", ROLES)
@pytest.mark.parametrize(("shift", "code"), [(-20 * DAY, "peer.expired"), (20 * DAY, "peer.not-yet-valid")])
def test_a_certificate_out_of_its_time(judged: Role, shift: object, code: str) -> None:
    there, here = (SOURCE, DESTINATION) if judged == "source" else (DESTINATION, SOURCE)
    other: Role = "destination" if judged == "source" else "source"
    late = create_identity("late", now=NOW + shift, lifetime_days=10, key_pem=there.key_pem)  # type: ignore[operator]
    made = {
        judged: channel(judged, identity=late),
        other: channel(other, identity=here, trusted={late.fingerprint: "late"}),
    }
    ends = dict(zip(ROLES, converse(made["source"], made["destination"]), strict=True))
    assert ends[other].code == code
    assert refused_code(ends[judged]) == code


@pytest.mark.parametrize("role", ROLES)
def test_a_certificate_is_valid_to_its_last_second(role: Role) -> None:
    peer = DESTINATION if role == "source" else SOURCE
    other: Role = "destination" if role == "source" else "source"
    for now, code in (
        (peer.not_after, None),
        (peer.not_after + DAY / 86_400, "peer.expired"),
        (peer.not_before, None),
        (peer.not_before - DAY / 86_400, "peer.not-yet-valid"),
    ):
        made = {role: channel(role, now=now), other: channel(other)}
        ends = dict(zip(ROLES, converse(made["source"], made["destination"]), strict=True))
        assert ends[role].code == code


def test_a_trusted_certificate_without_its_key_is_worth_nothing() -> None:
    def meets(signing: Identity | None) -> End:
        end = End(channel("source"))
        end.take(first_flight(end.channel.bytes_to_send(), shown=DESTINATION, signing=signing))
        return end

    honest = meets(DESTINATION)  # the impostor's own TLS is right: with the key, the source sends its hello
    assert honest.error is None
    assert len(honest.channel.bytes_to_send()) > 500
    for signing in (STRANGER, SOURCE, None):
        end = meets(signing)
        assert end.code == "peer.tls"
        assert end.events == []
        assert len(end.channel.bytes_to_send()) < 100  # an alert; no hello


def test_a_trusted_certificate_with_a_key_of_another_kind_is_refused() -> None:
    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "curve")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, NOW - DAY, NOW + DAY).sign(key, SHA256())
    )  # fmt: skip
    trusted = "SHA256:" + certificate.fingerprint(SHA256()).hex()
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_certificate(certificate)
    context.use_privatekey(key)
    peer = SSL.Connection(context, None)
    peer.set_connect_state()
    end = End(channel("destination", trusted={trusted: "curve"}))
    while end.error is None:
        with contextlib.suppress(SSL.WantReadError):
            peer.do_handshake()
        end.take(peer.bio_read(64 * KIB))
        if there := end.channel.bytes_to_send():
            peer.bio_write(there)
    assert end.code == "peer.tls"
    assert "no Ed25519 key" in end.error.detail


def test_a_certificate_with_the_trusted_name_and_another_key_is_unknown() -> None:
    twin = create_identity("destination", now=NOW)
    source, _ = converse(channel("source"), channel("destination", identity=twin))
    assert source.code == "peer.unknown"


# ---- peers that do not speak TLS 1.3, or not at all


@pytest.mark.parametrize("role", ROLES)
def test_a_peer_that_speaks_tls_1_2_only(role: Role) -> None:
    side: Side = "server" if role == "source" else "client"
    old = old_peer(side, DESTINATION if role == "source" else SOURCE)
    end = End(channel(role))
    for _ in range(4):
        if there := end.channel.bytes_to_send():
            old.bio_write(there)
        with contextlib.suppress(SSL.Error):
            old.do_handshake()
        try:
            end.take(old.bio_read(64 * KIB))
        except SSL.WantReadError:
            continue
    assert end.code == "peer.tls-version"
    assert end.events == []


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n" * 4,
    b"SSH-2.0-OpenSSH\r\n" * 4,
    bytes(100),
    bytes(range(256)),
    b"\x16\x03\x01\xff\xff" * 9,
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("garbage", GARBAGE, ids=["HTTP", "SSH", "zeros", "count", "record too long"])
def test_garbage_is_no_tls(role: Role, garbage: bytes) -> None:
    for sizes in ([], [1]):
        end = End(channel(role))
        end.take(garbage, sizes)
        assert end.code == "peer.tls"


@PROPERTY
@given(st.binary(min_size=1, max_size=400), st.sampled_from(ROLES))
def test_any_bytes_before_tls_give_one_typed_error_or_wait(garbage: bytes, role: Role) -> None:
    end = End(channel(role))
    end.take(garbage)
    assert end.events == []
    assert end.code in {None, "peer.tls", "peer.tls-version"}


@pytest.mark.parametrize("role", ROLES)
def test_endless_handshake_bytes_end_soon(role: Role) -> None:
    """A handshake message that claims 16 MiB and comes in good records: refused, long before it is all there."""
    end = End(channel(role))
    start = b"\x01" if role == "destination" else b"\x02"
    message = start + b"\xff\xff\xff" + bytes(16 * KIB - 4)
    record = b"\x16\x03\x03" + (16 * KIB).to_bytes(2, "big") + message
    given_bytes = 0
    while end.error is None:
        end.take(record)
        given_bytes += len(record)
        assert given_bytes < 1024 * KIB
    assert end.code == "peer.tls"


@pytest.mark.parametrize("damage", [b"\x17\x03\x03\x00\x20" + bytes(32), b"garbage, not even a record", bytes(50)])
def test_damage_after_the_handshake_is_a_typed_error_and_can_be_refused(damage: bytes) -> None:
    source, destination = established()
    for end in (source, destination):
        with pytest.raises(PeerError) as raised:
            end.channel.receive(damage)
        assert raised.value.code == "peer.tls"
        with pytest.raises(PeerError, match=r"peer\.tls"):  # TLS says nothing more on a connection that has failed
            end.channel.refuse(raised.value)


@pytest.mark.parametrize("position", range(5))
def test_a_flipped_bit_in_any_flight_establishes_nothing(position: int) -> None:
    """One bit in the middle of each flight of the handshake."""
    ends = End(channel("source")), End(channel("destination"))
    for flight in range(8):
        mouth, ear = ends[flight % 2], ends[1 - flight % 2]
        data = bytearray(mouth.channel.bytes_to_send())
        if flight == position and data:
            data[len(data) // 2] ^= 1
        ear.take(bytes(data))
    errors = [end.code for end in ends if end.error]
    assert errors or position == 4  # by then both are done: flight 4 is empty
    if position < 3:
        assert not all(any(isinstance(event, Established) for event in end.events) for end in ends)


# ---- the hello


def puppet(role: Role) -> Puppet:
    """A peer of this role, with the right key, whose other end waits for its hello."""
    if role == "source":
        return Puppet(channel("destination"), "client", SOURCE)
    return Puppet(channel("source"), "server", DESTINATION)


@pytest.mark.parametrize("role", ROLES)
def test_a_fitting_hello_by_hand(role: Role) -> None:
    peer = puppet(role)
    assert peer.say(FrameKind.HELLO, hello_of(role).encode()).events == []
    end = peer.attest()
    assert end.error is None
    assert [type(event) for event in end.events] == [Established]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("protocol", PROTOCOL_VERSION - 1, "peer.version"),
        ("protocol", PROTOCOL_VERSION + 1, "peer.version"),
        ("protocol", str(PROTOCOL_VERSION), "peer.version"),
        ("role", "same", "peer.message"),  # reflection: the peer sends our own role back
        ("migration", "f" * 32, "peer.message"),
        pytest.param("own_fingerprint", STRANGER.fingerprint, "peer.message", id="own_fingerprint"),  # anew in each run
        pytest.param("peer_fingerprint", STRANGER.fingerprint, "peer.message", id="peer_fingerprint"),
        ("protection", "selective", "check.protection"),
        ("protection", "", "check.protection"),
        ("protection", "x" * 60_000, "check.protection"),
        ("protection", ["sealed"], "peer.message"),
        ("cipher", "AES-128-GCM", "peer.message"),
    ],
)
def test_a_hello_that_differs_in_one_field(role: Role, field: str, value: object, code: str) -> None:
    if value == "same":
        value = "destination" if role == "source" else "source"
    end = puppet(role).say(FrameKind.HELLO, hello_of(role, **{field: value}).encode())
    assert end.code == code
    assert end.events == []
    if code == "peer.message":
        assert end.error is not None
        assert end.error.detail == f"the peer's hello differs in: {field}"
    with pytest.raises(InternalError):
        end.channel.migration_secret()


@pytest.mark.parametrize("role", ROLES)
def test_our_own_hello_sent_back_is_refused(role: Role) -> None:
    mirror = puppet(role)
    end = mirror.say_raw(mirror.heard)
    assert end.error is not None
    assert end.code == "peer.message"
    assert "role" in end.error.detail


@pytest.mark.parametrize(
    "spoil",
    [
        lambda hello: json.dumps(json.loads(hello)).encode(),
        lambda hello: hello[:-1] + b',"more":1}',
        lambda hello: hello + b" ",
        lambda hello: hello.replace(b'"cipher":"AES-256-GCM",', b""),
        lambda hello: b"[]",
        lambda hello: b"",
        lambda hello: b"\xff",
        lambda hello: b"[" * 60_000,
        lambda hello: b'{"protocol":%d}' % PROTOCOL_VERSION,
    ],
    ids=["spaces", "a field more", "a space after", "a field less", "a list", "empty", "no UTF-8", "deep", "one field"],
)
def test_a_hello_in_any_other_encoding(spoil: Callable[[bytes], bytes]) -> None:
    end = puppet("source").say(FrameKind.HELLO, spoil(hello_of("source").encode()))
    assert end.code == "peer.message" or (end.code == "peer.version" and spoil(b"x") == b"[]")
    assert end.events == []


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("migration", (MIGRATION, "f" * 32)),
        ("cipher", ("AES-256-GCM", "none")),
    ],
)
def test_two_real_ends_that_want_different_things(setting: str, values: tuple[str, str]) -> None:
    source, destination = converse(
        channel("source", **{setting: values[0]}), channel("destination", **{setting: values[1]})
    )
    for end in (source, destination):
        assert end.error is not None
        assert end.error.detail == f"the peer's hello differs in: {setting}"
        assert not any(isinstance(event, Established) for event in end.events)


# ---- frames


@pytest.mark.parametrize(("kind", "payload"), [(FrameKind.MESSAGE, b"{}"), (FrameKind.BYE, b""), (FrameKind.BYE, b"x")])
def test_nothing_but_hello_or_refuse_comes_first(kind: FrameKind, payload: bytes) -> None:
    end = puppet("source").say(kind, payload)
    assert (end.code, end.events) == ("peer.message", [])


@pytest.mark.parametrize(("kind", "payload"), [(FrameKind.HELLO, hello_of("source").encode()), (FrameKind.BYE, b"x")])
def test_no_second_hello_and_no_bye_with_words(kind: FrameKind, payload: bytes) -> None:
    end = puppet("source").say(FrameKind.HELLO, hello_of("source").encode())
    assert end.error is None
    peer = puppet("source")
    peer.say(FrameKind.HELLO, hello_of("source").encode())
    assert peer.say(kind, payload).code == "peer.message"


def test_a_refusal_instead_of_a_hello_gives_its_reason() -> None:
    end = puppet("source").say(FrameKind.REFUSE, b'{"code": "peer.busy", "detail": "16 run\\u001b[31m"}')
    assert end.error is None
    (event,) = end.events
    assert isinstance(event, PeerRefused)
    assert (event.error.code, event.error.detail) == ("peer.busy", "the peer says: 16 run?[31m")


@pytest.mark.parametrize(
    "words",
    [b"{}", b'{"code": "no.such", "detail": ""}', b'{"code": "peer.busy"}', b'{"code": "peer.busy", "detail": 1}', b"nil",
     b'{"code": ["peer.busy"], "detail": ""}'],
)  # fmt: skip
def test_a_refusal_without_a_known_code(words: bytes) -> None:
    end = puppet("source").say(FrameKind.REFUSE, words)
    assert (end.code, end.events) == ("peer.message", [])


FRAMES = st.lists(st.tuples(st.sampled_from(FrameKind), st.binary(max_size=200)), max_size=6)


@PROPERTY
@given(FRAMES, st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_frames_are_the_same_whole_byte_by_byte_and_in_pieces(
    frames: list[tuple[FrameKind, bytes]], sizes: list[int]
) -> None:
    wire = b"".join(encode_frame(kind, payload) for kind, payload in frames)
    for plan in ([len(wire) or 1], [1], sizes):
        reader, found, at, turn = FrameReader(), [], 0, 0
        while at < len(wire):
            found += reader.receive(wire[at : at + plan[turn % len(plan)]])
            at, turn = at + plan[turn % len(plan)], turn + 1
        assert found == frames


@PROPERTY
@given(st.binary(max_size=100))
def test_any_bytes_are_frames_or_one_error(data: bytes) -> None:
    code, frames = None, []
    try:
        frames = FrameReader().receive(data)
    except PeerError as error:
        code = error.code
    assert code in {None, "peer.message"}
    assert data.startswith(b"".join(encode_frame(kind, payload) for kind, payload in frames))


@pytest.mark.parametrize(
    "header",
    [bytes([0, 0, 0, 0, 3]), bytes([0, 0, 0, 2, 0]), bytes([0, 0, 0, 2, 6]), (CHANNEL_MESSAGE_MAX + 2).to_bytes(4, "big") + b"\3",
     b"\xff\xff\xff\xff\3"],
    ids=["no kind", "kind 0", "kind 6", "a byte too long", "4 GiB"],
)  # fmt: skip
def test_a_frame_is_judged_by_its_header_alone(header: bytes) -> None:
    with pytest.raises(PeerError, match=r"peer\.message"):
        FrameReader().receive(header)


def test_an_unfinished_frame_waits_in_bounded_memory() -> None:
    reader = FrameReader()
    assert reader.receive((CHANNEL_MESSAGE_MAX + 1).to_bytes(4, "big") + b"\3") == []
    assert reader.receive(bytes(CHANNEL_MESSAGE_MAX - 1)) == []
    assert reader.receive(b"\0") == [(FrameKind.MESSAGE, bytes(CHANNEL_MESSAGE_MAX))]


# ---- TLS itself


def test_plaintext_and_exporter_need_a_finished_handshake() -> None:
    early = TlsConnection(SOURCE, "client")
    for attempt in (lambda: early.send(b"x"), lambda: early.export(b"label", b"", 32)):
        with pytest.raises(InternalError):
            attempt()
    with pytest.raises(PeerError, match="no certificate"):
        _ = early.peer_fingerprint
    early.close()
    assert early.bytes_to_send() == b""


def test_a_client_without_a_certificate_is_not_met() -> None:
    """TLS 1.3 lets a client finish before the server judged it; the server must not."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_verify(SSL.VERIFY_NONE, lambda *_: True)
    nobody = SSL.Connection(context, None)
    nobody.set_connect_state()
    end = End(channel("destination"))
    for _ in range(4):
        try:
            nobody.do_handshake()
        except SSL.WantReadError:
            assert not end.events
        try:
            end.take(nobody.bio_read(64 * KIB))
        except SSL.WantReadError:
            break
        if there := end.channel.bytes_to_send():
            nobody.bio_write(there)
    assert end.code == "peer.tls"
    assert end.events == []


def test_nobody_is_established_by_default() -> None:
    lone: Channel = channel("source")
    assert not lone.established
    assert lone.bytes_to_send()[:1] == b"\x16"  # a ClientHello, at once
    assert not channel("destination").bytes_to_send()


# ---- the protection: the source wants one, the destination allows some


def test_the_source_gets_the_protection_that_the_destination_allows_among_others() -> None:
    for wanted in ("hrt", "sealed"):
        ends = converse(channel("source", protection=wanted), channel("destination", protection="hrt sealed selective"))
        for end in ends:
            assert end.error is None
            assert end.channel.protection == wanted


@pytest.mark.parametrize("allowed", ["sealed", "sealed selective", ""])
def test_a_protection_that_the_destination_does_not_allow_is_refused_at_both_ends(allowed: str) -> None:
    ends = converse(channel("source", protection="hrt"), channel("destination", protection=allowed))
    for end in ends:
        assert end.code == "check.protection"
        assert not any(isinstance(event, Established) for event in end.events)
        with pytest.raises(InternalError):
            end.channel.migration_secret()


@pytest.mark.parametrize("said", ["sealed hrt", "hrt sealed", " sealed", "sealed "])
def test_a_source_names_one_protection(said: str) -> None:
    end = Puppet(channel("destination", protection="hrt sealed"), "client", SOURCE).say(
        FrameKind.HELLO, hello_of("source", protection=said).encode()
    )
    assert end.code == "check.protection"


def test_the_protections_are_part_of_the_secret() -> None:
    secrets = set()
    for wanted, allowed in (("sealed", "sealed"), ("sealed", "hrt sealed"), ("hrt", "hrt sealed")):
        one, other = converse(channel("source", protection=wanted), channel("destination", protection=allowed))
        assert one.channel.migration_secret() == other.channel.migration_secret()
        secrets.add(one.channel.migration_secret())
    assert len(secrets) == 3
