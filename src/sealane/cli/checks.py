"""What `sealane doctor` looks at: each check says what it looked at, what it found and how to mend it."""

import asyncio
import contextlib
import importlib
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sealane.cli import format as words
from sealane.cli import probes
from sealane.cli.client import AgentClient
from sealane.cli.findings import Check, Context, Finding, Level, configured
from sealane.cli.trust_checks import check_expectations, check_roots
from sealane.crypto.aead import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Aead
from sealane.crypto.identity import load_identity
from sealane.crypto.tls import library_version, offered_group
from sealane.enclave.sandbox import MEASURES, why_not
from sealane.errors import SealaneError, make_error
from sealane.host.config import load_settings, load_vms
from sealane.host.migration.enclave_launcher import try_sandbox
from sealane.host.models import Host
from sealane.host.policy import load_policy
from sealane.host.receipts.verify import verify_chain
from sealane.host.skew import own_version
from sealane.libvirt import binding
from sealane.libvirt.machine import daemon_socket
from sealane.limits import GIB, KIB, MIB
from sealane.vtpm import swtpm
from sealane.vtpm.record import Records

# QEMU before 9.0 loses dirty pages under TCG (mended by QEMU's commit 03bfc2188f).
_TCG_TRUSTWORTHY: Final = (9, 0, 0)
_PREFERRED_GROUP: Final = "X25519MLKEM768"
_IDENTITY_WARNING_DAYS: Final = 30
_SPACE_BROKEN: Final = 16 * MIB  # the journal's writes must not fail in mid-hand-over
_SPACE_WARNING: Final = GIB // 4
_RATE_PROBE_S: Final = 0.15
_SWTPM_HANDS_OVER: Final = (0, 8, 0)


def examine(context: Context) -> Iterator[Finding]:
    """Make all checks, in the order of CHECKS; one that fails itself is a finding too."""
    for name, check in CHECKS.items():
        try:
            yield from check(context)
        except (SealaneError, OSError, ValueError, RuntimeError, ImportError) as error:
            mend = error.mend if isinstance(error, SealaneError) else "please report it"
            yield Finding(name, "warning", f"could not be looked at: {error}", mend)


def check_libvirt(context: Context) -> Iterator[Finding]:
    """Whether domains can be moved: libvirtd's socket, and libvirt's binding for Python. No libvirt is no fault."""
    for uri in load_settings(context.paths.config).libvirt:
        try:
            socket = daemon_socket(uri)
        except SealaneError:
            yield Finding("libvirt", "ok", f"no libvirtd for {uri} here")
            continue
        try:
            binding.load()
        except SealaneError as error:
            yield Finding("libvirt", "warning", f"{socket} is there, and {error.detail}", error.mend)
        else:
            yield Finding("libvirt", "ok", f"{uri}: {socket}")


def check_qemu(context: Context) -> Iterator[Finding]:
    """Which QEMU is here, whether it has multifd, and whether its TCG keeps track of dirty pages."""
    binaries = probes.qemu_binaries()
    if not binaries:
        yield Finding(
            "QEMU", "broken", "no qemu-system binary on PATH", "install qemu-system, or name one in SEALANE_QEMU"
        )
    without_kvm = ", and KVM is not usable here" if probes.kvm_problem() is not None else ""
    for path in binaries:
        try:
            qemu = probes.ask_qemu(path)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            yield Finding("QEMU", "broken", f"{path}: {error}", "is SEALANE_QEMU a working qemu-system binary?")
            continue
        shown = f"{qemu.shown_version} at {path}"
        if qemu.version < _TCG_TRUSTWORTHY:
            yield Finding(
                "QEMU",
                "warning",
                f"{shown}: before 9.0, QEMU loses dirty pages of guests that run under TCG{without_kvm}",
                "take a QEMU of 9.0 or later, or migrate only guests that run under KVM",
            )
        else:
            yield Finding("QEMU", "ok", shown)
        yield _multifd(qemu)


def _multifd(qemu: probes.Qemu) -> Finding:
    if qemu.capabilities is None:
        return Finding("multifd", "warning", f"{qemu.path} did not tell its capabilities", "run it with -machine none")
    if "multifd" in qemu.capabilities:
        return Finding("multifd", "ok", f"QEMU {qemu.shown_version} has it")
    return Finding("multifd", "warning", f"QEMU {qemu.shown_version} lacks it", "pages will share one lane")


def check_accelerator(context: Context) -> Iterator[Finding]:
    """Whether KVM opens; with --deep, whether a guest boots under it."""
    problem = probes.kvm_problem()
    if problem is not None:
        yield Finding(
            "accelerator",
            "warning",
            f"TCG: {problem}",
            "guests run emulated, slowly; load kvm_intel or kvm_amd, and add the user to the group kvm",
        )
        return
    if not context.deep:
        yield Finding("accelerator", "ok", "KVM: /dev/kvm opens (`--deep` boots a guest to be sure)")
        return
    yield _trial_boot()


def _trial_boot() -> Finding:
    try:
        accel: Any = importlib.import_module("sealane.testing.accel")
        qemu: Any = importlib.import_module("sealane.testing.qemu")
        chosen = accel.choose_accel("auto", qemu.find_qemu())
    except Exception as error:  # the rig has errors of its own; none of them is a fault of this host's set-up
        return Finding("accelerator", "warning", f"KVM opens; no trial boot: {error}", "see `./run setup`")
    if chosen.name == "kvm":
        return Finding("accelerator", "ok", f"KVM: {chosen.reason}")
    return Finding("accelerator", "warning", f"TCG: {chosen.reason}", "look at nested virtualisation of this machine")


_KERNEL_MENDS: Final = {
    "Landlock": "a kernel with CONFIG_SECURITY_LANDLOCK and `landlock` in lsm=",
    "seccomp": "a kernel with CONFIG_SECCOMP_FILTER",
    "userfaultfd": "only --on-stall postcopy towards this host needs it: run QEMU as root, let its user open /dev/userfaultfd, or "
    "set vm.unprivileged_userfaultfd=1 (and a kernel with CONFIG_USERFAULTFD)",
    "pidfd": "Linux 5.3 or later",
    "tun": "load the module tun; only guests with tap devices need it",
}


def check_kernel(context: Context) -> Iterator[Finding]:
    """The kernel's features that harden an enclave or that guests need; none is indispensable for a migration."""
    abi = probes.landlock_abi()
    yield (
        Finding("Landlock", "ok", f"ABI {abi}")
        if abi
        else Finding("Landlock", "warning", "not available", _KERNEL_MENDS["Landlock"])
    )
    yield _hidden_memory()
    for name, probe in probes.KERNEL_PROBES.items():
        problem = probe()
        if problem is None:
            yield Finding(name, "ok", "available")
        else:
            yield Finding(name, "warning", problem, _KERNEL_MENDS[name])


def _hidden_memory() -> Finding:
    """What holds of the keys' memory: OpenSSL and Python copy every key to places of their own (ADR 0010)."""
    problem = probes.memfd_secret_problem()
    kernel = "which this kernel has" if problem is None else f"which this kernel has not: {problem}"
    found = f"not used ({kernel}): keys lie in the enclave's ordinary memory, closed to other users and processes, open to root"
    return Finding("memfd_secret", "warning", found, "see `sandbox memory` for what keeps keys out of the swap")


_SANDBOX_MENDS: Final = {
    "user": "run the agent as root, and make a system user: `systemd-sysusers` with packaging/sealane-sysusers.conf",
    "capabilities": "see which capabilities the agent is started with",
    "privileges": "a kernel with no_new_privs (Linux 3.5)",
    "dumpable": "please report it",
    "memory": "give the agent LimitMEMLOCK=infinity, or root with CAP_SYS_RESOURCE; else encrypt the swap, or have none",
    "descriptors": "please report it",
    "limits": "let the agent raise no limits of its children: see the unit's Limit lines",
    "files": _KERNEL_MENDS["Landlock"],
    "network": "Linux 6.7 or later, with Landlock",
    "signals": "Linux 6.12 or later, with Landlock",
    "calls": "install libseccomp (Debian: libseccomp2), on " + _KERNEL_MENDS["seccomp"],
}


def check_sandbox(context: Context) -> Iterator[Finding]:
    """Which measures hold for an enclave that this user starts here: one is started, asked, and ended."""
    settings = configured(context)
    measures = asyncio.run(try_sandbox(settings.enclave_user))
    refused = {reason.partition(":")[0] for reason in why_not(measures, settings.sandbox)}
    for name in MEASURES:
        if why := measures[name]:
            yield Finding(f"sandbox {name}", "broken" if name in refused else "warning", why, _SANDBOX_MENDS[name])
        else:
            yield Finding(f"sandbox {name}", "ok", "holds")


def check_configuration(context: Context) -> Iterator[Finding]:
    """Whether agent.toml and vms.toml can be read."""
    config = context.paths.config
    try:
        load_settings(config)
        vms = load_vms(config / "vms.toml")
    except SealaneError as error:
        yield Finding("configuration", "broken", error.detail, error.mend)
        return
    present = [name for name in ("agent.toml", "vms.toml") if (config / name).exists()]
    told = f"{', '.join(present)} in {config}" if present else f"none in {config}: the defaults"
    yield Finding("configuration", "ok", f"{told}; {len(vms)} VMs from it" if vms else told)


def check_policy(context: Context) -> Iterator[Finding]:
    """Whether the policy can be read: one that cannot allows nothing."""
    try:
        policy = load_policy(context.paths.config)
    except SealaneError as error:
        yield Finding("policy", "broken", f"nothing is allowed: {error.detail}", error.mend)
        return
    if policy.source == "default":
        yield Finding(
            "policy", "ok", "the default: any VM, between hosts that trust each other, by the protections that are set"
        )
        return
    names = ", ".join(name for name, _ in policy.texts)
    if not any(each.effect == "permit" for each in policy.named):
        yield Finding("policy", "warning", f"{names or 'no .cedar file'}: nothing is permitted", "add a permit")
        return
    yield Finding("policy", "ok", f"{names} ({len(policy.named) - 1} policies, sha256:{policy.digest[:12]}…)")


def check_receipts(context: Context) -> Iterator[Finding]:
    """Whether the receipts hold."""
    try:
        report = verify_chain(context.paths)
    except SealaneError as error:
        yield Finding("receipts", "warning", error.detail, error.mend)
        return
    if report.problems:
        more = f", and {len(report.problems) - 1} more" if len(report.problems) > 1 else ""
        yield Finding("receipts", "warning", f"{report.problems[0].words}{more}", "see `sealane receipts verify`")
        return
    yield Finding("receipts", "ok", f"{len(report.items)}, each in its place" if report.items else "none yet")


def check_agent(context: Context) -> Iterator[Finding]:
    """Whether the agent answers, and whether the port is free or its own."""
    agent: Host | None = None
    try:
        with AgentClient(context.paths.agent_socket, timeout_s=5) as client:
            agent, version = client.host(), client.agents_version()
        if version == own_version():
            under_way = f"{agent.migrations_active} migrations under way"
            yield Finding("agent", "ok", f"{agent.name} {agent.version}, {under_way}")
        else:
            told = f"{agent.name} runs Sealane {version or agent.version}, this command line is {own_version()}"
            yield Finding("agent", "warning", told, "if it was upgraded: `systemctl restart sealane`; VMs run on")
        if agent.root_of_trust.startswith("none:"):
            mend = "see `root of trust` above and the agent's log; no migration is attested until it answers"
            yield Finding("agent's root of trust", "broken", agent.root_of_trust, mend)
    except SealaneError as error:
        yield Finding("agent", "warning", error.detail, error.mend)
    settings = configured(context)
    if settings.port == 0:
        yield Finding("port", "warning", "any free one is taken", "set `port`, so that peers find it")
        return
    shown = words.show_address(settings.listen, settings.port)
    problem = probes.port_holder(settings.listen, settings.port)
    if problem is None:
        held = agent is None
        yield Finding(
            "port", "ok", f"{shown} is free" if held else f"{shown} is free; the agent is at {agent_at(agent)}"
        )
    elif agent is not None and agent.listen.rpartition(":")[2] == str(settings.port):
        yield Finding("port", "ok", f"{shown} is held by our agent")
    else:
        yield Finding("port", "broken", f"{shown}: {problem}", make_error("host.port").mend)


def agent_at(agent: Host | None) -> str:
    """Where the agent listens."""
    return "-" if agent is None else agent.listen


def check_directories(context: Context) -> Iterator[Finding]:
    """Who may read and write the state, run and configuration directories."""
    for name, path, needed in (
        ("state directory", context.paths.state, True),
        ("run directory", context.paths.run, True),
        ("configuration directory", context.paths.config, False),
    ):
        yield _directory(name, path, needed=needed)


def _directory(name: str, path: Path, *, needed: bool) -> Finding:
    try:
        found = path.stat()
    except FileNotFoundError:
        told = f"{path} is not there yet"
        if needed and not os.access(_nearest(path), os.W_OK):
            return Finding(
                name, "broken", f"{told} and cannot be made by this user", make_error("host.permission").mend
            )
        return Finding(name, "ok", told)
    except OSError as error:
        return Finding(name, "broken", f"{path}: {error.strerror}", make_error("host.permission").mend)
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        return Finding(name, "broken", f"{path} is not a directory", "move it away")
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return Finding(name, "broken", f"{path} is writable for everyone ({mode:04o})", f"chmod o-w {path}")
    if needed and not os.access(path, os.W_OK | os.X_OK):
        return Finding(name, "broken", f"{path} is not writable for this user", make_error("host.permission").mend)
    return Finding(name, "ok", f"{path} ({mode:04o})")


def _nearest(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


def check_identity(context: Context) -> Iterator[Finding]:
    """Whether this host has an identity, for how long, and whether its key is its own."""
    try:
        identity = load_identity(context.paths)
    except SealaneError as error:
        yield Finding("identity", "broken", error.detail, error.mend)
        return
    now = datetime.now(UTC)
    days = (identity.not_after - now).days
    mode = stat.S_IMODE(context.paths.identity_key.stat().st_mode)
    renew = "run `sealane init --renew`, and trust the new fingerprint on the other hosts"
    if mode & 0o077:
        mend = f"chmod 600 {context.paths.identity_key}"
        yield Finding("identity", "broken", f"others can read the key ({mode:04o})", mend)
    elif now < identity.not_before:
        yield Finding(
            "identity", "broken", f"not valid before {identity.not_before:%Y-%m-%d %H:%M} UTC", "set the clock"
        )
    elif days < 0:
        yield Finding("identity", "broken", f"expired on {identity.not_after:%Y-%m-%d}", renew)
    elif days < _IDENTITY_WARNING_DAYS:
        yield Finding("identity", "warning", f"{identity.name}, {days} days left", renew)
    else:
        yield Finding(
            "identity", "ok", f"{identity.name} {identity.fingerprint}, {days} days left (its key lies in a file)"
        )


def check_space(context: Context) -> Iterator[Finding]:
    """Room for the journal."""
    path = context.paths.state if context.paths.state.exists() else _nearest(context.paths.state)
    found = os.statvfs(path)
    free = found.f_bavail * found.f_frsize
    level: Level = "broken" if free < _SPACE_BROKEN else "warning" if free < _SPACE_WARNING else "ok"
    mend = "" if level == "ok" else f"free some space on the file system of {path}"
    yield Finding("free space", level, f"{words.memory_bytes(free)} at {path}", mend)


def check_clock(context: Context) -> Iterator[Finding]:
    """Whether the time can be true: certificates depend on it."""
    newest = Path(__file__).stat().st_mtime
    if time.time() < newest - 86_400:
        yield Finding(
            "clock", "broken", f"it says {datetime.now(UTC):%Y-%m-%d}, before Sealane was installed", "set it"
        )
        return
    synchronised = probes.clock_is_synchronised()
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if synchronised is False:
        mend = "run a time service (chrony, systemd-timesyncd) where certificates' dates matter"
        yield Finding("clock", "warning", f"{now}; no time service keeps it", mend)
    else:
        yield Finding("clock", "ok", now)


def check_cipher(context: Context) -> Iterator[Finding]:
    """The processor's AES instructions, and the rate of AES-256-GCM on one core."""
    flags = probes.processor_flags()
    present = [name for name in ("aes", "vaes", "pclmulqdq", "vpclmulqdq", "pmull") if name in flags]
    rate = words.network_bytes(_aead_rate())
    if "aes" in flags:
        yield Finding("AES-256-GCM", "ok", f"{rate}/s on one core, with {', '.join(present)}")
    else:
        yield Finding(
            "AES-256-GCM",
            "warning",
            f"{rate}/s on one core, without AES instructions",
            "migrations will be bound by the processor; in a VM, pass the host's CPU flags through",
        )


def _aead_rate() -> float:
    """Bytes per second of sealing 256 KiB records for a short while, key and data from nowhere that matters."""
    cipher = Aead(os.urandom(KEY_BYTES))
    record = bytes(256 * KIB)
    sealed = bytearray(len(record) + TAG_BYTES)
    count = 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < _RATE_PROBE_S:
        count += 1
        cipher.seal_into(count.to_bytes(NONCE_BYTES, "big"), record, b"", sealed)
    return count * len(record) / passed


def check_vtpm(context: Context) -> Iterator[Finding]:
    """Which swtpm is here for VMs with a TPM of their own, what it cannot do, and what the keys of their files are under.

    What is missing is broken where a VM needs it.
    """
    in_host_tpm = "tpm2" in load_settings(context.paths.config).attestation.drivers
    with_tpm = _vms_with_tpm(context)
    lacking: Level = "broken" if with_tpm else "ok"
    needed = (
        f"; {', '.join(with_tpm[:3])} cannot live here" if with_tpm else ": no VM with a TPM of its own can live here"
    )
    try:
        found = swtpm.version()
    except SealaneError as error:
        yield Finding("swtpm", lacking, f"{error.detail}{needed}", "for such VMs install swtpm, swtpm-tools")
        return
    limits = "" if found >= _SWTPM_HANDS_OVER else "; no hand-over of its lock on shared storage, which is not used"
    yield Finding("swtpm", "ok", f"{'.'.join(map(str, found))}{limits}")
    tools = {"swtpm_setup": "swtpm-tools"} | ({"tpm2_nvread": "tpm2-tools"} if in_host_tpm else {})
    for tool, package in tools.items():
        if shutil.which(tool) is None:
            yield Finding("swtpm", lacking, f"{tool} is missing{needed}", f"install {package}")
    if in_host_tpm:
        yield Finding("vTPM keys", "ok", "sealed in the host's TPM")
    else:
        mend = "with a TPM in this host, add tpm2 to `attestation.drivers`"
        yield Finding("vTPM keys", "ok", "in files of the agent's: whoever copies its state directory has them", mend)


def _vms_with_tpm(context: Context) -> list[str]:
    """Those that have one here, and those that vms.toml gives one."""
    records = Records(context.paths.state / "vtpm")
    found = set(records.names())
    with contextlib.suppress(SealaneError):
        found = {name for name in found if (record := records.find(name)) is not None and record.status != "gone"}
        found |= {vm.name for vm in load_vms(context.paths.config / "vms.toml") if vm.vtpm is not None}
    return sorted(found)


def check_tls(context: Context) -> Iterator[Finding]:
    """The TLS library, and the key exchange that two hosts like this one agree on."""
    with contextlib.suppress(SealaneError):
        group = offered_group(load_identity(context.paths))
        if group == _PREFERRED_GROUP:
            yield Finding("TLS", "ok", f"{library_version()}, {group}")
        else:
            mend = "bring OpenSSL to 3.5 or later (it comes with the Python package cryptography)"
            yield Finding("TLS", "warning", f"{library_version()}, {group}: not post-quantum", mend)
        return
    yield Finding("TLS", "ok", f"{library_version()} (key exchange not tried: no identity)")


CHECKS: Final[dict[str, Check]] = {
    "QEMU": check_qemu,
    "accelerator": check_accelerator,
    "kernel": check_kernel,
    "sandbox": check_sandbox,
    "TLS": check_tls,
    "AES-256-GCM": check_cipher,
    "identity": check_identity,
    "directories": check_directories,
    "free space": check_space,
    "clock": check_clock,
    "swtpm": check_vtpm,
    "libvirt": check_libvirt,
    "configuration": check_configuration,
    "root of trust": check_roots,
    "expectations": check_expectations,
    "policy": check_policy,
    "receipts": check_receipts,
    "agent": check_agent,
}
