"""The enclave's whole interface: ecalls (agent to enclave) and ocalls (enclave to agent).

They cross one SOCK_SEQPACKET socket pair, one JSON object a packet, file descriptors beside them (SCM_RIGHTS). Nothing
else connects the two processes but the descriptors that are handed over. Order:

    enclave  Sandboxed                what it gave up; the agent decides before it hands over a key
    agent    Trust, as often as it takes            (destination)
             Begin + channel, quoting the enclave ends TLS on the first, and has evidence made through the second
    enclave  PeerEstablished
    both     SendMessage / Message    the agents talk, in what order they like
    agent    ExpectLanes                            (destination)
    enclave  LaneTokens                             (destination) what each lane's connection will show
    agent    OpenLanes + listener, connections      (source)
             AcceptLane + connection, for each      (destination)
    enclave  LanesOpen                the peer has proved, on each lane, that it holds its keys
             VmWanted                 (destination) the lane's first bytes are there
    agent    AttachVm + connection    (destination) dialled only now: QEMU takes a silent connection for a stream; both ends
                                      attach those of a domain's disks, where the server speaks first
    enclave  Counters, now and then
             LanesClosed              every lane was closed by both ends; the digest is the same at both
    enclave  PeerSeen                 after each later round of attestation, and before Failed where the peer is known
    agent    WatchGuest + files       (source, where pages are told apart) how to read the guest's memory
             ClassifyPages            once at the start, at each iteration and at the switch-over
    enclave  PagesClassified          (or GuestUnknown) what was found; the lanes did not wait for it
    agent    TellClasses + file       the classes are written there
    enclave  ClassesTold
    agent    AttachVtpm + connection  (a VM with a TPM of its own) a link to the VM's keeper, see `sealane.vtpm.link`
    agent    Outlive                  (destination of a postcopy) from now on the enclave goes on without the agent
    agent    Finish, or Abort at any time
    enclave  Failed, at any time; the last ocall
"""

import json
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, TypeAlias, get_args

from sealane.errors import InternalError
from sealane.limits import ECALL_MESSAGE_MAX, LANES_MAX

# All of a launcher's environment. numpy's linear algebra would start a thread for each core as it is loaded, which a fork
# loses; nothing here uses it.
LAUNCHER_ENVIRONMENT: Final[dict[str, str]] = {"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Begin:
    """Open the channel on the first descriptor; the second leads to the quoting process.

    `trusted` maps fingerprints to names; `now` is ISO 8601 with an offset. `protection` is what a source wants, and at a
    destination all that it allows, a space between them. `vm` and `epoch` are what is migrated, at a source; a destination
    hears them (empty and 0). `vouchers` are the CAs whose word is enough (`session.vouching.Vouchers` as JSON, or empty), and
    `host_certificate` is what a CA has issued for this host.
    """

    role: str
    migration: str
    key_pem: str = field(repr=False)
    certificate_pem: str
    trusted: dict[str, str]
    protection: str
    now: str
    vm: str
    epoch: int
    reattest_every_s: float
    vouchers: str = ""
    host_certificate: str = ""


@dataclass(frozen=True)
class Trust:
    """Destination, before Begin: more peers, as Begin's `trusted`; all of them do not fit one call."""

    trusted: dict[str, str]


@dataclass(frozen=True)
class OpenLanes:
    """Source: descriptors are the listener that QEMU will dial, then one connection a lane, lane 0 first.

    `reduce`: where the line is the bottleneck, send fewer bytes (`seal.reduce`, `seal.compression`). The last `attached` lanes
    are not for the listener: AttachVm brings their connections.
    """

    reduce: bool = True
    attached: int = 0


@dataclass(frozen=True)
class AcceptLane:
    """Destination: the descriptor is a connection whose preface named this lane."""

    lane: int


@dataclass(frozen=True)
class ExpectLanes:
    """Destination: so many lanes will come."""

    count: int


@dataclass(frozen=True)
class AttachVm:
    """The descriptor is a connection to QEMU for this lane; at a source only for those that OpenLanes left to it."""

    lane: int


@dataclass(frozen=True)
class AttachVtpm:
    """The descriptor is a link to the keeper of the VM's TPM, whose state goes through tpm_state_read and
    volatile_state_enc (source), volatile_state_dec and tpm_state_write (destination): see `sealane.enclave.vtpm`."""


@dataclass(frozen=True)
class SendMessage:
    """A message for the peer's agent."""

    payload: str


@dataclass(frozen=True)
class Abort:
    """End the migration now: tell the peer why, close everything, exit."""

    code: str
    detail: str


@dataclass(frozen=True)
class Finish:
    """Everything is said: say so to the peer and exit."""


@dataclass(frozen=True)
class Outlive:
    """Destination, once the lanes are open: what the lanes carry is wanted also where the agent ends.

    Without its agent the enclave tells nothing and attests no more. It ends when every lane is closed by both ends, or with the
    first failure.
    """


@dataclass(frozen=True)
class WatchGuest:
    """Files: QEMU's memory (/proc/PID/mem) and, where no other process writes guest memory, its page map.

    `layout` is a `sealane.guest.RamLayout` as JSON; its positions are addresses in QEMU's address space.
    """

    layout: str


@dataclass(frozen=True)
class ClassifyPages:
    """Class the guest's pages anew. `cpus` has CR0, CR3, CR4, EFER of each virtual CPU, one after the other.

    `is_last`: the VM is paused for the switch-over.
    """

    number: int
    cpus: list[int]
    is_last: bool


@dataclass(frozen=True)
class TellClasses:
    """File: write into it one byte a page (`PageClass`) of guest RAM, block after block in the layout's order."""


@dataclass(frozen=True)
class Sandboxed:
    """The first ocall: each measure of `sealane.enclave.sandbox`, and why it does not hold; empty where it does."""

    measures: dict[str, str]


@dataclass(frozen=True)
class PeerEstablished:
    """The peer is known, its certificate valid, its hello fits, and both ends accepted the other's evidence.

    `vm` and `epoch` are what both ends' evidence names; `verdict` is what this end found of the peer (JSON, as
    `sealane.attest.peer.summarise` makes it); `protection` is what the source wants and both allow; `vouched_by` is the CA
    that vouches for the peer, empty where it is trusted by itself.
    """

    peer_name: str
    peer_fingerprint: str
    tls_version: str
    kex_group: str
    cipher: str
    vm: str
    epoch: int
    verdict: str
    protection: str = "sealed"
    vouched_by: str = ""


@dataclass(frozen=True)
class PeerSeen:
    """What is known of the peer now, after a later round of attestation (`accepted`), or before `Failed`.

    The fields are those of PeerEstablished. Where it is not accepted, the certificate is trusted and no more: `vm` and `epoch`
    are what the peer claims, empty and 0 where it came to no claim; `verdict` is empty where this end came to none.
    """

    peer_name: str
    peer_fingerprint: str
    tls_version: str
    kex_group: str
    cipher: str
    vm: str
    epoch: int
    verdict: str
    protection: str
    vouched_by: str
    accepted: bool


@dataclass(frozen=True)
class Message:
    """A message from the peer's agent."""

    payload: str


@dataclass(frozen=True)
class LanesOpen:
    """Every lane is proved in both directions."""


@dataclass(frozen=True)
class LaneTokens:
    """Destination: what the connection of each lane shows in its preface, in hexadecimal, and the lane's number."""

    lanes: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class VmWanted:
    """The first bytes for QEMU have come on this lane."""

    lane: int


@dataclass(frozen=True)
class Counters:
    """Bytes so far, over all lanes: on the wire (records, both directions), of QEMU's at this end, and (source) of those
    that were not sent: zero pages, pages that the destination had, and what zstd took off the rest."""

    wire_bytes: int
    plaintext_bytes: int
    zero_bytes: int = 0
    same_bytes: int = 0
    compressed_bytes: int = 0


@dataclass(frozen=True)
class LanesClosed:
    """Every lane was closed by both ends; `digest` covers every record of both directions (SHA-256, hexadecimal).

    `cpu_s` is what this process has used so far (getrusage(2)), `peak_rss_bytes` the most memory it held; the others are
    those of Counters.
    """

    digest: str
    wire_bytes: int
    plaintext_bytes: int
    zero_bytes: int = 0
    same_bytes: int = 0
    compressed_bytes: int = 0
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class PagesClassified:
    """Pages of guest RAM by class, and what it took. `tops` 0: no process was found, all pages count as the user's."""

    number: int
    user: int
    kernel: int
    free: int
    other: int
    tops: int
    tables: int
    scanned_pages: int
    reading_s: float
    total_s: float


@dataclass(frozen=True)
class GuestUnknown:
    """The pages could not be classed, so that all count as the user's; the migration goes on."""

    number: int
    code: str
    detail: str


@dataclass(frozen=True)
class ClassesTold:
    """The file of TellClasses is complete."""


@dataclass(frozen=True)
class PeerFinished:
    """The peer said that everything is said."""


@dataclass(frozen=True)
class Failed:
    """The migration's lane is over, for this reason; `by_peer` where the peer gave it."""

    code: str
    detail: str
    by_peer: bool


Ecall: TypeAlias = (
    Trust
    | Begin
    | OpenLanes
    | ExpectLanes
    | AcceptLane
    | AttachVm
    | AttachVtpm
    | SendMessage
    | Abort
    | Finish
    | Outlive
    | WatchGuest
    | ClassifyPages
    | TellClasses
)
Ocall: TypeAlias = (
    Sandboxed
    | PeerEstablished
    | PeerSeen
    | Message
    | LaneTokens
    | LanesOpen
    | VmWanted
    | Counters
    | LanesClosed
    | PeerFinished
    | PagesClassified
    | GuestUnknown
    | ClassesTold
    | Failed
)
Call: TypeAlias = Ecall | Ocall

_BY_NAME: Final[dict[str, type[Any]]] = {cls.__name__: cls for cls in (*get_args(Ecall), *get_args(Ocall))}
_PLAIN: Final[dict[Any, type[Any]]] = {str: str, int: int, bool: bool, float: float}


def encode_call(call: Call) -> bytes:
    """One packet."""
    packet = json.dumps({"call": type(call).__name__, **asdict(call)}).encode()
    if len(packet) > ECALL_MESSAGE_MAX:
        raise InternalError("internal.error", f"{type(call).__name__} of {len(packet)} bytes")
    return packet


def parse_call(packet: bytes) -> Call:
    """Read one packet, every field checked by type; raises InternalError."""
    try:
        said = json.loads(packet)
        cls = _BY_NAME[said.pop("call")]
        if set(said) != {f.name for f in fields(cls)} or not all(_fits(said[f.name], f.type) for f in fields(cls)):
            raise ValueError("fields do not fit")
        call: Call = cls(**said)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InternalError("internal.error", f"a call that does not fit: {type(error).__name__}") from None
    return call


def _fits(value: object, annotation: object) -> bool:
    if annotation == dict[str, str]:
        return isinstance(value, dict) and all(isinstance(part, str) for item in value.items() for part in item)
    if annotation == list[int]:
        return isinstance(value, list) and all(type(part) is int for part in value)
    return type(value) is _PLAIN[annotation]


class CallSocket:
    """One end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._files: list[int] = []

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self.connection.fileno()

    def send(self, call: Call, descriptors: Sequence[int] = ()) -> None:
        """Send one call; raises OSError where the other process is gone."""
        socket.send_fds(self.connection, [encode_call(call)], list(descriptors))

    def receive(self) -> tuple[Call, list[socket.socket]] | None:
        """The next call and the sockets beside it; None where the other process is gone."""
        packet, descriptors, flags, _ = socket.recv_fds(self.connection, ECALL_MESSAGE_MAX, LANES_MAX + 1)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # recv_fds does not pass MSG_CMSG_CLOEXEC on
        self._drop_files()
        self._files = [each for each in descriptors if not stat.S_ISSOCK(os.fstat(each).st_mode)]
        sockets = [socket.socket(fileno=each) for each in descriptors if each not in self._files]
        if not packet:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise InternalError("internal.error", "a call was cut short")
        return parse_call(packet), sockets

    def take_files(self) -> list[int]:
        """The descriptors beside the last call that are no sockets; the caller's to close. Else the next call closes them."""
        files, self._files = self._files, []
        return files

    def _drop_files(self) -> None:
        for each in self.take_files():
            os.close(each)

    def close(self) -> None:
        """Close this end."""
        self._drop_files()
        self.connection.close()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A fresh pair: the agent's end, the enclave's end."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Close what was handed over."""
    for descriptor in descriptors:
        os.close(descriptor)
