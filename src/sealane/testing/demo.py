"""The demonstration behind `sealane demo`: one live migration between two simulated hosts, and an eavesdropper.

What makes it evidence and not a show: the secret is random and new each time; the capture must hold at least as many
bytes as the migration sent; and the same search, in a capture of QEMU's unprotected migration of an identical guest,
must find the secret. A check that cannot fail proves nothing.
"""

import json
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal

from rich.console import Console

from sealane.cli import format as words
from sealane.cli.migrate import Follower
from sealane.cli.output import Output
from sealane.cli.screen import labelled, make_screen
from sealane.errors import SealaneError, UsageError, make_error
from sealane.host.models import MigrationRequest
from sealane.host.receipts.statement import digest_of
from sealane.host.receipts.verify import receipts_in, verify_chain
from sealane.testing import packages
from sealane.testing.accel import TRIAL_S, Accel, choose_accel
from sealane.testing.attested import AttestedHosts
from sealane.testing.capture import Capture, CaptureRefused, start_capture
from sealane.testing.console import ConsoleLog
from sealane.testing.demo_report import Report, conclude
from sealane.testing.guest.build import guest_initrd
from sealane.testing.hosts import SimulatedHost, namespaces_work
from sealane.testing.machine import GuestMachine, Hardware, Workload, migrate_plainly
from sealane.testing.pair import Guest, HostPair, make_pair
from sealane.testing.problems import RigError
from sealane.testing.qemu import QemuBinary, find_qemu, probe
from sealane.testing.wiretap import Address, Recorder, Wiretap

Network = Literal["auto", "netns", "loopback"]
AccelRequest = Literal["auto", "kvm", "tcg"]

VM = "guest"
_PLAIN_PORT = 4444  # of QEMU's own migration, in a namespace where nobody else listens
_REWRITE_KIB_PER_S = 2048
_CHECK_ALL_TICKS = 20
_FILL_MAX_MIB = 512  # a guest under an emulator needs seconds to fill and check more
_TICKS_BEFORE = 5
_TICKS_AFTER = 20
_ARRIVAL_S = 60.0
_INTERRUPTED = 130


def run(
    out: Output,
    *,
    accel: AccelRequest = "auto",
    qemu: Path | None = None,
    network: Network = "auto",
    multifd_channels: int | None = None,
    memory_mib: int = 256,
    json_file: Path | None = None,
) -> int:
    """Run the demonstration, tell of it, and give the exit status: 0 only if every check held."""
    try:
        _try_to_write(json_file)
    except UsageError as misuse:
        out.error(misuse)
        return misuse.exit_status
    report = Report()
    demonstration = Demonstration(out, report, multifd_channels=multifd_channels, memory_mib=memory_mib)
    with Interruption() as interruption:
        try:
            demonstration.prepare(accel, qemu, network)
            demonstration.show(interruption)
            status = conclude(report, out)
        except KeyboardInterrupt:
            report.problem = "interrupted"
            out.note("✗ interrupted; all that the demo had started is gone again")
            status = _INTERRUPTED
        except (SealaneError, RigError) as problem:
            error = problem if isinstance(problem, SealaneError) else make_error("demo.failed", str(problem))
            report.problem = str(error)
            out.error(error)
            status = error.exit_status
        except MigrationFailed as failure:  # told already, in the words of `sealane migrate`
            report.problem = str(failure)
            status = failure.exit_status
    out.object({"type": "report", **report.as_dict()})
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
        out.line(labelled("report", str(json_file)))
    return status


class MigrationFailed(Exception):
    """The migration did not succeed, which has been told; carries the exit status of `sealane migrate`."""

    def __init__(self, detail: str, *, exit_status: int) -> None:
        super().__init__(detail)
        self.exit_status = exit_status


class Interruption:
    """Turns the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt and ignores later ones, which would cut the
    cleaning up short; `settle` ignores the first one too."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._settled = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._SIGNALS:
            before = self._before[number]
            signal.signal(number, before if callable(before) or isinstance(before, int) else signal.SIG_DFL)

    def settle(self) -> None:
        """From now on nothing is interrupted."""
        self._settled = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._settled:
            self._settled = True
            raise KeyboardInterrupt


@dataclass
class Eavesdropper:
    """Hears what goes to one port of a host. `address` is where to connect to, so that it hears."""

    how: Literal["tcpdump", "relay"]
    refusal: str
    address: Address
    finish: Callable[[], object]
    size_bytes: Callable[[], int]
    count: Callable[[bytes], int]


@contextmanager
def listen_in(host: SimulatedHost, port: int, *, name: str) -> Iterator[Eavesdropper]:
    """tcpdump on the host's interface; where that is not permitted, a relay in front of the port that records."""
    capture = start_capture(host, name=name, port=port if host.namespace is None else None)
    if isinstance(capture, Capture):
        # no context manager: after a failure the host ends tcpdump, and waiting for the capture's end would hide it
        yield Eavesdropper("tcpdump", "", (host.address, port), capture.stop, lambda: capture.size_bytes, capture.count)
        return
    directory = host.scratch / name
    with Wiretap((host.address, port), tampers=[Recorder(directory)], listen=(host.address, 0), host=host) as relay:
        yield Eavesdropper(
            "relay",
            _last_line(capture),
            relay.address,
            lambda: None,
            lambda: sum(path.stat().st_size for path in directory.glob("*.bin")),
            lambda needle: sum(path.read_bytes().count(needle) for path in directory.glob("*.bin")),
        )


@dataclass
class Demonstration:
    """The stages, in the order of the methods; each says what it does and puts what it saw into the report."""

    out: Output
    report: Report
    multifd_channels: int | None = None
    memory_mib: int = 256
    canary: str = field(default_factory=lambda: f"sealane-canary-{secrets.token_hex(12)}")
    network: Network = "auto"
    qemu: QemuBinary = field(init=False)
    accel: Accel = field(init=False)

    def prepare(self, accel: AccelRequest, qemu: Path | None, network: Network) -> None:
        """Find QEMU, kernel, guest and accelerator. Raises `demo.prerequisite` with the mend where one is missing."""
        self.out.line(
            "A running VM moves between two hosts on this machine, and somebody listens on the wire between them."
        )
        self.out.line("About half a minute; nothing stays behind. Ctrl-C ends it.")
        self.out.line()
        if network == "netns" and not namespaces_work():
            raise make_error(
                "host.permission",
                "network namespaces need root's rights",
                mend="run as root, or take --network loopback",
            )
        if qemu is not None and not qemu.is_file():
            raise UsageError("usage.argument", f"there is no QEMU at {qemu}", mend="leave out --qemu, or name a binary")
        self.network = network
        try:
            with self._doing(
                "machine", f"looks for QEMU and a kernel, tries KVM with a guest (at most {TRIAL_S:.0f} s)"
            ):
                self.qemu = probe(qemu, "environment") if qemu else find_qemu()
                packages.kernel()
                guest_initrd()
                self.accel = choose_accel("auto" if accel == "kvm" else accel, self.qemu)
            missing = [tool for tool in ("swtpm", "swtpm_setup", "tpm2_quote") if shutil.which(tool) is None]
            if missing:
                raise RigError(f"missing: {', '.join(missing)} (Debian: swtpm, swtpm-tools, tpm2-tools)")
        except RigError as error:
            raise make_error("demo.prerequisite", str(error)) from error
        except OSError as error:
            mend = "set SEALANE_CACHE_DIR to a directory that this user may write"
            raise make_error("demo.prerequisite", f"the cache of guests does not work: {error}", mend=mend) from error
        if accel == "kvm" and self.accel.name != "kvm":
            raise make_error("demo.prerequisite", f"KVM was asked for: {self.accel.reason}", mend="take --accel tcg")
        self.report.qemu_version = ".".join(map(str, self.qemu.version))
        self.report.accel, self.report.accel_reason = self.accel.name, self.accel.reason
        self.report.memory_checkable = self.accel.name == "kvm" or self.qemu.tracks_dirty_pages_under_tcg
        kind = "KVM" if self.accel.name == "kvm" else "TCG (emulation in software)"
        self._say("machine", str(self.qemu))
        self._say("", f"{kind}: {self.accel.reason}")

    def show(self, interruption: Interruption) -> None:
        """Everything that needs the two hosts; they are gone at the end, whatever it is."""
        with ExitStack() as stack:
            with self._doing("hosts", "makes two hosts, and starts an agent on each"):
                attested = AttestedHosts([self.qemu.path.resolve()])
                pair = stack.enter_context(make_pair(network=self.network, settings=attested))
            try:
                self._tell_hosts(pair)
                guest = pair.add_guest(
                    VM, hardware=self._hardware, workload=self._workload, qemu=self.qemu, accel=self.accel
                )
                stack.callback(guest.machines[pair.a.name].stop)
                plain = self._plain_machine(pair.a.host)
                stack.callback(plain.stop)
                self._boot(pair, guest, plain)
                self._migrate(pair, guest)
                self._arrive(pair, guest)
                self._verify_receipts(pair)
                self._contrast(pair, plain)
            finally:
                interruption.settle()

    @property
    def _hardware(self) -> Hardware:
        return Hardware(memory_mib=self.memory_mib)

    @property
    def _workload(self) -> Workload:
        writes = self.report.memory_checkable
        return Workload(
            fill_mib=min(self.memory_mib // 4, _FILL_MAX_MIB),
            rewrite_kib_per_s=_REWRITE_KIB_PER_S if writes else 0,
            check_all=_CHECK_ALL_TICKS if writes else 0,
            canary=self.canary,
        )

    def _plain_machine(self, host: SimulatedHost) -> GuestMachine:
        """The same machine again, for QEMU's own migration; no agent knows of it."""
        return GuestMachine(
            host.scratch / "plain",
            self.qemu,
            self.accel,
            self._hardware,
            self._workload,
            name=VM,
            launcher=host.launcher,
            environment=host.environment(),
        )

    def _tell_hosts(self, pair: HostPair) -> None:
        spaces = pair.a.host.namespace is not None
        self.report.network = "netns" if spaces else "loopback"
        joined = "network namespaces joined by a veth pair" if spaces else "loopback addresses"
        self._say("hosts", f"{pair.a.name} {pair.a.host.address}, {pair.b.name} {pair.b.host.address}: {joined}")
        for end, other in ((pair.a, pair.b), (pair.b, pair.a)):
            shown = words.short_fingerprint(end.identity.fingerprint)
            self._say("", f"{end.name} is {shown}; {other.name} trusts that certificate")
        self._say(
            "",
            "each has a software TPM (swtpm), quoted with boot, IMA and platform logs; a test root, accepted here only",
        )

    def _boot(self, pair: HostPair, guest: Guest, plain: GuestMachine) -> None:
        started = time.monotonic()
        with self._doing("guest", f"Linux boots on {pair.a.name}"):
            plain.start()
            pair.start_guest(guest, pair.a, warm=False)
            plain.wait_ready()
            with plain.observe() as monitor:
                monitor.execute("stop")  # it waits for its turn without taking the other's time
            guest.machines[pair.a.name].wait_ticks(_TICKS_BEFORE)
        took = words.duration(time.monotonic() - started)
        memory = words.memory_bytes(self.memory_mib << 20)
        self._say(
            "guest",
            f"Linux with {memory} runs on {pair.a.name} (booted in {took}); it counts aloud, ten times a second,",
        )
        does = "rewrites its memory, checks it" if self.report.memory_checkable else "fills its memory"
        self._say("", f"{does}, and holds a secret: {self.canary}")

    def _migrate(self, pair: HostPair, guest: Guest) -> None:
        """The product's own agents, followed by the product's own screen."""
        with listen_in(pair.b.host, pair.b.host.port, name="sealed") as listener:
            self._tell_listener(listener, pair)
            if listener.how == "relay":
                pair.a.trust(pair.b, address=listener.address[0], port=listener.address[1])
            self.out.line()
            self._say("run", f"{pair.a.name}# sealane migrate {VM} {pair.b.name}")
            request = MigrationRequest(vm=VM, host=pair.b.name, multifd_channels=self.multifd_channels)
            with pair.a.client() as client:
                migration = client.start_migration(request)
                with make_screen(self.out) as screen:
                    follower = Follower(client, migration, screen, self.out)
                    status = follower.follow()
            last = follower.latest
            if follower.cancel_asked:
                raise KeyboardInterrupt
            if status:
                for end in (pair.a, pair.b):
                    if end.agent is not None:
                        self.out.detail(f"{end.name}'s agent said:\n{end.agent.output[-4000:]}")
                raise MigrationFailed(last.problem.detail if last.problem else last.state, exit_status=status)
            guest.travelled.append(pair.b.name)
            try:
                listener.finish()
            except RigError as error:
                detail = f"{error}, so that an absence would prove nothing"
                raise make_error("demo.failed", detail, mend="run it again when this machine has less to do") from error
            self.report.captured_bytes = listener.size_bytes()
            self.report.canary_count = listener.count(self.canary.encode())
        if last.peer_trust is not None:
            self.report.verdict = last.peer_trust.model_dump(mode="json")
            self.report.level = last.peer_trust.level
        self.report.kex_group, self.report.cipher = last.kex_group, last.cipher
        self.report.multifd_channels = last.multifd_channels or 0
        if last.result is not None:
            self.report.total_ms, self.report.downtime_ms = last.result.total_ms, last.result.downtime_ms
            self.report.bytes_wire = last.result.bytes_wire
        self.out.line()

    def _tell_listener(self, listener: Eavesdropper, pair: HostPair) -> None:
        self.report.capture = listener.how
        if listener.how == "tcpdump":
            where = "" if pair.b.host.namespace else f", port {pair.b.host.port}"
            self._say("wire", f"tcpdump listens on {pair.b.name}'s interface {pair.b.host.interface}{where}")
        else:
            self._say("wire", f"tcpdump may not listen here ({listener.refusal}):")
            self._say("", "a relay between the agents records what passes instead")

    def _arrive(self, pair: HostPair, guest: Guest) -> None:
        """Does the guest go on there, and there only?"""
        source, arrived = guest.machines[pair.a.name], ConsoleLog(guest.machines[pair.b.name].console_path)
        with self._doing("arrived", f"lets the guest count on {pair.b.name} and check its memory"):
            wanted = self.report.memory_checkable
            _wait(
                lambda: (
                    bool(guest.console.corruptions)
                    or (len(arrived.ticks) >= _TICKS_AFTER and (not wanted or checked_whole(arrived.lines)))
                )
            )
            _wait(lambda: not source.is_running)
            alive_before = guest.console.last_tick
            _wait(lambda: guest.console.last_tick > alive_before or bool(guest.console.corruptions))
        self.report.ticks, self.report.ticks_after = guest.console.last_tick, len(arrived.ticks)
        self.report.source_stopped = not source.is_running
        self.report.guest_alive = (
            guest.console.ticks[:1] == [1]
            and guest.console.is_contiguous
            and len(arrived.ticks) >= _TICKS_AFTER
            and guest.console.last_tick > alive_before
        )
        if wanted:
            self.report.memory_intact = checked_whole(arrived.lines) and not guest.console.corruptions
        self._say(
            "arrived", f"the counter is at {self.report.ticks}, {self.report.ticks_after} of them on {pair.b.name}"
        )

    def _verify_receipts(self, pair: HostPair) -> None:
        """What both ends signed, read from their directories as an auditor would; the copies travel after the VM runs."""
        _wait(lambda: not _receipt_problems(pair))
        self.report.receipt_problems = _receipt_problems(pair)
        for item in receipts_in(pair.a.host.paths.state / "receipts")[-1:]:
            self.report.receipt = json.loads(item.path.read_bytes())
            self._say(
                "receipt", f"{item.path.name}, sha256:{item.digest[:16]}…, on {pair.a.name}; its peer on {pair.b.name}"
            )

    def _contrast(self, pair: HostPair, source: GuestMachine) -> None:
        """The same guest, the same hosts, the same eavesdropper, without Sealane."""
        host = pair.b.host
        port = _PLAIN_PORT if host.namespace is not None else _free_port(host.address)
        with (
            self._doing("contrast", "moves an identical guest by QEMU alone"),
            listen_in(host, port, name="plain") as listener,
            self._plain_machine(host) as destination,
        ):
            destination.start_incoming()
            with destination.observe() as monitor:
                monitor.execute("migrate-incoming", uri=f"tcp:{host.address}:{port}")
            with source.observe() as monitor:
                monitor.execute("cont")
            migrate_plainly(source, destination, f"tcp:{listener.address[0]}:{listener.address[1]}")
            with suppress(RigError):  # packets lost: what counts here is what was found all the same
                listener.finish()
            self.report.plain_captured_bytes = listener.size_bytes()
            self.report.plain_canary_count = listener.count(self.canary.encode())
        self._say("contrast", "QEMU alone moved an identical guest over plain TCP, overheard in the same way")

    def _say(self, label: str, text: str) -> None:
        self.out.line(labelled(label, text))

    @contextmanager
    def _doing(self, label: str, text: str) -> Iterator[None]:
        """What takes a while: a spinner on a terminal, a plain line in a pipe."""
        if not self.out.live:
            self._say(label, f"{text} …")
            yield
            return
        with Console().status(labelled(label, f"{text} …"), spinner="dots"):
            yield


def _receipt_problems(pair: HostPair) -> list[str]:
    """What is wrong with the receipts of both hosts; each must hold the other's of the last migration."""
    found, digests = [], []
    for end in (pair.a, pair.b):
        report = verify_chain(end.host.paths)
        found += [f"{end.name}: {problem.words}" for problem in report.problems]
        copies = list((end.host.paths.state / "receipts" / "peers").glob("*.dsse"))
        if not report.items or len(copies) != 1:
            found.append(f"{end.name} has no receipt, or not the other's")
        else:
            digests.append((report.items[-1].digest, digest_of(copies[0].read_bytes())))
    if len(digests) == 2 and digests[0] != digests[1][::-1]:
        found.append("what one host holds of the other is not what that one has")
    return found


def checked_whole(lines: list[str]) -> bool:
    """Whether, in one host's console, the guest checked all of its memory after a tick that it said there."""
    ticked = False
    for line in lines:
        ticked = ticked or line.startswith("tick ")
        if ticked and line.startswith("checked "):
            return True
    return False


def _wait(condition: Callable[[], bool]) -> None:
    """Waits for `condition`, in vain at the most for _ARRIVAL_S: who asked looks again."""
    deadline = time.monotonic() + _ARRIVAL_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _last_line(refused: CaptureRefused) -> str:
    return (refused.reason.splitlines() or ["it does not start"])[-1].strip().strip("()")


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _try_to_write(path: Path | None) -> None:
    """Better to know before than after."""
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError("usage.argument", f"{path} cannot be written: {error.strerror}") from error
