"""`./run bench pages`: what classing a guest's pages costs, and how right it is.

One guest (TCG, QEMU as found) with the memory asked for; it is paused, and looked at from this process. CPU time is that of
the thread that looks, by CLOCK_THREAD_CPUTIME_ID: "reading" is inside preadv(2), "beyond" is all else. Then a second thread seals
records of 512 KiB without pause, with and without refreshes beside it in the same interpreter: what a lane loses at worst.
"""

import argparse
import os
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np

from sealane.crypto.aead import Aead
from sealane.enclave.memory import ProcessMemory
from sealane.guest import Classifier, CpuState, PageClass, RamLayout
from sealane.guest.qemu_text import build_layout, parse_flat_view, parse_ram_blocks, parse_registers
from sealane.host.migration.monitoring import open_guest_memory
from sealane.limits import RECORD_PAYLOAD_MAX
from sealane.testing.machine import GuestMachine, Hardware
from sealane.testing.pages import READY, PagesWorkload, read_truth, score, truth_options
from sealane.testing.qmp import Qmp

_GIB_PAGES = 1 << 18


def main(arguments: list[str]) -> int:
    """Run the bench; prints a table."""
    options = argparse.ArgumentParser(prog="./run bench pages", description=__doc__)
    options.add_argument("--memory-mib", type=int, default=2048)
    options.add_argument("--fill-mib", type=int, default=1400)
    options.add_argument("--repeat", type=int, default=5)
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sl-") as scratch:
        directory = Path(scratch)
        machine = GuestMachine(
            directory,
            hardware=Hardware(memory_mib=chosen.memory_mib, cpu="max"),
            workload=PagesWorkload(fill_mib=chosen.fill_mib, huge_2m=4, kernel="pti=on"),
        )
        with machine:
            machine.start(*truth_options(directory / "truth")).wait_for(READY, timeout_s=300)
            with machine.observe() as monitor:
                monitor.execute("stop")
                layout, cpus = _describe(monitor)
            files = open_guest_memory(machine.pid, layout)
            truth = read_truth((directory / "truth").read_bytes(), layout)
            with closing(ProcessMemory(*(os.dup(file.fileno()) for file in files))) as memory:
                for file in files:
                    file.close()
                _measure(memory, layout, cpus, truth, chosen.repeat)
    return 0


def _describe(monitor: Qmp) -> tuple[RamLayout, list[CpuState]]:
    blocks = parse_ram_blocks(monitor.monitor("info ramblock"))
    if any(block.host_address is None for block in blocks):
        raise SystemExit("this bench wants QEMU 8.0 or later")
    backends = {str(each["id"]) for each in monitor.execute("query-memdev")}
    layout = build_layout(blocks, parse_flat_view(monitor.monitor("info mtree -f")), backends, {})
    return layout, parse_registers(monitor.monitor("info registers -a"))


def _measure(
    memory: ProcessMemory,
    layout: RamLayout,
    cpus: list[CpuState],
    truth: np.ndarray[tuple[int], np.dtype[np.bool_]],
    repeat: int,
) -> None:
    gib = layout.page_count / _GIB_PAGES
    first, again, quick = [], [], []
    for _ in range(repeat):
        classifier = Classifier(memory, layout, clock=time.thread_time)
        first.append(classifier.refresh(cpus))
        again.append(classifier.refresh(cpus))
        quick.append(classifier.refresh(cpus, scan=False))
    found = np.concatenate([classifier.classes(b.name) == PageClass.USER for b in layout.blocks if b.is_ram])
    print(f"guest of {gib:.1f} GiB, {first[-1].counts}, {first[-1].tops} processes; {score(truth, found)}")
    print("CPU, medians, ms per GiB of guest RAM:      beyond reading   reading   scanned")
    for name, each in (("first look", first), ("look again", again), ("known tables only", quick)):
        beyond = median(look.total_s - look.reading_s for look in each) * 1e3 / gib
        reading = median(look.reading_s for look in each) * 1e3 / gib
        print(f"  {name:40} {beyond:14.1f} {reading:9.1f} {each[-1].scanned_pages / 256:6.0f} MiB")
    alone = median(_seal_rate(None) for _ in range(3))
    beside = median(_seal_rate(lambda: Classifier(memory, layout).refresh(cpus)) for _ in range(3))
    print(f"sealing beside it: {alone:.2f} GB/s alone, {beside:.2f} GB/s while looks follow each other without pause")


def _seal_rate(beside: object, seconds: float = 1.5) -> float:
    """GB/s of one thread that seals, while another calls `beside` again and again."""
    over = threading.Event()

    def look() -> None:
        while callable(beside) and not over.is_set():
            beside()

    thread = threading.Thread(target=look)
    thread.start()
    aead, buffer = Aead(bytes(32)), bytearray(RECORD_PAYLOAD_MAX)
    out = bytearray(RECORD_PAYLOAD_MAX + 16)
    sealed, began = 0, time.monotonic()
    while (took := time.monotonic() - began) < seconds:
        aead.seal_into(sealed.to_bytes(12), buffer, b"", out)
        sealed += 1
    over.set()
    thread.join()
    return sealed * RECORD_PAYLOAD_MAX / took / 1e9
