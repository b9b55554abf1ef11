"""The quoting process's loop: the agent's packets, and the questions of enclaves, one after another.

An enclave's line is a socket pair that the agent made, with SO_PASSCRED at this end; who speaks on it is what the kernel says,
and has to be the process that the agent named. An enclave whose files changed since they were measured gets no evidence.
"""

import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sealane.attest.asking import (
    QUESTION_MAX,
    ActivationAsked,
    Cutter,
    EvidenceAsked,
    PolicyWanted,
    Question,
    encode_answer,
    parse_question,
)
from sealane.attest.known import KNOWN_HOSTS
from sealane.attest.platformlog import TEXTS, parse_platform_log
from sealane.attest.tpm import parse_tpm_public
from sealane.errors import HostError, InternalError, SealaneError
from sealane.limits import EVIDENCE_MAX, QUOTE_TIMEOUT_S
from sealane.quoting.drivers import make_drivers
from sealane.quoting.drivers.driver import Driver
from sealane.quoting.drivers.tpm2 import Tpm2Driver
from sealane.quoting.expected import check_reference, read_expected
from sealane.quoting.interface import (
    PACKET_MAX,
    Configure,
    Packet,
    Ready,
    Serve,
    Unready,
    encode_packet,
    parse_packet,
)
from sealane.quoting.log import GrowingLog
from sealane.quoting.manifest import Manifest, measure_enclave, stamp_of
from sealane.quoting.platform import measure_binary, measure_platform

_CREDENTIALS: Final = struct.Struct("3i")
_BOOT_LOG: Final = "sys/kernel/security/tpm0/binary_bios_measurements"
_RUNTIME_LOG: Final = "sys/kernel/security/ima/binary_runtime_measurements"


class Platform:
    """One host: its roots of trust and its log. Made once, which measures; raises HostError."""

    def __init__(self, configuration: Configure) -> None:
        self.configuration = configuration
        self.drivers: list[Driver] = make_drivers(configuration)
        if not self.drivers:
            raise HostError("quoting.driver", "no root of trust is set (`attestation.drivers`)")
        self._log = GrowingLog(Path(configuration.run), self.drivers)
        self._log.add(measure_platform(Path(configuration.root)))
        self.manifest: Manifest = measure_enclave(not_after_ns=configuration.started_ns)
        self._log.add_enclave(self.manifest.entries)
        self._binaries: dict[tuple[int, ...], None] = {}

    @property
    def words(self) -> str:
        """The roots of trust, for people."""
        return ", ".join(driver.words for driver in self.drivers)

    def measure_binaries(self, paths: list[str]) -> None:
        """Add binaries of QEMU to the log; one that was measured and is unchanged costs a stat(2)."""
        for path in paths:
            stamp = stamp_of(path)
            if stamp is None or stamp not in self._binaries:
                self._log.add([measure_binary(path)])
                if stamp is not None:
                    self._binaries[stamp] = None

    def evidence(self, user_data: bytes) -> dict[str, bytes]:
        """What every root of trust says, with all logs; raises HostError `enclave.changed`, `quoting.driver`."""
        changed = self.manifest.changed()
        if changed:
            raise HostError("enclave.changed", f"{changed[0]} was changed since it was measured")
        log = self._log.content
        pieces = {"platform-log": log}
        for driver in self.drivers:
            pieces |= driver.quote(user_data, log)
        for name, path, usual in (
            ("boot-log", self.configuration.boot_log, _BOOT_LOG),
            ("runtime-log", self.configuration.runtime_log, _RUNTIME_LOG),
        ):
            content = _read_log(Path(path) if path else Path(self.configuration.root) / usual)
            if content:
                pieces.setdefault(name, content)
        return pieces

    def own_reference(self) -> dict[str, Any]:
        """This host as a reference file would have it; whoever copies it to a peer says that this host is good now."""
        log = parse_platform_log(self._log.content)
        platform: dict[str, list[str]] = {}
        for entry in log.entries:
            if entry.what not in {"enclave", "module"}:
                value = entry.name if entry.what in TEXTS else entry.digest
                platform.setdefault(entry.what.replace("-", "_"), []).append(value)
        values: dict[str, Any] = {"version": 1, "platform": platform}
        for driver in self.drivers:
            if isinstance(driver, Tpm2Driver):
                digest = parse_tpm_public(driver.public).key.digest
                root = "software" if driver.is_software else "hardware"
                values["hosts"] = [f"ak:{digest}"]
                values["tpm"] = {"keys": [{"digest": digest, "root": root}], "pcrs": {"sha256": driver.boot_values()}}
        return values

    def shown_keys(self) -> dict[str, str]:
        """The TPM's keys as another host needs them to have them proved, in base64; empty without a TPM."""
        for driver in self.drivers:
            if isinstance(driver, Tpm2Driver):
                keys = {"ek": driver.endorsement_key(), "ak": driver.public, "ek-certificate": driver.ek_certificate()}
                return {name: base64.b64encode(key).decode() for name, key in keys.items() if key}
        return {}

    def activate(self, credential: bytes) -> bytes:
        """The secret in a credential for this host's TPM; raises HostError `quoting.driver`."""
        for driver in self.drivers:
            if isinstance(driver, Tpm2Driver):
                return driver.activate(credential)
        raise HostError("quoting.driver", "this host has no TPM")

    def policy(self) -> dict[str, bytes]:
        """What this host expects of peers; the files are read anew each time.

        Raises HostError `host.permission`, EvidenceError `attest.reference…` with file and line.
        """
        settings = self.configuration
        wanted = {"least_level": settings.least_level, "accepted_test_roots": settings.accepted_test_roots}
        pieces = {"expectations": json.dumps(wanted).encode()}
        files = {"reference": settings.reference_values} if settings.reference_values else {}
        files |= {f"collateral.{number}": path for number, path in enumerate(settings.collateral)}
        if settings.reference_key:
            files["reference-key"] = settings.reference_key
        known = Path(settings.state) / KNOWN_HOSTS
        if known.exists():
            files["known"] = str(known)
        pieces |= {name: read_expected(path) for name, path in files.items()}
        if "reference" in pieces:
            key = pieces.get("reference-key")
            check_reference(settings.reference_values, pieces["reference"], settings.reference_key, key)
        return pieces


def _write_reference(path: Path, values: Mapping[str, Any]) -> None:
    """For pairing and for operators; nothing depends on it."""
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(values, indent=2) + "\n")


def _read_log(path: Path) -> bytes:
    """A log of the kernel or the firmware; nothing where there is none. Raises HostError where it is too large to send."""
    try:
        with path.open("rb") as file:
            content = file.read(EVIDENCE_MAX)
    except OSError:
        return b""
    if len(content) == EVIDENCE_MAX:
        raise HostError("quoting.failed", f"{path} has more than {EVIDENCE_MAX} bytes")
    return content


@dataclass
class _Line:
    """One enclave's line."""

    connection: socket.socket
    pid: int
    binaries: list[str]
    cutter: Cutter = field(default_factory=lambda: Cutter(QUESTION_MAX))


class QuotingProcess:
    """The loop; `run` returns when the agent is gone."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._platform: Platform | SealaneError | None = None
        self._selector = selectors.DefaultSelector()
        self._over = False
        self._agent = os.getppid()

    def run(self) -> None:
        """Serve until the agent's end closes."""
        self._selector.register(self._control, selectors.EVENT_READ, self._on_control)
        while not self._over:
            for key, _ in self._selector.select():
                key.data()

    def _on_control(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, PACKET_MAX, 1)
        except ConnectionError:
            data, descriptors = b"", []
        sockets = [socket.socket(fileno=each) for each in descriptors]
        for each in sockets:
            each.set_inheritable(False)
        if not data:
            self._over = True
            return
        self._take(parse_packet(data), sockets)

    def _take(self, packet: Packet, sockets: list[socket.socket]) -> None:
        if isinstance(packet, Configure) and self._platform is None:
            try:
                self._platform = Platform(packet)
            except SealaneError as error:
                self._platform = error
                self._tell(Unready(code=error.code, detail=error.detail))
            else:
                self._tell(Ready(root_of_trust=self._platform.words))
                _write_reference(Path(packet.run) / "tpm-keys.json", self._platform.shown_keys())
                _write_reference(Path(packet.run) / "reference-values.json", self._platform.own_reference())
        elif isinstance(packet, Serve) and len(sockets) == 1:
            line = _Line(sockets[0], packet.pid, packet.binaries)
            line.connection.settimeout(QUOTE_TIMEOUT_S)
            self._selector.register(line.connection, selectors.EVENT_READ, lambda: self._on_line(line))
        else:
            raise InternalError("internal.error", f"{packet.call} came out of turn")

    def _tell(self, packet: Packet) -> None:
        with contextlib.suppress(OSError):
            self._control.send(encode_packet(packet))

    def _on_line(self, line: _Line) -> None:
        try:
            if not self._hear(line):
                self._close(line)
        except (OSError, SealaneError):  # the enclave is gone, or spoke nonsense
            self._close(line)

    def _hear(self, line: _Line) -> bool:
        size = socket.CMSG_SPACE(_CREDENTIALS.size)
        data, ancillary, _, _ = line.connection.recvmsg(QUESTION_MAX, size, socket.MSG_DONTWAIT)
        if not data:
            return False
        senders = {_CREDENTIALS.unpack(value[: _CREDENTIALS.size])[0] for level, kind, value in ancillary
                   if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS}  # fmt: skip
        for text in line.cutter.receive(data):
            line.connection.sendall(encode_answer(self._answer(line, senders, text)))
        return True

    def _answer(self, line: _Line, senders: set[int], text: bytes) -> dict[str, bytes] | SealaneError:
        try:
            if senders != {line.pid}:
                raise HostError("quoting.failed", f"process {line.pid} may ask on this line, and {senders} did")
            return self._ask_platform(parse_question(text), line)
        except SealaneError as error:
            return error

    def _ask_platform(self, question: Question, line: _Line) -> dict[str, bytes]:
        if self._platform is None or isinstance(self._platform, SealaneError):
            raise self._platform or HostError("quoting.failed", "the quoting process is not configured yet")
        match question:
            case PolicyWanted():
                return self._platform.policy()
            case EvidenceAsked():
                self._platform.measure_binaries(line.binaries)
                return self._platform.evidence(question.user_data)
            case ActivationAsked():
                if line.pid != self._agent:
                    raise HostError("quoting.failed", "only the agent may have a credential activated")
                return {"secret": self._platform.activate(question.credential)}

    def _close(self, line: _Line) -> None:
        self._selector.unregister(line.connection)
        line.connection.close()


def main(descriptor: int) -> None:
    """Serve the agent on the inherited control socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the agent's business
    os.set_inheritable(descriptor, False)
    QuotingProcess(socket.socket(fileno=descriptor)).run()
