"""`./run bench paper-sgx`: the measurements of Shi et al. (2017) that have a counterpart here, beside the paper's own values.

Figure 11: a TPM's image written and read. Figures 12 and 13: tpm_state_read and tpm_state_write, volatile_state_enc and
volatile_state_dec. Table 2, which figure 14 draws: total time of migrations of VMs with a TPM, by VM. The paper's columns here:

    Normal     QEMU plain, swtpm in clear
    KVM        QEMU plain, swtpm with its own encryption of files and of the state that migrates
    SGX        NOT MEASURED: no SGX here. In its place: Sealane with its own keeping of the TPM, between hosts that pinned each
               other's certificates (sealed), and between hosts that attest each other with software TPMs (attested: a simulated
               root of trust). An enclave is a sandboxed process: what SGX's transitions cost cannot be seen

Ways alternate within each round; the first round is not counted. Markdown goes to standard output, progress to standard error.
The defaults take 5 minutes on two quiet cores under TCG, and three times that on busy ones.
"""

import argparse
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from sealane.bench.micro import cpu_model
from sealane.bench.movers import Method, move
from sealane.bench.paper import Report, conclude, make_parser, say, timed
from sealane.bench.paper_sgx_calls import measure_calls, measure_images
from sealane.bench.paper_sgx_report import WAYS, as_markdown, judge
from sealane.bench.turns import in_turn
from sealane.testing.accel import choose_accel
from sealane.testing.attested import AttestedHosts
from sealane.testing.hosts import BackgroundProcess
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair
from sealane.testing.problems import RigError
from sealane.testing.qemu import find_qemu
from sealane.vtpm.swtpm import manufacture, version

NAME: Final = "paper-sgx"
_KEY_BYTES: Final = 32


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, __doc__)
    parser.add_argument("--runs", type=int, default=8, help="moves of each VM in each way (default 8; the paper: 20)")
    parser.add_argument(
        "--vms", type=int, default=5, help="how many VMs, one after the other (default 5, as the paper)"
    )
    parser.add_argument(
        "--calls", type=int, default=100, help="how often each call is made (default 100, as the paper)"
    )
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="a guest's memory (default 256)")
    parser.add_argument("--quick", action="store_true", help="one VM, 3 runs")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the bench, print Markdown, write JSON where asked; 1 where `--against` finds a contradiction."""
    options = _parse(arguments)
    return conclude(NAME, options, lambda: timed(NAME, arguments, lambda: measure(options)), as_markdown)


def measure_quickly() -> Report:
    """What `--quick` measures. Raises RigError."""
    return timed(NAME, ["--quick"], lambda: measure(_parse(["--quick"])))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    if options.quick:
        options.vms, options.runs = 1, min(options.runs, 3)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures and the verdicts on them. Raises RigError."""
    images, calls = measure_images(options.calls), measure_calls(options.calls)
    say("figures 11 to 13 are measured")
    totals: list[dict[str, list[float]]] = []
    broken: list[str] = []
    for number in range(options.vms):
        try:
            totals.append(_measure_vm(number, options.memory, options.runs))
        except RigError as error:  # what was measured before is not thrown away
            broken.append(f"VM {number + 1}: {error}")
            say(f"broken off: {broken[-1]}")
    qemu = find_qemu()
    report: dict[str, Any] = {
        "machine": {
            "QEMU": f"{'.'.join(map(str, qemu.version))}, {choose_accel('auto', qemu).name}",
            "processor": f"{cpu_model()}, {os.cpu_count()} of them",
            "host kernel": platform.release(),
            "TPMs": f"swtpm {'.'.join(map(str, version()))}, of VMs and of hosts",
            "root of trust": "simulated: software TPMs; no SGX, no TDX, no SEV-SNP",
            "guest": f"{options.memory} MiB, a quarter of it filled; it uses its TPM five times a second",
        },
        "runs": options.runs,
        "calls": options.calls,
        "images_us": images,
        "calls_us": calls,
        "totals_ms": totals,
        "broken_off": broken,
    }
    return report | {"claims": judge(report)}


def _measure_vm(number: int, memory: int, runs: int) -> dict[str, list[float]]:
    """Total times of one VM in each way, with all that belongs to a move: a TPM, a QEMU, the copy, until it runs."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        pinned = stack.enter_context(make_pair())
        attested = stack.enter_context(make_pair(settings=AttestedHosts([find_qemu().path.resolve()])))
        movers = [stack.enter_context(_mover(attested if way == "attested" else pinned, way, memory)) for way in WAYS]
        for turn in range(runs + 1):
            for mover in in_turn(movers, turn):
                taken = mover.move()
                say(f"VM {number + 1} round {turn} {mover.way:9} {taken:7.0f} ms")
                if turn:
                    found[mover.way].append(round(taken, 1))
    return found


class _Mover:
    """One VM with a TPM that is kept in one way, and goes to and fro."""

    def __init__(self, pair: HostPair, way: str, memory: int) -> None:
        self.way, self._pair, self._ends = way, pair, (pair.a, pair.b)
        workload = Workload(fill_mib=memory // 4, tick_ms=500, tpm_secret="bench")  # noqa: S106 - nobody's
        self._guest = pair.add_guest(way, hardware=Hardware(memory_mib=memory), workload=workload, vtpm=True)
        self._own = _OwnSwtpms(self._guest, is_encrypted=way == "kvm") if way in ("normal", "kvm") else None
        if self._own is None:
            with pair.a.client() as client:
                client.start_vtpm(self._guest.name)
        else:
            self._own.start(pair.a)
        pair.start_guest(self._guest, pair.a, warm=False)

    def move(self) -> float:
        """From the wish to the running VM, in ms."""
        source, destination = self._ends
        began = time.monotonic()
        if self._own is not None:
            self._own.start(destination)
        prepared_ms = (time.monotonic() - began) * 1e3
        method = Method(self.way, options=None if self._own is not None else {"reduce": False})
        run = move(self._pair, self._guest, source, destination, method)
        if not run.completed or run.whole_ms is None:
            raise RigError(f"{self.way}: the guest did not arrive")
        self._ends = destination, source
        self._guest.wait_ticks(1)
        return prepared_ms + run.whole_ms

    def stop(self) -> None:
        """End the VM, wherever its QEMU is."""
        for machine in self._guest.machines.values():
            machine.stop()
        for end in self._ends:
            with suppress(RigError, OSError), self._guest.machines[end.name].observe() as monitor:
                monitor.execute("quit")


@contextmanager
def _mover(pair: HostPair, way: str, memory: int) -> Iterator[_Mover]:
    mover = _Mover(pair, way, memory)
    try:
        yield mover
    finally:
        mover.stop()


class _OwnSwtpms:
    """swtpm as its manual has it, at both hosts: in clear, or with one key for its files and for the state that migrates."""

    def __init__(self, guest: Guest, *, is_encrypted: bool) -> None:
        self._guest, self._is_encrypted, self._count = guest, is_encrypted, 0
        self._key = os.urandom(_KEY_BYTES)

    def start(self, end: AgentHost) -> BackgroundProcess:
        """One for the QEMU that comes next at this host."""
        self._count += 1
        control = end.host.paths.run / "vtpm" / f"{self._guest.name}.sock"
        control.parent.mkdir(exist_ok=True)
        control.unlink(missing_ok=True)
        state = end.host.scratch / f"own-{self._guest.name}-{self._count}"
        state.mkdir(mode=0o700)
        if self._count == 1:
            manufacture(state)
        words = ["--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
        if self._is_encrypted:
            option = f"file={self._key_file(end)},format=binary,mode=aes-256-cbc"
            words += ["--migration-key", option]
            words += ["--key", option] if self._count > 1 else []  # what was just made lies there in clear
        process = end.host.start("swtpm", "socket", "--tpm2", "--terminate", *words)
        process.wait_until(control.exists, "its control channel")
        return process

    def _key_file(self, end: AgentHost) -> Path:
        path = end.host.scratch / f"{self._guest.name}.key"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_bytes(self._key)
        return path
