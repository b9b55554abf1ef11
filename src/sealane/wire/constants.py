"""QEMU's numbers, under QEMU's names. Everything on the wire is big-endian.

Each group names the file of QEMU's source tree that it stands in. Values that a version added or dropped say so.
"""

from typing import Final

# The page that the stream counts in (TARGET_PAGE_SIZE); x86 has no other.
TARGET_PAGE_SIZE: Final = 4096

# migration/savevm.h, migration/qemu-file-types.h: the start of the stream and the types of its sections
QEMU_VM_FILE_MAGIC: Final = 0x5145564D
QEMU_VM_FILE_VERSION: Final = 3
QEMU_VM_EOF: Final = 0x00
QEMU_VM_SECTION_START: Final = 0x01
QEMU_VM_SECTION_PART: Final = 0x02
QEMU_VM_SECTION_END: Final = 0x03
QEMU_VM_SECTION_FULL: Final = 0x04
QEMU_VM_SUBSECTION: Final = 0x05
QEMU_VM_VMDESCRIPTION: Final = 0x06
QEMU_VM_CONFIGURATION: Final = 0x07
QEMU_VM_COMMAND: Final = 0x08
QEMU_VM_SECTION_FOOTER: Final = 0x7E

# migration/ram.c: what the low bits of a record's address say
RAM_SAVE_VERSION: Final = 4
RAM_SAVE_FLAG_FULL: Final = 0x01  # not sent by any version of today
RAM_SAVE_FLAG_ZERO: Final = 0x02
RAM_SAVE_FLAG_MEM_SIZE: Final = 0x04
RAM_SAVE_FLAG_PAGE: Final = 0x08
RAM_SAVE_FLAG_EOS: Final = 0x10
RAM_SAVE_FLAG_CONTINUE: Final = 0x20
RAM_SAVE_FLAG_XBZRLE: Final = 0x40
RAM_SAVE_FLAG_HOOK: Final = 0x80
RAM_SAVE_FLAG_COMPRESS_PAGE: Final = 0x100  # until 9.0
RAM_SAVE_FLAG_MULTIFD_FLUSH: Final = 0x200  # since 8.1
ENCODING_FLAG_XBZRLE: Final = 0x01
# what ends a block's bitmap on the return path (ram.c, RAMBLOCK_RECV_BITMAP_ENDING)
RAMBLOCK_RECV_BITMAP_ENDING: Final = 0x0123456789ABCDEF

# migration/savevm.c: commands on the main stream (enum qemu_vm_cmd)
MIG_CMD_OPEN_RETURN_PATH: Final = 1
MIG_CMD_PING: Final = 2
MIG_CMD_POSTCOPY_ADVISE: Final = 3
MIG_CMD_POSTCOPY_LISTEN: Final = 4
MIG_CMD_POSTCOPY_RUN: Final = 5
MIG_CMD_POSTCOPY_RAM_DISCARD: Final = 6
MIG_CMD_PACKAGED: Final = 7
MIG_CMD_ENABLE_COLO: Final = 8
MIG_CMD_POSTCOPY_RESUME: Final = 9
MIG_CMD_RECV_BITMAP: Final = 10
MIG_CMD_SWITCHOVER_START: Final = 11  # since 10.0

COMMAND_NAMES: Final = {
    MIG_CMD_OPEN_RETURN_PATH: "OPEN_RETURN_PATH",
    MIG_CMD_PING: "PING",
    MIG_CMD_POSTCOPY_ADVISE: "POSTCOPY_ADVISE",
    MIG_CMD_POSTCOPY_LISTEN: "POSTCOPY_LISTEN",
    MIG_CMD_POSTCOPY_RUN: "POSTCOPY_RUN",
    MIG_CMD_POSTCOPY_RAM_DISCARD: "POSTCOPY_RAM_DISCARD",
    MIG_CMD_PACKAGED: "PACKAGED",
    MIG_CMD_ENABLE_COLO: "ENABLE_COLO",
    MIG_CMD_POSTCOPY_RESUME: "POSTCOPY_RESUME",
    MIG_CMD_RECV_BITMAP: "RECV_BITMAP",
    MIG_CMD_SWITCHOVER_START: "SWITCHOVER_START",
}
# savevm.c, mig_cmd_args: the payload's length where it is fixed
COMMAND_LENGTHS: Final = {
    MIG_CMD_OPEN_RETURN_PATH: 0,
    MIG_CMD_PING: 4,
    MIG_CMD_POSTCOPY_LISTEN: 0,
    MIG_CMD_POSTCOPY_RUN: 0,
    MIG_CMD_PACKAGED: 4,
    MIG_CMD_POSTCOPY_RESUME: 0,
    MIG_CMD_SWITCHOVER_START: 0,
}

# migration/migration.h, migration.c: messages on the return path (enum mig_rp_message_type, rp_cmd_args)
MIG_RP_MSG_SHUT: Final = 1
MIG_RP_MSG_PONG: Final = 2
MIG_RP_MSG_REQ_PAGES_ID: Final = 3
MIG_RP_MSG_REQ_PAGES: Final = 4
MIG_RP_MSG_RECV_BITMAP: Final = 5
MIG_RP_MSG_RESUME_ACK: Final = 6
MIG_RP_MSG_SWITCHOVER_ACK: Final = 7  # since 8.1

RETURN_PATH_NAMES: Final = {
    MIG_RP_MSG_SHUT: "SHUT",
    MIG_RP_MSG_PONG: "PONG",
    MIG_RP_MSG_REQ_PAGES_ID: "REQ_PAGES_ID",
    MIG_RP_MSG_REQ_PAGES: "REQ_PAGES",
    MIG_RP_MSG_RECV_BITMAP: "RECV_BITMAP",
    MIG_RP_MSG_RESUME_ACK: "RESUME_ACK",
    MIG_RP_MSG_SWITCHOVER_ACK: "SWITCHOVER_ACK",
}
RETURN_PATH_LENGTHS: Final = {
    MIG_RP_MSG_SHUT: 4,
    MIG_RP_MSG_PONG: 4,
    MIG_RP_MSG_REQ_PAGES: 12,
    MIG_RP_MSG_RESUME_ACK: 4,
    MIG_RP_MSG_SWITCHOVER_ACK: 0,
}

# migration/multifd.c, multifd.h
MULTIFD_MAGIC: Final = 0x11223344
MULTIFD_VERSION: Final = 1
MULTIFD_PACKET_SIZE: Final = 512 * 1024
MULTIFD_FLAG_SYNC: Final = 1 << 0
MULTIFD_FLAG_COMPRESSION_MASK: Final = 0x1F << 1
MULTIFD_FLAG_NOCOMP: Final = 0 << 1
MULTIFD_FLAG_ZLIB: Final = 1 << 1
MULTIFD_FLAG_ZSTD: Final = 2 << 1
MULTIFD_FLAG_QPL: Final = 4 << 1  # since 9.1
MULTIFD_FLAG_UADK: Final = 8 << 1  # since 9.1
MULTIFD_FLAG_QATZIP: Final = 16 << 1  # since 9.2
MULTIFD_FLAG_DEVICE_STATE: Final = 32 << 1  # since 10.0

COMPRESSION_NAMES: Final = {
    MULTIFD_FLAG_NOCOMP: "none",
    MULTIFD_FLAG_ZLIB: "zlib",
    MULTIFD_FLAG_ZSTD: "zstd",
    MULTIFD_FLAG_QPL: "qpl",
    MULTIFD_FLAG_UADK: "uadk",
    MULTIFD_FLAG_QATZIP: "qatzip",
}
