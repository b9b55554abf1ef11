"""A software TPM as a simulated host's TPM, and a boot of that host: events and files are measured into its PCRs as firmware
and kernel would, and the logs of both lie where the host's settings say.

It is a simulation: whoever runs this process can make such a TPM say anything. Verdicts name it as software.
"""

import hashlib
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sealane.attest.tpm import parse_tpm_public
from sealane.quoting.drivers.tpm2 import Tpm2Driver
from sealane.quoting.enrolment import challenge
from sealane.quoting.interface import Configure
from sealane.testing.hosts import BackgroundProcess, SimulatedHost
from sealane.testing.problems import RigError

_SETUP_TIMEOUT_S: Final = 60.0
_SHA256: Final = 0x000B
_IMA_PCR: Final = 10
_EVENTS: Final[tuple[tuple[int, int, bytes], ...]] = (
    (0, 0x08, "simulated firmware\0".encode("utf-16-le")),
    (
        7,
        0x80000001,
        bytes(16) + struct.pack("<QQ", 10, 1) + "SecureBoot".encode("utf-16-le") + b"\x01",
    ),
    *((pcr, 0x04, bytes(4)) for pcr in range(8)),
    (4, 0x80000003, b"simulated loader"),
    (8, 0x0D, b"simulated kernel command line"),
    (9, 0x0D, b"simulated initrd"),
)


@dataclass
class HostTpm:
    """One host's TPM; `tcti` and the two logs go into its `agent.toml`, `files` are the digests of what it has run.

    `key` is the digest of its attestation key, which credential activation has shown to be in that TPM.
    """

    tcti: str
    boot_log: Path
    runtime_log: Path
    files: list[str]
    key: str
    process: BackgroundProcess

    def settings(self) -> str:
        """The lines of `agent.toml`."""
        return f'drivers = ["tpm2"]\ntcti = "{self.tcti}"\nboot_log = "{self.boot_log}"\nruntime_log = "{self.runtime_log}"\n'


def boot_with_tpm(host: SimulatedHost, measured: Sequence[Path]) -> HostTpm:
    """Make a TPM, start it, and boot: the firmware's events, then the kernel's measurement of these files. Raises RigError."""
    state = host.scratch / "tpm"
    state.mkdir(mode=0o700)
    words = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--createek", "--pcr-banks", "sha256"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_SETUP_TIMEOUT_S, check=False)
    if done.returncode:
        raise RigError(f"swtpm_setup: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    socket = state / "s"
    process = host.start(
        "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "startup-clear",
        "--server", f"type=unixio,path={socket}", "--ctrl", f"type=unixio,path={socket}.ctrl",
    )  # fmt: skip
    process.wait_until(lambda: socket.exists() and Path(f"{socket}.ctrl").exists(), "its sockets")
    tpm = HostTpm(f"swtpm:path={socket}", host.scratch / "boot-log", host.scratch / "ima-log", [], "", process)
    _boot(tpm, host, measured)
    return tpm


def _boot(tpm: HostTpm, host: SimulatedHost, measured: Sequence[Path]) -> None:
    empty = Configure(
        drivers=["tpm2"], identity_key="", started_ns=0, state=str(host.scratch), run=str(host.scratch), tcti=tpm.tcti
    )
    driver = Tpm2Driver(empty)
    credential, secret = challenge(driver.endorsement_key(), driver.public)
    if driver.activate(credential) != secret:
        raise RigError("the TPM does not have the key that it shows")
    tpm.key = parse_tpm_public(driver.public).key.digest
    tpm.boot_log.write_bytes(_event_log())
    driver.extend_all([(pcr, _measured(kind, data)) for pcr, kind, data in _EVENTS])
    boot = [bytes.fromhex(value) for (value,) in driver.boot_values().values()]
    entries = [("boot_aggregate", hashlib.sha256(b"".join(boot)).digest())]
    entries += [(str(path), hashlib.sha256(path.read_bytes()).digest()) for path in measured]
    fields = [_template(name, digest) for name, digest in entries]
    lines = [
        f"{_IMA_PCR} {hashlib.sha1(each, usedforsecurity=False).hexdigest()} ima-ng sha256:{digest.hex()} {name}\n"
        for each, (name, digest) in zip(fields, entries, strict=True)
    ]
    tpm.runtime_log.write_text("".join(lines))
    driver.extend_all([(_IMA_PCR, hashlib.sha256(each).digest()) for each in fields])
    tpm.files += [f"sha256:{digest.hex()}" for _, digest in entries[1:]]


def _measured(kind: int, data: bytes) -> bytes:
    """What an event extends: its data's digest, or for code and commands that of what the data only describes."""
    return hashlib.sha256(b"image of " + data if kind in {0x0D, 0x80000003} else data).digest()


def _event_log() -> bytes:
    """TCG PC Client PFP, section 10: the Spec ID event, then the events, with SHA-256 digests."""
    spec = b"Spec ID Event03\0" + struct.pack("<I4BIHHB", 0, 0, 2, 0, 2, 1, _SHA256, 32, 0)
    log = struct.pack("<II20xI", 0, 3, len(spec)) + spec
    for pcr, kind, data in _EVENTS:
        log += struct.pack("<IIIH", pcr, kind, 1, _SHA256) + _measured(kind, data) + struct.pack("<I", len(data)) + data
    return log


def _template(name: str, digest: bytes) -> bytes:
    """The fields of an `ima-ng` entry, as its template digest covers them."""
    parts = (b"sha256:\0" + digest, name.encode() + b"\0")
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)
