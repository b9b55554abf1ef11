"""Every cap in one place, each with its reason. Sizes in bytes, times in seconds."""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# The one TCP port. IANA lists 48130-48555 as unassigned (service name and port registry); nothing below /etc/services claims it.
DEFAULT_PORT: Final = 48217

# A record's payload. 256 KiB to 1 MiB keeps a record inside a core's L2 cache between the socket and the cipher, and costs
# one system call and one tag per record; QEMU's multifd packets carry at most 512 KiB.
RECORD_PAYLOAD_MAX: Final = 512 * KIB

# One channel message (hello, prepare, ticket …): the largest is `prepare` with its list of capabilities, about 4 KiB.
CHANNEL_MESSAGE_MAX: Final = 64 * KIB

# Evidence of one host with its logs: quotes are some KiB, a boot log 50 KiB, an IMA log of a busy host up to 10 MiB. Only a
# peer whose certificate is trusted can send it.
EVIDENCE_MAX: Final = 16 * MIB
# One answer of the quoting process: measuring a QEMU that is new (30 MiB to read) and a TPM's signature, 1 s with the slowest.
QUOTE_TIMEOUT_S: Final = 10.0
# How often a long copy attests anew where the settings do not say otherwise.
REATTEST_EVERY_S: Final = 600.0
# It is the source that begins these rounds, and each takes time of the destination's TPM, which all of its VMs share: so many
# beyond one in so many seconds, or in as many as the destination itself would let pass, where that is less.
REATTEST_AT_ONCE: Final = 8
REATTEST_PAUSE_S: Final = 1.0

# One ecall or ocall between agent and enclave: a channel message and its envelope must fit.
ECALL_MESSAGE_MAX: Final = 128 * KIB

# Lanes of one migration: main, multifd channels and postcopy's preempt channel. QEMU's multifd-channels is a byte; more than
# 32 channels gain nothing on any hardware that was measured.
LANES_MAX: Final = 34

# Descriptors of one enclave: two for each lane, a listener, the channel, and some of its own.
ENCLAVE_DESCRIPTORS_MAX: Final = 256

# Multifd channels taken by default where both ends have multifd: one per core up to this.
MULTIFD_CHANNELS_DEFAULT: Final = 2

# Connections whose preface has not arrived yet. When the table is full the oldest is dropped, so that idle connections never
# keep a peer out; a preface is 32 bytes, so this bounds memory to some 100 KiB.
PENDING_CONNECTIONS_MAX: Final = 128
PREFACE_TIMEOUT_S: Final = 5.0

# Enclaves of incoming migrations whose peer has not proved who it is. Each costs a process of about 35 MB.
UNPROVEN_ENCLAVES_MAX: Final = 8
# Trusted peers that a destination's enclave is told of; they cross in calls of so many, each below ECALL_MESSAGE_MAX (a
# fingerprint, a name and their quotes are at most 143 bytes).
TRUSTED_MAX: Final = 1 << 16
TRUSTED_PER_CALL: Final = 512
# Migrations in progress, in both directions together.
MIGRATIONS_MAX: Final = 16
# Those that one peer may have under way towards this host, those that begin included: none takes all places.
MIGRATIONS_PER_PEER_MAX: Final = 8
# Migrations to other hosts at once; more than four share one line and the cores without going faster (docs/performance.md).
OUTGOING_MAX: Final = 4
# Migrations that wait for their turn: an evacuation of the largest hosts, at some KiB each.
QUEUE_MAX: Final = 1024
# A migration that is not at its hand-over after a day holds its place and its VM for nothing.
MIGRATION_TIME_MAX_S: Final = 86_400.0
# Each wish costs an enclave and a handshake; an evacuation towards this host asks for no more than its VMs and some repeats.
WISHES_PER_PEER_PER_MINUTE: Final = 120
# Each refused wish is an entry in the journal and a receipt, some KiB for ever; beyond it they are counted in the log.
REFUSALS_PER_PEER_PER_HOUR: Final = 60

# A copy whose bytes stand still for so long is over: longer than a switch-over hook may think, or a route takes to heal.
STALL_TIMEOUT_S: Final = 60.0
# A copy that comes no nearer to its end for so long is given up, unless the user says otherwise; and how far a guest may be
# slowed down where the user allows that. Beyond four fifths a guest hardly answers.
GIVE_UP_AFTER_S: Final = 300.0
THROTTLE_MAX_PERCENT: Final = 80
# What a launched QEMU may leave in its log before the older half of it goes, and how often the agent looks.
QEMU_LOG_MAX: Final = 1 * MIB
QEMU_LOG_INTERVAL_S: Final = 30.0

# A pairing code: 99 * 2^16 of them, three tries and ten minutes each, so that a guess succeeds once in two million codes shown.
PAIRING_TRIES: Final = 3
PAIRING_LIFETIME_S: Final = 600.0
# Connections to one code; each costs some milliseconds of arithmetic. Beyond it the code is void: somebody is at work.
PAIRING_CONNECTIONS_MAX: Final = 32
# Each end has the other's TPM open a credential: some seconds with a slow one.
PAIRING_ANSWER_TIMEOUT_S: Final = 20.0

HANDSHAKE_TIMEOUT_S: Final = 15.0
CHANNEL_ANSWER_TIMEOUT_S: Final = 60.0
LANE_OPEN_TIMEOUT_S: Final = 15.0
ENCLAVE_START_TIMEOUT_S: Final = 30.0
LAUNCH_TIMEOUT_S: Final = 60.0
QMP_TIMEOUT_S: Final = 20.0
HOOK_TIMEOUT_S: Final = 10.0
# Between the source's last byte and the destination's `loaded`: QEMU has only to load the device state that it was sent.
LOADED_TIMEOUT_S: Final = 60.0
# The word that ends a pause: `loaded`, once all lanes are closed, and the ticket after it. Either end has only to ask its QEMU
# or to write its journal before it says them; nobody has given the VM up while they are waited for.
WORD_TIMEOUT_S: Final = 15.0
# A peer that has proved itself says at once what it wants.
PREPARE_TIMEOUT_S: Final = 10.0
# Times that a source asks its QEMU to let the VM run again, each with a connection of its own and QMP_TIMEOUT_S for each
# answer, before it leaves the VM to the agent's recovery, which asks every RECOVERY_INTERVAL_S.
TAKE_BACK_TRIES: Final = 3
RECOVERY_INTERVAL_S: Final = 5.0
# A source in doubt asks the destination at once, and again after twice as long each time, up to the longest. Each question costs
# both ends an enclave for a second. How often the agent looks whether one is due.
ASK_FIRST_PAUSE_S: Final = 2.0
ASK_LONGEST_PAUSE_S: Final = 300.0
ASK_LOOK_INTERVAL_S: Final = 0.5
# The destination answers from its journal.
ASK_ANSWER_TIMEOUT_S: Final = 15.0

# How long a source waits before each try to join the two halves of a postcopy that was cut: some ten minutes in all.
REJOIN_PAUSES_S: Final = (0.2, 1.0, 2.0, 4.0, 8.0, 15.0, *(30.0,) * 18)
# How long a person who has the halves joined waits to be told how the first try came out; it goes on afterwards.
REJOIN_TOLD_WITHIN_S: Final = 30.0

# How long a new migration of a VM waits for the last one to clear up, once that one's end was told.
CLEAR_UP_TIMEOUT_S: Final = 15.0

# A copy under a protection that tells pages apart begins when the guest's pages were looked at once, and no later than this:
# what is not known is encrypted. The VM runs meanwhile. A look takes 0.16 s per GiB.
FIRST_LOOK_TIMEOUT_S: Final = 5.0
# `sealane inspect pages`: reading 100 GiB that a guest has touched takes half a minute.
INSPECTION_TIMEOUT_S: Final = 120.0
# How long a stopped agent lets its migrations end before it aborts them.
STOP_GRACE_S: Final = 10.0

# A channel that says nothing for this long while the peer should answer pings is dead (TCP keep-alive finds a vanished host).
TCP_KEEPALIVE_IDLE_S: Final = 5
TCP_KEEPALIVE_INTERVAL_S: Final = 2
TCP_KEEPALIVE_PROBES: Final = 5
# Unacknowledged data for this long means that the peer is gone (RFC 5482).
TCP_USER_TIMEOUT_MS: Final = 20_000

# TCP congestion control of lanes. Where the system's default paces by timers (bbr), a lane costs 0.1 to 0.2 core-seconds a GB
# more at each end (docs/performance.md); a long thin line between sites may still want bbr: it is a setting.
CONGESTION_CONTROL: Final = "cubic"

# A lane's receive window: what a line of this rate holds for one round trip, and at least two records. More would only be
# memory that must drain while the VM is paused.
LANE_RATE_MAX_BYTES_PER_S: Final = 5_000_000_000
LANE_WINDOW_MIN: Final = 2 * RECORD_PAYLOAD_MAX

# AES-256-GCM: NIST SP 800-38D and RFC 8446 5.5 bound the blocks under one key. A record of 512 KiB has 2^15 blocks and one for
# the tag; a key used for 2^18 records covers less than 2^34 blocks, which keeps the distinguishing advantage (blocks^2 / 2^128)
# below 2^-60. Then both ends move to the next key by themselves, 128 GiB further on.
RECORDS_PER_KEY: Final = 1 << 18

# QEMU's migration stream (wire/). RAM blocks: a VM has one per memory device, ROM and video memory, some dozens in all.
WIRE_BLOCKS_MAX: Final = 4096
# A compressed multifd packet: QEMU's receiver keeps twice MULTIFD_PACKET_SIZE for it (multifd-zstd.c, multifd-zlib.c).
WIRE_PACKET_PAYLOAD_MAX: Final = 1 * MIB
# The machine's name in the stream; QEMU's own are some 20 bytes.
WIRE_MACHINE_NAME_MAX: Final = 1024
# Capabilities in the stream: QEMU sends those few that both ends must share.
WIRE_CAPABILITIES_MAX: Final = 256
# The description of devices at the end: some 100 KiB for a usual machine, more with many devices.
WIRE_VMDESCRIPTION_MAX: Final = 16 * MIB
# The largest element that a reader keeps until it is complete: all others are below 128 KiB.
WIRE_ELEMENT_MAX: Final = WIRE_VMDESCRIPTION_MAX
# Device state that `sealane debug explain-stream` keeps to walk it: some MiB for usual devices.
WIRE_DEVICE_STATE_MAX: Final = 256 * MIB
# Guest memory that `explain-stream --ram-digest` rebuilds: what a large host has; untouched pages of it cost nothing.
WIRE_REBUILD_MAX: Final = 64 * GIB
# Digests of pages that were sent: 20 bytes a page of 4096, so that 8 GiB stand for a guest of 1.6 TiB. Only pages that were sent
# while the line was the limit cost anything.
SEEN_MEMORY_MAX: Final = 8 * GIB

# Guest memory seen from outside (guest/). RAM of one VM: 4 TiB are 2^30 pages, for which classes and bitmaps take 1 GiB each.
GUEST_RAM_MAX: Final = 4096 * GIB
# Ranges of guest-physical addresses: a VM has some dozens; each memory device and each passed-through one adds a few.
GUEST_SEGMENTS_MAX: Final = 65536
# Virtual CPUs: QEMU's own bound for x86 machines.
GUEST_CPUS_MAX: Final = 4096
# One answer of QEMU's human monitor: registers of 4096 CPUs are some 20 MiB, other answers some KiB.
GUEST_TEXT_MAX: Final = 64 * MIB

# One part of a virtual TPM's state: libtpms keeps 128 KiB of NV memory, and some 10 KiB beside it.
VTPM_BLOB_MAX: Final = 512 * KIB
# What a VM's keeper may take: making a TPM needs seconds (two RSA keys), a TPM in the host some hundred ms a key.
VTPM_START_TIMEOUT_S: Final = 60.0
VTPM_ANSWER_TIMEOUT_S: Final = 15.0

# One message of libvirt's protocol from another host: a domain's XML is some 10 KiB and comes twice in one, and libvirt itself
# takes no string beyond 4 MiB (REMOTE_STRING_MAX).
RPC_MESSAGE_MAX: Final = 4 * MIB
# Typed parameters of a migration: libvirt has some 25, and takes 64 at most (REMOTE_DOMAIN_MIGRATE_PARAM_LIST_MAX).
RPC_PARAMETERS_MAX: Final = 64
# Calls that wait for libvirtd's reply: a migration makes one after the other.
RPC_CALLS_WAITING_MAX: Final = 8
# Disks of a domain that are copied; each takes a lane of its own.
COPIED_DISKS_MAX: Final = 8
# Making an image for one: qcow2's tables of some TiB are written within a second.
IMAGE_TIMEOUT_S: Final = 30.0
# How long libvirtd may take to answer what needs no work, and how often a job's end is looked for.
LIBVIRT_TIMEOUT_S: Final = 10.0
LIBVIRT_POLL_S: Final = 0.05
