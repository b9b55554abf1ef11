"""Between the agent and its quoting process: one SOCK_SEQPACKET pair, one JSON object a packet, descriptors beside it.

    agent    Configure                the first packet, once
    quoting  Ready, or Unready        the roots of trust answered, or why not
    agent    Serve + connection       an enclave's line; the quoting process answers on it until it is closed

The agent's end closing ends the process.
"""

import json
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sealane.errors import InternalError

PACKET_MAX = 64 * 1024
DriverName: TypeAlias = Literal["software", "tpm2", "simulated", "sgx", "tdx", "sev-snp"]


class _Packet(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Configure(_Packet):
    """Which roots of trust there are, where things lie, and what this host expects of peers. Paths may be empty.

    `started_ns` (since 1970) is before the launcher loads a file: what changes later may not be what it has loaded. `root` is
    in front of the kernel's files (`/sys`, `/proc`, `/dev`): `/` but in tests.
    """

    call: Literal["configure"] = "configure"
    drivers: list[DriverName]
    identity_key: str
    started_ns: int
    state: str
    run: str
    root: str = "/"
    tcti: str = ""
    pcr: int = 13
    simulated_root: str = ""
    boot_log: str = ""
    runtime_log: str = ""
    reference_values: str = ""
    reference_key: str = ""
    collateral: list[str] = []
    least_level: int = 1
    accepted_test_roots: list[str] = []


class Serve(_Packet):
    """Answer the enclave with this process id on the descriptor, and measure these binaries of QEMU for it."""

    call: Literal["serve"] = "serve"
    pid: int
    binaries: list[str] = []


class Ready(_Packet):
    """The roots of trust are there; for people."""

    call: Literal["ready"] = "ready"
    root_of_trust: str


class Unready(_Packet):
    """They are not; what enclaves ask is answered with this."""

    call: Literal["unready"] = "unready"
    code: str
    detail: str


Packet: TypeAlias = Configure | Serve | Ready | Unready
_ADAPTER: TypeAdapter[Packet] = TypeAdapter(Annotated[Packet, Field(discriminator="call")])


def encode_packet(packet: Packet) -> bytes:
    """As it travels; raises InternalError where it is too large."""
    data = packet.model_dump_json().encode()
    if len(data) > PACKET_MAX:
        raise InternalError("internal.error", f"{packet.call} of {len(data)} bytes")
    return data


def parse_packet(data: bytes) -> Packet:
    """Read one; raises InternalError."""
    try:
        return _ADAPTER.validate_python(json.loads(data))
    except (ValueError, ValidationError, RecursionError) as error:
        raise InternalError("internal.error", f"a packet that does not fit: {type(error).__name__}") from None
