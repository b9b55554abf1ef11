"""What two agents say to each other, inside the enclaves' channel: one JSON object a message, checked field by field.

    source                         destination
    Prepare  ------------------->                 who the VM is; the destination checks, launches, listens
             <-------------------  Prepared       how many channels it will be
                  (lanes open, QEMU copies, both ends close the lanes)
             <-------------------  Loaded         the whole stream opened, and QEMU has loaded it, paused
    Ticket   ------------------->                 the source has journalled that it gives the VM up
             <-------------------  Receipt        the destination has journalled that it owns the VM; the VM runs
                                   TicketRefused  instead: the destination's copy is destroyed and never ran
             <-------------------  ReceiptCopy    the destination's signed receipt
    ReceiptCopy  -------------->                  the source's, which names the other

By postcopy, while the lanes are open:

    PostcopyTicket  ------------>                 the VM is paused and complete here; it will be given up
             <-------------------  TicketHeld     journalled; then the source journals, and lets its QEMU switch
             <-------------------  Receipt        the VM runs at the destination
             <-------------------  Arrived        all of its memory is there, and every lane closed
                                   TicketRefused  instead of Receipt: QEMU did not come through the switch

and on a new channel, when the lanes were cut meanwhile:

    Rejoin   ------------------->                 which VM and epoch
             <-------------------  Rejoined       the destination's QEMU listens again
                                   Arrived, TicketRefused   instead: it has all, or never had it

On a new channel, from a source that is in doubt what became of its ticket:

    Ask      ------------------->                 what became of this migration?
             <-------------------  Ran            the VM has run here; its receipt copy follows, if there is one
                                   Promise        it never ran here, and this is journalled: it never will
                                   Unsettled      the journal does not say (yet): ask again, or ask a person

Anything that goes wrong before the ticket travels as the channel's own refusal.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sealane.errors import PeerError, printable
from sealane.host.models import Labels, MigrationId, Name, VtpmFacts
from sealane.libvirt.disks import PATH_PATTERN, TARGET_PATTERN, DiskFormat
from sealane.libvirt.domains import DomainUri
from sealane.limits import CHANNEL_MESSAGE_MAX, COPIED_DISKS_MAX, LANES_MAX

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Far beyond any VM's moves, and within what the journal's integers and every peer's can hold.
EPOCH_MAX = 1 << 53
# Far beyond any guest's memory and processors; within what is told in words, and what can be divided.
MEMORY_BYTES_MAX = 1 << 60
CPUS_MAX = 1 << 20
# Far beyond any file system's files, and within the journal's integers.
DISK_BYTES_MAX = 1 << 60
# A receipt has some 3 KiB; with its envelope and the certificate it must fit a channel message.
RECEIPT_COPY_MAX = CHANNEL_MESSAGE_MAX // 2
Text = Annotated[str, Field(max_length=200, pattern=r"^[\x20-\x7e]*$")]
Channels = Annotated[int, Field(ge=0, le=LANES_MAX - 2)]
VersionPart = Annotated[int, Field(ge=0, le=1 << 16)]
Version = tuple[VersionPart, VersionPart, VersionPart]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


DiskPath = Annotated[str, Field(pattern=PATH_PATTERN)]
DiskBytes = Annotated[int, Field(ge=0, le=DISK_BYTES_MAX)]


class DiskWish(_Message):
    """A disk that is copied: the guest's name for it, the file that is to be made, the guest's size of it, and what it takes up
    at the source. `backing`: the file under the copied layer, which is there already."""

    target: Annotated[str, Field(pattern=TARGET_PATTERN)]
    path: DiskPath
    format: DiskFormat
    capacity_bytes: DiskBytes
    allocation_bytes: DiskBytes
    backing: DiskPath | None = None
    backing_format: DiskFormat | None = None


class DomainWish(_Message):
    """The VM is a domain of libvirt: of which libvirtd, and what its metadata says for policies, as the source has it; and the
    disks that are copied, each on a lane after those of QEMU's."""

    uri: DomainUri
    least_level: Annotated[int, Field(ge=0, le=4)]
    labels: Labels
    disks: Annotated[list[DiskWish], Field(max_length=COPIED_DISKS_MAX)] = Field(default_factory=list)


class Prepare(_Message):
    """The VM that wants to come; `multifd_channels` None leaves the number to the destination. `vtpm`: it brings a TPM.

    A `domain` brings its own description to the destination's libvirtd, so that the destination need not know the VM.
    """

    kind: Literal["prepare"] = "prepare"
    vm: Name
    uuid: Text
    qemu_version: Version
    machine_type: Text
    memory_bytes: Annotated[int, Field(gt=0, le=MEMORY_BYTES_MAX)]
    cpus: Annotated[int, Field(gt=0, le=CPUS_MAX)]
    capabilities: Annotated[list[Text], Field(max_length=100)]
    multifd_channels: Channels | None
    epoch: Annotated[int, Field(ge=0, le=EPOCH_MAX)]
    vtpm: VtpmFacts | None
    domain: DomainWish | None
    postcopy: bool


class Prepared(_Message):
    """The destination's QEMU listens; `preempt`: for a further lane too, which postcopy's wanted pages take."""

    kind: Literal["prepared"] = "prepared"
    multifd_channels: Channels
    preempt: bool


class Loaded(_Message):
    """Everything came and was loaded; `digest` is the enclave's over all lanes."""

    kind: Literal["loaded"] = "loaded"
    digest: Digest


class Ticket(_Message):
    """The VM is the destination's from now on; `vtpm` is its TPM as it was last."""

    kind: Literal["ticket"] = "ticket"
    vm: Name
    epoch: Annotated[int, Field(gt=0, le=EPOCH_MAX + 1)]
    digest: Digest
    vtpm: VtpmFacts | None


class PostcopyTicket(_Message):
    """The VM will be the destination's once its QEMU has switched to postcopy, and not before."""

    kind: Literal["postcopy-ticket"] = "postcopy-ticket"
    vm: Name
    epoch: Annotated[int, Field(gt=0, le=EPOCH_MAX + 1)]


class TicketHeld(_Message):
    """The postcopy ticket is journalled."""

    kind: Literal["ticket-held"] = "ticket-held"
    epoch: Annotated[int, Field(gt=0, le=EPOCH_MAX + 1)]


class Arrived(_Message):
    """Postcopy is over: the destination has every page. `digest` is its enclave's over the last lanes, if it has one."""

    kind: Literal["arrived"] = "arrived"
    epoch: Annotated[int, Field(gt=0, le=EPOCH_MAX + 1)]
    digest: Digest | None


class Rejoin(_Message):
    """Postcopy was cut half-way: join the two halves of this VM again."""

    kind: Literal["rejoin"] = "rejoin"
    vm: Name
    epoch: Annotated[int, Field(gt=0, le=EPOCH_MAX + 1)]


class Rejoined(_Message):
    """The destination's QEMU listens again, for so many lanes."""

    kind: Literal["rejoined"] = "rejoined"
    lanes: Annotated[int, Field(ge=1, le=LANES_MAX)]


class Receipt(_Message):
    """The VM runs at the destination, since so many milliseconds."""

    kind: Literal["receipt"] = "receipt"
    vm: Name
    epoch: Annotated[int, Field(gt=0, le=EPOCH_MAX + 1)]
    since_resume_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TicketRefused(_Message):
    """The destination did not take the VM; its copy never ran and is destroyed."""

    kind: Literal["ticket-refused"] = "ticket-refused"
    code: Text
    detail: Annotated[str, Field(max_length=1000)]


class ReceiptCopy(_Message):
    """The signed receipt of the end that sends it (a DSSE envelope), and the certificate that verifies it."""

    kind: Literal["receipt-copy"] = "receipt-copy"
    envelope: Annotated[str, Field(max_length=RECEIPT_COPY_MAX)]
    certificate: Annotated[str, Field(max_length=4096)]


class _AboutTicket(_Message):
    migration: MigrationId
    vm: Name
    epoch: Annotated[int, Field(gt=0, le=EPOCH_MAX + 1)]


class Ask(_AboutTicket):
    """What became of the ticket of this migration, VM and epoch?"""

    kind: Literal["ask"] = "ask"


class Ran(_AboutTicket):
    """The destination journalled the ticket, and its copy has run."""

    kind: Literal["ran"] = "ran"


class Promise(_AboutTicket):
    """The destination's copy never ran and is destroyed; it has journalled that this ticket is void."""

    kind: Literal["promise"] = "promise"


class Unsettled(_AboutTicket):
    """The destination cannot tell. `under-way`: not yet; `gone`: it took the VM, and its QEMU was lost; `unknown`: its
    journal has no such migration of this peer."""

    kind: Literal["unsettled"] = "unsettled"
    reason: Literal["under-way", "gone", "unknown"]
    detail: Text = ""


Message = (
    Prepare
    | Prepared
    | Loaded
    | Ticket
    | Receipt
    | TicketRefused
    | ReceiptCopy
    | PostcopyTicket
    | TicketHeld
    | Arrived
    | Rejoin
    | Rejoined
    | Ask
    | Ran
    | Promise
    | Unsettled
)
Answer: TypeAlias = Ran | Promise | Unsettled
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def parse_message(payload: str) -> Message:
    """Read a peer's words; raises PeerError `peer.message`."""
    try:
        return _ADAPTER.validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PeerError("peer.message", printable(f"a message does not fit: {where}: {first['msg']}", 200)) from None
