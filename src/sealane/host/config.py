"""The agent's settings: `agent.toml` and `vms.toml` in the configuration directory, then the command line.

Every key stands once, as a field below, with its description; the reference documentation is made of them. An unknown key
or an unfitting value is an error that names the file and the line.
"""

import re
import socket
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import Field, ValidationError

from sealane import limits
from sealane.errors import make_error
from sealane.host.limits import PeerLimits, VmLimits, least_rate
from sealane.host.models import Model, Name, Protection, VmDefinition

AGENT_FILE: Final = "agent.toml"
VMS_FILE: Final = "vms.toml"

M = TypeVar("M", bound=Model)
RootName = Literal["software", "tpm2", "simulated", "sgx", "tdx", "sev-snp"]


def _default_name() -> str:
    """The host's name without its domain, with nothing in it that a name may not have."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().partition(".")[0]).lstrip("._-")[:64] or "host"


class LimitSettings(Model):
    """Caps that a large host may want to move; the others are fixed in `sealane.limits`, each with its reason."""

    migrations_max: Annotated[int, Field(ge=1, le=256, description="Migrations in progress, in and out together.")] = (
        limits.MIGRATIONS_MAX
    )
    migrations_per_peer_max: Annotated[
        int, Field(ge=1, le=256, description="Migrations in progress that come from one peer.")
    ] = limits.MIGRATIONS_PER_PEER_MAX
    outgoing_max: Annotated[
        int, Field(ge=1, le=256, description="Migrations in progress to other hosts; the others wait in the queue.")
    ] = limits.OUTGOING_MAX
    outgoing_per_peer_max: Annotated[
        int, Field(ge=1, le=256, description="Migrations in progress to one peer; the others wait in the queue.")
    ] = limits.OUTGOING_MAX
    queue_max: Annotated[int, Field(ge=0, le=65536, description="Migrations that may wait in the queue.")] = (
        limits.QUEUE_MAX
    )
    rate_max_bytes_per_s: Annotated[
        int, Field(ge=0, description="Rate of one migration to another host, in bytes a second; 0 is no bound.")
    ] = 0
    total_rate_max_bytes_per_s: Annotated[
        int,
        Field(
            ge=0,
            description="Rate of all migrations to other hosts together, in bytes a second, shared fairly; 0 is no bound. "
            "`sealane rate` changes it while the agent runs.",
        ),
    ] = 0
    time_max_s: Annotated[
        float,
        Field(
            gt=0,
            le=604_800,
            description="How long a migration may take before the hand-over, in or out, without the queue; then it is aborted.",
        ),
    ] = limits.MIGRATION_TIME_MAX_S
    wishes_per_peer_per_minute: Annotated[
        int, Field(ge=1, le=100_000, description="Migrations that one peer may ask this host for in a minute.")
    ] = limits.WISHES_PER_PEER_PER_MINUTE
    refusals_per_peer_per_hour: Annotated[
        int,
        Field(
            ge=1, le=100_000, description="Refused wishes of one peer that are journalled, with a receipt, in an hour."
        ),
    ] = limits.REFUSALS_PER_PEER_PER_HOUR
    stall_timeout_s: Annotated[
        float, Field(gt=0, le=3600, description="How long no byte may cross the lanes before a copy is given up.")
    ] = limits.STALL_TIMEOUT_S
    stop_grace_s: Annotated[
        float, Field(ge=0, le=3600, description="How long a stopping agent lets migrations end before it aborts them.")
    ] = limits.STOP_GRACE_S
    qmp_timeout_s: Annotated[float, Field(gt=0, le=600, description="How long QEMU may take to answer a command.")] = (
        limits.QMP_TIMEOUT_S
    )
    ask_first_pause_s: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="A source in doubt asks the destination at once, and again after so long; the pause doubles each time.",
        ),
    ] = limits.ASK_FIRST_PAUSE_S
    word_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=600,
            description="How long the other end's last word before the hand-over may take, while the VM is paused.",
        ),
    ] = limits.WORD_TIMEOUT_S
    launch_timeout_s: Annotated[
        float, Field(gt=0, le=3600, description="How long a launched QEMU may take to answer for the first time.")
    ] = limits.LAUNCH_TIMEOUT_S
    peers: Annotated[
        dict[Name, PeerLimits], Field(description="Other limits for single peers: `[limits.peers.NAME]`, see below.")
    ] = Field(default_factory=dict)
    vms: Annotated[
        dict[Name, VmLimits], Field(description="Other limits for single VMs: `[limits.vms.NAME]`, see below.")
    ] = Field(default_factory=dict)

    def outgoing_to(self, peer: str) -> tuple[int, str]:
        """How many migrations may be in progress to this peer, and the key that says so."""
        own = self.peers.get(peer, PeerLimits()).outgoing_max
        if own is not None:
            return own, f"limits.peers.{peer}.outgoing_max"
        return self.outgoing_per_peer_max, "limits.outgoing_per_peer_max"

    def incoming_from(self, peer: str) -> int:
        """How many migrations may be in progress from this peer."""
        return self.peers.get(peer, PeerLimits()).incoming_max or self.migrations_per_peer_max

    def rate_for(self, vm: str, peer: str) -> int:
        """The rate of one migration of this VM to this peer, in bytes a second; 0 is no bound."""
        of_peer, of_vm = self.peers.get(peer, PeerLimits()), self.vms.get(vm, VmLimits())
        return least_rate(
            *(
                self.rate_max_bytes_per_s if own is None else own
                for own in (of_peer.rate_max_bytes_per_s, of_vm.rate_max_bytes_per_s)
            )
        )

    def priority_of(self, vm: str) -> int:
        """Where this VM stands in the queue, unless the request says otherwise."""
        return self.vms.get(vm, VmLimits()).priority

    def time_for(self, vm: str) -> float:
        """How long a migration of this VM may take, in seconds."""
        return self.vms.get(vm, VmLimits()).time_max_s or self.time_max_s


class AttestationSettings(Model):
    """What this host shows to peers, and what it wants of them."""

    drivers: Annotated[
        list[RootName],
        Field(min_length=1, description="Roots of trust that sign for this host; `software` says who it is, no more."),
    ] = Field(default_factory=lambda: list[RootName](["software"]))
    least_level: Annotated[
        int, Field(ge=1, le=4, description="The least trust level of peers (docs/attestation.md); 1 is identity alone.")
    ] = 1
    reference_values: Annotated[str, Field(description="File of reference values for peers; empty expects none.")] = ""
    reference_key: Annotated[
        str, Field(description="Ed25519 public key (PEM) under which that file has to be signed; empty: unsigned.")
    ] = ""
    collateral: Annotated[
        list[str],
        Field(description="Files of collateral for peers with SGX, TDX or SEV-SNP, as `attest verify` takes them."),
    ] = Field(default_factory=list)
    accepted_test_roots: Annotated[
        list[str],
        Field(
            description="Test roots of the reference file that count too, for tests only; `software-tpm` for software TPMs."
        ),
    ] = Field(default_factory=list)
    tpm_roots: Annotated[
        list[str],
        Field(
            description="Files of TPM makers' root (and intermediate) certificates: TPMs whose EK certificate leads to one count "
            "as hardware when they are paired or enrolled."
        ),
    ] = Field(default_factory=list)
    tcti: Annotated[
        str,
        Field(max_length=256, description="Where the TPM is, as tpm2-tools have it; empty is `device:/dev/tpmrm0`."),
    ] = ""
    pcr: Annotated[int, Field(ge=8, le=15, description="The PCR that Sealane's own log extends.")] = 13
    boot_log: Annotated[str, Field(description="The firmware's event log; empty is the kernel's usual place.")] = ""
    runtime_log: Annotated[str, Field(description="IMA's log; empty is the kernel's usual place.")] = ""
    simulated_root: Annotated[
        str, Field(description="Directory of the `simulated` driver's test root, for tests only.")
    ] = ""
    again_every_s: Annotated[float, Field(gt=0, description="How often both ends of a long copy attest anew.")] = (
        limits.REATTEST_EVERY_S
    )


class AuthoritySettings(Model):
    """A fleet's CA: what its own host does, and what hosts that trust it accept."""

    passphrase_file: Annotated[
        str, Field(description="On the CA's host: file with the passphrase of the CA's key; empty where it has none.")
    ] = ""
    certificate_hours: Annotated[
        float, Field(gt=0, le=24 * 90, description="On the CA's host: how long a host certificate is good.")
    ] = 24.0
    list_hours: Annotated[
        float, Field(gt=0, le=24 * 90, description="On the CA's host: by when its next revocation list comes.")
    ] = 24.0
    stale_list: Annotated[
        Literal["refuse", "accept"],
        Field(description="What becomes of a peer where the revocation list is older than it should be."),
    ] = "refuse"
    news_every_s: Annotated[
        float, Field(ge=1, le=86_400, description="How often a host asks its CA for the revocation list and the fleet.")
    ] = 300.0


class Settings(Model):
    """The keys of `agent.toml`."""

    name: Annotated[Name, Field(description="What this host is called; its short host name by default.")] = Field(
        default_factory=_default_name
    )
    listen: Annotated[
        str, Field(min_length=1, description="Address to listen on for peers; `::` is all, of IPv6 and IPv4.")
    ] = "::"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port for peers; 0 takes any free one (tests).")] = (
        limits.DEFAULT_PORT
    )
    congestion_control: Annotated[
        str,
        Field(
            max_length=15,
            pattern=r"^[a-z0-9_]*$",
            description="TCP congestion control of lanes where the kernel has it; empty keeps the system's.",
        ),
    ] = limits.CONGESTION_CONTROL
    allowed_protections: Annotated[
        tuple[Protection, ...],
        Field(
            min_length=1,
            description="Protections that VMs may leave and come by; all but `sealed` leave a part of the VM readable.",
        ),
    ] = ("sealed",)
    sandbox: Annotated[
        Literal["strict", "required", "best-effort"],
        Field(
            description="What an enclave's sandbox must have: `required` what every kernel gives to every user, "
            "`strict` also its own user, no capabilities and Landlock, `best-effort` nothing."
        ),
    ] = "required"
    enclave_user: Annotated[
        str,
        Field(
            min_length=1,
            description="The user that enclaves become where the agent is root; uid 60900 where the default does not exist.",
        ),
    ] = "sealane-enclave"
    libvirt: Annotated[
        tuple[Literal["qemu:///system", "qemu:///session"], ...],
        Field(description="libvirtd whose domains are VMs here, where there is one; an empty list looks at none."),
    ] = ("qemu:///system",)
    storage_directories: Annotated[
        tuple[Annotated[str, Field(pattern=r"^/")], ...],
        Field(
            description="Where this host makes files for disks that are copied to it (`--copy-storage`), and expects their backing "
            "files; an empty list takes no copied disks."
        ),
    ] = ("/var/lib/libvirt/images",)
    log: Annotated[
        Literal["auto", "json", "text"], Field(description="Log format; auto is text on a terminal and JSON elsewhere.")
    ] = "auto"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="The least severe lines that are written.")
    ] = "info"
    limits: LimitSettings = LimitSettings()
    attestation: AttestationSettings = AttestationSettings()
    authority: AuthoritySettings = AuthoritySettings()


class _VmsFile(Model):
    vm: list[VmDefinition] = Field(default_factory=list)


def documented_keys() -> Iterator[tuple[str, str, str]]:
    """Each key of `agent.toml` with its default and its description, as (key, default, description)."""
    models: Sequence[tuple[str, type[Model]]] = (
        ("", Settings),
        ("limits.", LimitSettings),
        ("limits.peers.NAME.", PeerLimits),
        ("limits.vms.NAME.", VmLimits),
        ("attestation.", AttestationSettings),
        ("authority.", AuthoritySettings),
    )
    for prefix, model in models:
        for name, field in model.model_fields.items():
            if name not in {"limits", "attestation", "authority"}:
                default = "the host's" if field.default is None else str(field.default)
                if field.default_factory:
                    default = "the host's name" if name == "name" else str(field.get_default(call_default_factory=True))
                if isinstance(field.default, tuple):
                    default = str(list(field.default))
                yield prefix + name, default, field.description or ""


def load_settings(config_dir: Path, overrides: Mapping[str, object] | None = None) -> Settings:
    """`agent.toml` (defaults where there is none), with the command line's values over it; None overrides nothing."""
    path = config_dir / AGENT_FILE
    text = _read(path)
    given = _validate(Settings, path, text)
    values = {key: value for key, value in (overrides or {}).items() if value is not None}
    try:
        return Settings.model_validate({**given.model_dump(), **values})
    except ValidationError as error:
        raise make_error("usage.argument", _sentence(error.errors()[0])) from None


def load_vms(path: Path) -> list[VmDefinition]:
    """The `[[vm]]` tables of `vms.toml`; an empty list where there is no file."""
    text = _read(path)
    vms = _validate(_VmsFile, path, text).vm
    for index, vm in enumerate(vms):
        for what, earlier in (("name", [v.name for v in vms[:index]]), ("qmp", [v.qmp for v in vms[:index]])):
            if getattr(vm, what) in earlier:
                line = _line_of(text, ("vm", index, what))
                raise make_error("usage.configuration", f"{path} line {line}: a second VM with that {what}")
    return vms


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise make_error("usage.configuration", f"{path}: {reason}") from error


def _validate(model: type[M], path: Path, text: str) -> M:
    try:
        return model.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise make_error("usage.configuration", f"{path}: {error}") from None
    except ValidationError as error:
        first: Any = error.errors()[0]
        line = _line_of(text, first["loc"])
        raise make_error("usage.configuration", f"{path} line {line}: {_sentence(first)}") from None


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}"


_HEADER: Final = re.compile(r"^\s*\[{1,2}\s*([A-Za-z0-9_.\"' -]+?)\s*\]{1,2}")
_KEY: Final = re.compile(r"^\s*[\"']?([A-Za-z0-9_-]+)[\"']?\s*[.=]")


def _line_of(text: str, location: Sequence[int | str]) -> int:
    """The line where the key at `location` stands, or the nearest table above it; tomllib keeps no positions."""
    names = [part for part in location if isinstance(part, str)]
    index = next((part for part in location if isinstance(part, int)), 0)
    table, seen, nearest = "", -1, 1
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = header[1]
            seen += table == names[0]
            if table == names[0] and seen == index:
                nearest = number
        elif key := _KEY.match(line):
            in_top = not table and key[1] == names[0]
            in_table = len(names) > 1 and table == names[0] and seen == index and key[1] == names[1]
            if in_top or in_table:
                return number
    return nearest
