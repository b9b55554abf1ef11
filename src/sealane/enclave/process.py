"""The enclave's main loop: ecalls, the channel, and what the lanes tell, in one thread; the lanes pump in theirs.

The first failure ends everything: the peer is told by the channel, then every connection is closed, so that QEMU at
both ends sees its migration fail, and the agent hears `Failed`. A lane that merely broke says little; where the peer's
reason follows within GRACE_S, that one is told instead.

That the agent is gone is a failure too, but for a destination's enclave that was told to outlive it (`Outlive`): it goes on
alone until every lane is closed.
"""

import contextlib
import os
import queue
import resource
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from sealane.attest.asking import EvidenceAsked, PolicyWanted
from sealane.crypto.aead import CIPHER_NAME
from sealane.crypto.identity import load_identity_pem
from sealane.enclave import lane as lanes
from sealane.enclave import telling
from sealane.enclave.interface import (
    Abort,
    AcceptLane,
    AttachVm,
    AttachVtpm,
    Begin,
    CallSocket,
    ClassifyPages,
    Counters,
    Ecall,
    ExpectLanes,
    Failed,
    Finish,
    LanesClosed,
    LanesOpen,
    LaneTokens,
    Message,
    Ocall,
    OpenLanes,
    Outlive,
    PeerFinished,
    Sandboxed,
    SendMessage,
    TellClasses,
    Trust,
    VmWanted,
    WatchGuest,
)
from sealane.enclave.lane_set import LaneSet
from sealane.enclave.marked import Guard
from sealane.enclave.monitor import Classified
from sealane.enclave.quoting import QuotingLine, make_judge_maker
from sealane.enclave.sandbox import Sandbox, outlive_parent
from sealane.enclave.vtpm import VtpmStates
from sealane.enclave.watching import GuestWatch, answer_of
from sealane.errors import HostError, InternalError, PeerError, SealaneError, make_error
from sealane.limits import REATTEST_AT_ONCE, REATTEST_PAUSE_S, TRUSTED_MAX
from sealane.seal.keys import lane_token
from sealane.session.attestation import Attested, Subject
from sealane.session.channel import (
    Attestor,
    Channel,
    Established,
    Event,
    EvidenceWanted,
    MessageReceived,
    PeerRefused,
    PeerSaidBye,
    Reattested,
    Role,
)
from sealane.session.preface import ConnectionKind, Preface, encode_preface
from sealane.session.vouching import parse_vouchers
from sealane.vtpm.envelope import Journey, StateSealer

GRACE_S: Final = 2.0
COUNTERS_EVERY_S: Final = 0.25
_CHANNEL_READ_BYTES: Final = 64 * 1024
# A break that the peer, or the agent beside us, may explain better than we can.
_SECONDARY: Final = frozenset({"lane.cut", "lane.truncated", "peer.closed", "migration.destination-died"})


class EnclaveOver(Exception):
    """The loop ends."""


class Enclave:
    """One migration's enclave."""

    def __init__(self, calls: CallSocket, clock: Callable[[], float] = time.monotonic) -> None:
        self._calls, self._clock = calls, clock
        self._selector = selectors.DefaultSelector()
        self._happened: queue.SimpleQueue[lanes.Event | Classified] = queue.SimpleQueue()
        self._wake, self._waker = socket.socketpair()
        self._guest = GuestWatch(self._post)
        self._channel: Channel | None = None
        self._connection: socket.socket | None = None
        self._quoting: QuotingLine | None = None
        self._attested_at = self._reattest_every_s = self._met_at = 0.0
        self._rounds_begun = 0  # by the source, after the first
        self._outgoing = b""
        self._trusted: dict[str, str] = {}
        self._migration = ""
        self._is_source = False
        self._lanes = LaneSet(self._make_lane)
        self._vtpm: VtpmStates | None = None
        self._subject = Subject("", 0)
        self._outlives = self._is_alone = False
        self._unquoted: HostError | None = None  # counts where the agent lives on without its quoting process
        self._unquoted_until = 0.0
        self._suspended: SealaneError | None = None  # a secondary failure that waits for the peer's word
        self._suspended_until = 0.0
        self._counted_at = 0.0
        self._status = os.open("/proc/self/status", os.O_RDONLY)  # in the sandbox nothing can be opened

    @property
    def descriptors(self) -> frozenset[int]:
        """What it holds open before it serves."""
        ends = (self._calls, self._wake, self._waker)
        epoll = getattr(self._selector, "fileno", lambda: self._status)()
        return frozenset({self._status, epoll, *(end.fileno() for end in ends)})

    def run(self) -> None:
        """Serve until the migration is over."""
        self._wake.setblocking(False)
        self._selector.register(self._calls.connection, selectors.EVENT_READ, self._on_call)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_lane_events)
        try:
            while True:
                self._turn()
        except EnclaveOver:
            pass
        finally:
            self._close_all()

    def close(self) -> None:
        """Close what it holds for itself: for an enclave that shares its process with others, as in tests."""
        self._selector.close()
        self._wake.close()
        self._waker.close()
        os.close(self._status)

    def _turn(self) -> None:
        try:
            for key, _ in self._selector.select(COUNTERS_EVERY_S):
                key.data()
            self._flush()
            self._tick()
        except SealaneError as error:
            self._fail(error)
        except OSError as error:
            self._fail(PeerError("lane.cut", str(error)))

    def _tick(self) -> None:
        now = self._clock()
        if self._suspended is not None and now >= self._suspended_until:
            self._end(self._suspended, by_peer=False)
        if self._quoting is not None and not self._is_alone:
            self._quoting.check_time()
            if self._unquoted is not None and now >= self._unquoted_until:
                self._end(self._unquoted, by_peer=False)
        self._attest_again(now)
        if self._lanes and not self._is_alone and now - self._counted_at >= COUNTERS_EVERY_S:
            self._counted_at = now
            self._tell(Counters(*self._lanes.count()))

    # ---- the agent

    def _on_call(self) -> None:
        try:
            received = self._calls.receive()
        except ConnectionResetError:
            return  # once, where the agent left words of ours unread; what it said last is still to be read
        if received is None:
            self._agent_is_gone()
            return
        call, sockets = received
        self.serve(call, sockets)  # type: ignore[arg-type]

    def _agent_is_gone(self) -> None:
        if not self._outlives:
            raise EnclaveOver  # closing everything makes QEMU fail the migration
        self._is_alone = True
        self._selector.unregister(self._calls.connection)
        self._need_channel().attest_no_more()  # the quoting process ends with the agent, before it or after
        self._stop_hearing(self._need_quoting().connection)
        self._end_alone_if_done()

    def serve(self, call: Ecall, sockets: list[socket.socket]) -> None:
        """Do what the agent asks; raises SealaneError, InternalError for what comes out of turn, and EnclaveOver at the end."""
        try:
            self._serve(call, sockets)
        except (EnclaveOver, SealaneError, OSError):
            raise
        except Exception as error:  # whatever a library makes of a call that does not fit: one typed error
            raise InternalError(
                "internal.error", f"{type(call).__name__} does not fit: {type(error).__name__}"
            ) from error

    def _serve(self, call: Ecall, sockets: list[socket.socket]) -> None:
        match call:
            case Trust():
                self._trust(call.trusted)
            case Begin():
                self._begin(call, *sockets)
            case SendMessage():
                self._need_channel().send_message(call.payload.encode())
            case OpenLanes() | ExpectLanes() | AcceptLane() | AttachVm():
                self._serve_lanes(call, sockets)
            case AttachVtpm():
                self._attach_vtpm(sockets[0])
            case Abort():
                self._end(make_error(call.code, call.detail), by_peer=False, tell_agent=False)
            case WatchGuest() | ClassifyPages() | TellClasses():
                if (answer := self._guest.serve(call, self._calls.take_files())) is not None:
                    self._tell(answer)
            case Outlive():
                self._outlive()
            case Finish():
                self._finish()

    def _serve_lanes(self, call: OpenLanes | ExpectLanes | AcceptLane | AttachVm, sockets: list[socket.socket]) -> None:
        match call:
            case OpenLanes():
                self._open_lanes(call, *sockets)
            case ExpectLanes():
                self._expect_lanes(call.count)
            case AcceptLane():
                self._lanes.add(call.lane, sockets[0]).start()
            case AttachVm():
                self._lanes.attach(call.lane, sockets[0])

    def _trust(self, peers: dict[str, str]) -> None:
        if self._connection is not None or len(self._trusted) + len(peers) > TRUSTED_MAX:
            raise InternalError("internal.error", "Trust after Begin, or too many peers")
        self._trusted |= peers

    def _begin(self, call: Begin, connection: socket.socket, quoting: socket.socket) -> None:
        if self._connection is not None or call.role not in {"source", "destination"}:
            raise InternalError("internal.error", "a second Begin, or one without a role")
        self._is_source, self._migration = call.role == "source", call.migration
        self._connection, self._quoting = connection, QuotingLine(quoting, self._clock)
        self._reattest_every_s = call.reattest_every_s
        connection.setblocking(False)
        if self._is_source:  # the peer waits but seconds for it, and a policy may take longer to come
            self._outgoing = encode_preface(Preface(ConnectionKind.CHANNEL, bytes.fromhex(call.migration)))
            with contextlib.suppress(OSError):  # met again, and told, when the channel speaks
                self._outgoing = self._outgoing[connection.send(self._outgoing) :]
        self._selector.register(quoting, selectors.EVENT_READ, self._on_quoting)
        self._quoting.ask(PolicyWanted(), lambda policy: self._open_channel(call, policy))

    def _open_channel(self, call: Begin, policy: dict[str, bytes]) -> None:
        begun, started = datetime.fromisoformat(call.now), self._clock()
        role: Role = "source" if self._is_source else "destination"
        self._channel = Channel(
            load_identity_pem(call.key_pem.encode(), call.certificate_pem.encode()),
            role=role,
            migration=call.migration,
            trusted=self._trusted | call.trusted,
            protection=call.protection,
            cipher=CIPHER_NAME,
            now=begun,
            attestor=Attestor(
                Subject(call.vm, call.epoch) if self._is_source else None,
                make_judge_maker(policy, lambda: begun + timedelta(seconds=self._clock() - started)),
                vouchers=parse_vouchers(call.vouchers),
                host_certificate=call.host_certificate.encode(),
            ),
        )
        self._selector.register(self._need_connection(), selectors.EVENT_READ, self._on_channel)

    def _outlive(self) -> None:
        if self._is_source or not self._lanes.are_open:
            raise InternalError("internal.error", "Outlive before the lanes are open, or at a source")
        outlive_parent()
        self._outlives = True

    def _end_alone_if_done(self) -> None:
        if self._is_alone and self._lanes.are_closed:
            self._finish()

    def _finish(self) -> None:
        if self._channel is not None:  # there is none where only the guest's pages were asked about
            self._channel.say_bye()
            self._flush(wait=True)
        raise EnclaveOver

    def _tell(self, call: Ocall) -> None:
        if self._is_alone:
            return
        try:
            self._calls.send(call)
        except OSError:
            if not self._outlives:  # else `_on_call` hears of it, too
                raise EnclaveOver from None

    # ---- the channel

    def _need_channel(self) -> Channel:
        if self._channel is None:
            raise InternalError("internal.error", "no channel yet")
        return self._channel

    def _need_connection(self) -> socket.socket:
        if self._connection is None:
            raise InternalError("internal.error", "no connection yet")
        return self._connection

    def _need_quoting(self) -> QuotingLine:
        if self._quoting is None:
            raise InternalError("internal.error", "no quoting process yet")
        return self._quoting

    def _on_channel(self) -> None:
        channel, connection = self._need_channel(), self._need_connection()
        try:
            data = connection.recv(_CHANNEL_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._stop_reading()
            raise PeerError("peer.closed", f"the channel broke: {error.strerror}") from error
        if not data:
            self._stop_reading()
            channel.ended()
        self._on_events(channel.receive(data))

    def _on_events(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case EvidenceWanted():
                    self._check_pace()
                    self._need_quoting().ask(EvidenceAsked(event.report_data, event.vm), self._on_evidence)
                case Established():
                    self._attested_at = self._met_at = self._clock()
                    self._tell_established(event)
                case Reattested():
                    self._attested_at = self._clock()
                    self._tell_seen(event.attested)
                case MessageReceived():
                    self._tell_message(event.payload)
                case PeerRefused():
                    self._end(event.error, by_peer=True)
                case PeerSaidBye():
                    self._tell(PeerFinished())
                    self._stop_reading()

    def _on_quoting(self) -> None:
        line = self._need_quoting()
        try:
            goes_on = line.on_readable()
        except HostError as error:
            if not self._outlives:
                raise
            goes_on, self._unquoted, self._unquoted_until = False, error, self._clock() + GRACE_S
        if not goes_on:
            self._stop_hearing(line.connection)

    def _on_evidence(self, pieces: dict[str, bytes]) -> None:
        self._on_events(self._need_channel().evidence_made(pieces))

    def _tell_established(self, event: Established) -> None:
        self._subject = event.attested.subject
        self._tell(telling.established(event, self._need_channel().protection))

    def _tell_seen(self, attested: Attested) -> None:
        if (met := self._need_channel().met) is not None:
            protection = self._need_channel().protection
            self._tell(telling.seen(met, protection, attested.verdict, attested.evidence, accepted=True))

    def _tell_refused(self, error: SealaneError) -> None:
        """Before the last word, where the peer was met: whom it is about, and what was thought of it."""
        if self._channel is not None and (met := self._channel.met) is not None:
            self._tell(telling.refused(met, self._channel.protection, error))

    def _attest_again(self, now: float) -> None:
        """During the copy, source only: every so often the peer has to show that it is still what it was."""
        due = self._is_source and self._lanes.are_open and self._lanes.none_is_closed
        if due and now - self._attested_at >= self._reattest_every_s:
            self._attested_at = now
            self._on_events(self._need_channel().attest_again())

    def _check_pace(self) -> None:
        """Raise `attest.too-often` where a source begins rounds faster than this host would."""
        if self._is_source or not self._need_channel().established:
            return
        self._rounds_begun += 1
        pause_s = min(REATTEST_PAUSE_S, self._reattest_every_s)
        if (self._rounds_begun - REATTEST_AT_ONCE) * pause_s > self._clock() - self._met_at:
            raise make_error("attest.too-often")

    def _tell_message(self, payload: bytes) -> None:
        try:
            self._tell(Message(payload.decode()))
        except (UnicodeDecodeError, InternalError):
            raise PeerError("peer.message", "the peer's message is no text, or too long once it is quoted") from None

    def _stop_reading(self) -> None:
        self._stop_hearing(self._need_connection())

    def _stop_hearing(self, end: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(end)

    def _flush(self, *, wait: bool = False) -> None:
        if self._channel is None or self._connection is None:
            return
        self._outgoing += self._channel.bytes_to_send()
        if wait:
            self._connection.settimeout(GRACE_S)
        while self._outgoing:
            try:
                self._outgoing = self._outgoing[self._connection.send(self._outgoing) :]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if wait:
                    return
                self._on_channel()  # what the peer said before it hung up tells more
                raise PeerError("peer.closed", f"the channel broke: {error.strerror or error}") from error

    # ---- the lanes

    def _expect_lanes(self, count: int) -> None:
        self._lanes.expect(count)
        secret = self._need_channel().migration_secret()
        self._tell(LaneTokens({lane_token(secret, lane).hex(): str(lane) for lane in range(count)}))

    def _open_lanes(self, call: OpenLanes, listener: socket.socket, *connections: socket.socket) -> None:
        self._lanes.listen(listener, len(connections) - call.attached)
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._on_vm_dialled(listener))
        secret = self._need_channel().migration_secret()
        self._lanes.expect(len(connections), lanes.Reduction(len(connections), secret) if call.reduce else None)
        for index, connection in enumerate(connections):
            preface = encode_preface(Preface(ConnectionKind.LANE, lane_token(secret, index), index))
            self._lanes.add(index, connection).start(preface)

    def _make_lane(self, index: int, connection: socket.socket, reduction: lanes.Reduction | None) -> lanes.Lane:
        channel = self._need_channel()
        return lanes.Lane(
            connection,
            index=index,
            is_source=self._is_source,
            migration_secret=channel.migration_secret(),
            post=self._post,
            reduction=reduction,
            guard=Guard(channel.protection, self._guest.is_user),
        )

    def _on_vm_dialled(self, listener: socket.socket) -> None:
        if not self._lanes.accept():
            self._stop_hearing(listener)
            self._lanes.stop_listening()

    def _post(self, event: lanes.Event | Classified) -> None:
        """Called by the threads of the lanes and of the monitor."""
        self._happened.put(event)
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def _on_lane_events(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)
        while True:
            try:
                event = self._happened.get_nowait()
            except queue.Empty:
                return
            match event:
                case Classified():
                    self._tell(answer_of(event))
                case lanes.Broken():
                    self._fail(event.error)
                case lanes.Wanted() if self._is_alone:
                    self._fail(HostError("enclave.died", f"nobody is left who attaches lane {event.lane}"))
                case lanes.Wanted():
                    self._tell(VmWanted(event.lane))
                case lanes.Opened():
                    if self._lanes.note_opened(event.lane):
                        self._tell(LanesOpen())
                case lanes.Closed():
                    if self._lanes.note_closed(event.lane):
                        self._need_channel().attest_no_more()
                        self._tell(self._summary())
                        self._end_alone_if_done()

    def _summary(self) -> LanesClosed:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return LanesClosed(
            self._lanes.digest,
            *self._lanes.count(),
            cpu_s=used.ru_utime + used.ru_stime,
            peak_rss_bytes=_peak_rss_bytes(self._status),
        )

    def _attach_vtpm(self, connection: socket.socket) -> None:
        if self._vtpm is not None:
            raise InternalError("internal.error", "a second TPM")
        journey = Journey(self._subject.vm, self._subject.epoch, bytes.fromhex(self._migration))
        sealer = StateSealer(self._need_channel().migration_secret(), journey, os.urandom)
        self._vtpm = VtpmStates(connection, sealer, is_source=self._is_source)
        self._selector.register(connection, selectors.EVENT_READ, self._on_vtpm)

    def _on_vtpm(self) -> None:
        if self._vtpm is not None and not self._vtpm.serve():
            self._selector.unregister(self._vtpm.connection)

    # ---- the end

    def _fail(self, error: SealaneError) -> None:
        if error.code in _SECONDARY and error.code != "peer.closed" and self._suspended is None:
            self._suspended, self._suspended_until = error, self._clock() + GRACE_S
        elif self._suspended is not None and error.code in _SECONDARY:
            if error.code == "peer.closed":
                self._end(self._suspended, by_peer=False)
        else:
            self._end(error, by_peer=False)

    def _end(self, error: SealaneError, *, by_peer: bool, tell_agent: bool = True) -> None:
        if self._channel is not None and not by_peer:
            with contextlib.suppress(SealaneError):
                self._channel.refuse(error)
                self._flush(wait=True)
        self._lanes.end(GRACE_S)
        if tell_agent:
            with contextlib.suppress(SealaneError):
                self._tell_refused(error)
            self._tell(Failed(error.code, error.detail, by_peer))
        raise EnclaveOver

    def _close_all(self) -> None:
        self._lanes.end(GRACE_S)
        for end in (self._connection, self._quoting, self._vtpm):
            if end is not None:
                end.close()
        self._guest.close()
        self._calls.close()


def _peak_rss_bytes(status: int) -> int:
    """VmHWM of proc(5): since the fork, what is shared with the launcher included."""
    for line in os.pread(status, 8192, 0).splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main(descriptor: int, sandbox: Sandbox) -> None:
    """Serve one migration on the inherited call socket, from inside the sandbox."""
    os.set_inheritable(descriptor, False)
    calls = CallSocket(socket.socket(fileno=descriptor))
    enclave = Enclave(calls)
    measures = sandbox.enter(enclave.descriptors)
    try:
        calls.send(Sandboxed(measures))
    except OSError:  # the agent wants it no more
        return
    enclave.run()
