"""What crosses the agent's REST interface, and nothing else: requests, answers and the lines of an event stream.

Units stand in the names. Every answer that is not 2xx is a `Problem` (RFC 9457, `application/problem+json`).
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sealane.libvirt.disks import CopyStorage
from sealane.limits import GIVE_UP_AFTER_S, LANES_MAX, THROTTLE_MAX_PERCENT

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Fingerprint = Annotated[str, Field(pattern=r"^SHA256:[0-9a-f]{64}$")]
Labels = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")],
        Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")],
    ],
    Field(max_length=32),
]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MigrationId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

Role = Literal["source", "destination"]
State = Literal[
    "queued",
    "preparing",
    "copying",
    "switching-over",
    "handing-over",
    "postcopy",
    "postcopy-paused",
    "completed",
    "aborted",
    "in-doubt",
]
OnStall = Literal["give-up", "auto-converge", "postcopy", "wait"]
VmState = Literal["running", "paused", "incoming", "absent", "unreachable", "in-doubt"]
Protection = Literal["sealed", "selective", "hrt", "shift", "affine", "rc4"]
RunsAt = Literal["source", "destination", "in-doubt", "nowhere"]


class Model(BaseModel):
    """Closed and immutable: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(Model):
    """An error as RFC 9457 has it, with Sealane's code and mend; `detail` is one line."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    mend: str = ""
    retryable: bool = False


class Host(Model):
    """Who this agent is."""

    name: str
    version: str
    fingerprint: Fingerprint
    not_after: datetime
    listen: str
    root_of_trust: str
    migrations_active: int


class TotalRate(Model):
    """The bound of all copies to other hosts together, in bytes a second; 0 is none."""

    max_bytes_per_s: Annotated[int, Field(ge=0, lt=2**63)]


class Peer(Model):
    """A host whose certificate is trusted; without an address it can only be received from."""

    name: Name
    fingerprint: Fingerprint
    address: str | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None


class VmDefinition(Model):
    """A VM as the user names it: its QMP socket here, and how to launch it to receive a migration here.

    `least_level` is the trust level that it asks of the other host, `labels` are words for policies, `vtpm` is the directory
    where this host keeps the files of the VM's own TPM (none: it has none, or Sealane does not look after it); a comma in it would
    end the word in which swtpm is told it. A domain of libvirt
    has `libvirt:UUID:URI` in place of a socket; it is found, never registered.
    """

    name: Name
    qmp: Annotated[str, Field(min_length=1, max_length=107, pattern=r"^(/|libvirt:)")]
    launch_incoming: list[str] | None = None
    least_level: Annotated[int, Field(ge=0, le=4)] = 0
    labels: Labels = Field(default_factory=dict)
    vtpm: Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^/[^,]*$")] | None = None


class Vm(VmDefinition):
    """A VM and what is known of it now."""

    driver: Literal["qmp", "libvirt"] = "qmp"
    source: Literal["registered", "file", "libvirt"] = "registered"
    state: VmState
    memory_bytes: int | None = None
    cpus: int | None = None
    machine_type: str | None = None
    qemu_version: str | None = None
    epoch: int = 0
    migration: MigrationId | None = None
    migration_state: State | None = None


class PageCounts(Model):
    """4 KiB pages of guest RAM by class; `other` is what firmware or devices cover."""

    user: int
    kernel: int
    free: int
    other: int


class BlockClasses(Model):
    """One RAM block's pages. `classes` (where asked for): a byte a page, 0 other, 1 free, 2 kernel, 3 user; zlib, then base64."""

    name: str
    pages: int
    classes: str | None = None


class PageMap(Model):
    """What the pages of a VM's memory are, as seen from outside while it ran.

    `processes` top-level page tables were found (0: the guest's tables are not understood, so nothing is known of user
    pages). `reading_s` of `total_s` were spent in reading.
    """

    vm: Name
    counts: PageCounts
    processes: int
    tables: int
    scanned_pages: int
    reading_s: float
    total_s: float
    blocks: list[BlockClasses]


class MigrationRequest(Model):
    """Move `vm` to the peer `host`. None means: the default, chosen by what both ends have.

    Any protection but `sealed` leaves a part of the VM readable on the network: it needs `i_know_this_is_weak`, and both
    hosts' configurations must allow it. Without `reduce` every byte crosses the wire as it is.

    `on_stall`: where the guest writes faster than the copy goes, "give-up" leaves the VM at the source once there was no
    progress for `give_up_after_s`; "auto-converge" lets QEMU slow the guest down, to `throttle_max_percent` at most,
    before that; "postcopy" lets the VM run at the destination before all of its memory is there, once there was no progress
    for `give_up_after_s`, and from then on the loss of either host loses the VM; "wait" never gives up.

    `undefine_source`: a persistent domain of libvirt is forgotten here once it runs there. `copy_storage`: libvirt copies a
    domain's disks, "all" of each or "inc", the layer above its backing file, into files that the destination makes. `client`
    "other": the lanes are opened for a domain, and another client of libvirt than the agent migrates it through them.

    Where a limit is reached the migration waits: the higher `priority` goes first (None: the VM's own). At most `group_max`
    of those with the same `group` are in progress at once (0: as many as there are). After `time_limit_s` in progress, and
    the configuration's own limit, it is aborted.
    """

    vm: Name
    host: Name
    multifd_channels: Annotated[int, Field(ge=0, le=LANES_MAX - 2)] | None = None
    max_bandwidth_bytes_per_s: Annotated[int, Field(ge=0)] | None = None
    downtime_limit_ms: Annotated[int, Field(ge=1, le=2_000_000)] | None = None
    switchover_hook: list[str] | None = None
    on_stall: OnStall = "give-up"
    give_up_after_s: Annotated[float, Field(gt=0, le=86_400)] = GIVE_UP_AFTER_S
    throttle_max_percent: Annotated[int, Field(ge=1, le=99)] = THROTTLE_MAX_PERCENT
    reduce: bool = True
    undefine_source: bool = False
    copy_storage: CopyStorage = "none"
    client: Literal["agent", "other"] = "agent"
    protection: Protection = "sealed"
    i_know_this_is_weak: bool = False
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    group: Name | None = None
    group_max: Annotated[int, Field(ge=0, le=256)] = 0
    time_limit_s: Annotated[float, Field(gt=0, le=604_800)] | None = None


class NotSent(Model):
    """Bytes of QEMU's that did not cross the wire: pages of zeros, pages whose content the destination had, and what zstd
    took off the rest. All of it is 0 where the line was no bottleneck."""

    zero_bytes: int = 0
    same_bytes: int = 0
    zstd_bytes: int = 0


class Progress(Model):
    """How far a migration is. Rates are of the last interval; None where nothing is known yet. `rate_limit_bytes_per_s` is the
    bound that holds now, of its own or its share of the host's; 0 is none.

    `converges` False: the guest writes faster than the copy goes, and no end is in sight; `stalled_s` is how long there
    was no progress, `throttle_percent` how far QEMU slows the guest down, `postcopy_requests` how many pages the guest, which
    runs at the destination already, could not wait for. `disk_bytes_*` are of disks that libvirt copies, by its own count;
    the other figures are of memory, but for `bytes_wire`, which counts everything.
    """

    bytes_total: int = 0
    bytes_remaining: int = 0
    bytes_transferred: int = 0
    bytes_wire: int = 0
    not_sent: NotSent = NotSent()
    rate_bytes_per_s: float | None = None
    rate_limit_bytes_per_s: int = 0
    dirty_rate_bytes_per_s: float | None = None
    iteration: int = 0
    eta_s: float | None = None
    converges: bool | None = None
    stalled_s: float = 0.0
    throttle_percent: int | None = None
    postcopy_requests: int | None = None
    disk_bytes_total: int = 0
    disk_bytes_transferred: int = 0
    disk_bytes_remaining: int = 0


class MadeVolume(Model):
    """A file that this host made for a disk that is copied, by its path, device and inode."""

    path: str
    device: int
    inode: int


class Result(Model):
    """What a migration took: `total_ms` from the request to the receipt, `copy_ms` from QEMU's `migrate` to the receipt,
    `downtime_ms` from the guest's stop at the source to its resumption at the destination, as the source sees both; the
    enclave's figures are those of this end."""

    total_ms: float
    copy_ms: float | None = None
    downtime_ms: float | None = None
    bytes_wire: int = 0
    not_sent: NotSent = NotSent()
    enclave_cpu_s: float | None = None
    enclave_peak_rss_bytes: int | None = None


class Evidence(Model):
    """One piece of evidence that a verdict rests on, by its digest."""

    kind: str
    sha256: Digest


class PeerTrust(Model):
    """What this host knows of a peer: how far it is trusted, and what that rests on. Level 1 is a pinned certificate.

    `vouched_by` is the CA whose word it is, where the peer is not trusted by itself.
    """

    level: Annotated[int, Field(ge=0, le=4)] = 1
    production_level: Annotated[int, Field(ge=0, le=4)] = 1
    root: str = "pinned certificate (identity only)"
    identities: list[str] = Field(default_factory=list)
    evidence: list[Evidence] = Field(default_factory=list)
    reasons: list[str] = Field(default_factory=list)
    seen_at: datetime | None = None
    vouched_by: str | None = None


class PolicyDecision(Model):
    """What the policy said, and which policy it was: the SHA-256 of its files, the ids that decided, and a sentence."""

    decision: Literal["allow", "deny"]
    digest: Digest
    source: Literal["default", "files"]
    policies: list[str] = Field(default_factory=list)
    words: str
    code: str | None = None


class PairingRequest(Model):
    """Pair with the agent at this address, which shows this code."""

    host: Annotated[str, Field(min_length=1, max_length=255)]
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    code: Annotated[str, Field(max_length=100)]


class FleetStatus(Model):
    """How a host stands with its CA: what the CA issued for it, and how old the revocation list is. Times are UTC."""

    authority: str
    authority_fingerprint: Fingerprint
    authority_host: str
    address: str | None = None
    port: int | None = None
    certificate_until: datetime | None = None
    level: int | None = None
    production_level: int | None = None
    list_number: int | None = None
    list_until: datetime | None = None
    revoked: int = 0
    hosts: list[str] = Field(default_factory=list)
    problem: Problem | None = None


class PairingStatus(Model):
    """A pairing: the code that is shown, or whom it led to and the words to compare, or why it failed."""

    state: Literal["waiting", "paired", "failed"]
    code: str | None = None
    expires_at: datetime | None = None
    tries_left: int | None = None
    peer: Peer | None = None
    words: str | None = None
    problem: Problem | None = None


class PolicyQuestion(Model):
    """Would this move be allowed? `level` and `user` in place of what is known; `receive`: from the host, not to it."""

    vm: Name
    host: Name
    direction: Literal["send", "receive"] = "send"
    protection: str = "sealed"
    level: Annotated[int, Field(ge=0, le=4)] | None = None
    user: str | None = None


class PolicyAnswer(Model):
    """The decision, and what it was made from."""

    decision: PolicyDecision
    vm: Name
    host: Name
    direction: Literal["send", "receive"]
    protection: str
    least_level: int
    user: str | None
    trust: PeerTrust


class PeerView(Model):
    """A trusted host, what was last seen of it, and, where a VM was named, whether the policy would let it go there.

    `hardware` is what it showed when it was paired or enrolled; `trusted_by` says whether by itself or by the CA's word alone.
    """

    name: Name
    fingerprint: Fingerprint
    address: str | None = None
    port: int | None = None
    trust: PeerTrust
    decision: PolicyDecision | None = None
    hardware: list[str] = Field(default_factory=list)
    trusted_by: Literal["certificate", "ca"] = "certificate"


class QueuePlace(Model):
    """Where a migration that waits stands (1 begins next), how many wait, and what it waits for."""

    place: int
    waiting: int
    why: str


class VtpmFacts(Model):
    """A VM's TPM by its public facts: the digest of its endorsement key's public area (empty: it has none at 0x81010001),
    how often its lasting state was written, and the counter of the host where it is."""

    ek_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    version: Annotated[int, Field(ge=0, lt=1 << 53)]
    counter: Annotated[int, Field(ge=0, lt=1 << 63)]


class VtpmView(Model):
    """A VM's TPM on this host. `control` is the socket for QEMU, `key` says what the key of its files is wrapped to."""

    vm: Name
    status: Literal["none", "incoming", "here", "gone"]
    running: bool
    in_use: bool
    migrating: bool
    storage: str
    control: str
    swtpm: str
    key: str
    epoch: int
    facts: VtpmFacts | None = None


class Resolution(Model):
    """How a source's doubt ended, who gave up a half whose other half is lost (`drop-here`, at either end), or (`promised`, at a
    destination) what a source in doubt was answered for good.

    `answer` is what the destination said before: ran, promise, under-way, gone, unknown; none, where it could not be asked.
    """

    decision: Literal["own-here", "drop-here", "promised"]
    by: Literal["destination", "operator", "journal"]
    answer: Literal["ran", "promise", "under-way", "gone", "unknown", "none"]
    words: str
    user: str | None = None
    at: datetime


class ResolveRequest(Model):
    """What to do about a migration that is in doubt here, or `postcopy-paused`. `ask`: do as the destination's journal says.

    `own-here`: the VM is this host's and runs on here; `drop-here`: it is the destination's, and the paused copy here is
    ended. The destination is asked first, and a word against its answer is refused. Where it cannot tell, or cannot be
    asked, `i_have_looked` is needed: that somebody made sure of it on the destination itself.

    Of halves that are parted, `ask` has the source join them now; `drop-here` ends the half here, the other one being lost for
    good, of which `i_have_looked` says that somebody made sure; `own-here` is refused, but at a source whose QEMU has the VM
    whole, having made no switch: it goes on there as it was at the switch.
    """

    decision: Literal["ask", "own-here", "drop-here"]
    i_have_looked: bool = False


class Migration(Model):
    """One migration as one host sees it. `receipt` is the number of its receipt here, `peer_receipt` the digest of the
    other end's, `stream_digest` that of all records of all lanes, `readable` what the protection leaves readable to whoever
    reads the wire, `volumes` what this host made for disks that are copied to it. `queue` is there while it waits, `waited_s`
    is how long it did."""

    id: MigrationId
    number: int
    vm: str
    role: Role
    peer: str
    state: State
    runs_at: RunsAt
    started_at: datetime
    ended_at: datetime | None = None
    detail: str = ""
    problem: Problem | None = None
    progress: Progress = Progress()
    result: Result | None = None
    protection: Protection = "sealed"
    readable: str = "nothing"
    tls_version: str | None = None
    kex_group: str | None = None
    cipher: str | None = None
    multifd_channels: int | None = None
    requested_by: str | None = None
    epoch: int | None = None
    peer_fingerprint: Fingerprint | None = None
    peer_trust: PeerTrust | None = None
    policy: PolicyDecision | None = None
    stream_digest: Digest | None = None
    peer_receipt: Digest | None = None
    vtpm: VtpmFacts | None = None
    volumes: list[MadeVolume] = Field(default_factory=list)
    receipt: int | None = None
    resolution: Resolution | None = None
    queue: QueuePlace | None = None
    waited_s: float = 0.0
    priority: int = 0
    group: str | None = None


class Event(Model):
    """One line of `GET /v1/migrations/{id}/events` (NDJSON): the first tells the present state, the last one ends it."""

    type: Literal["state", "progress", "end"]
    migration: Migration
