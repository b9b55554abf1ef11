"""`python -m sealane.testing`: prepare the rig, or boot its guest by hand."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sealane.testing import packages
from sealane.testing.accel import choose_accel
from sealane.testing.cache import cache_dir
from sealane.testing.guest.build import guest_initrd
from sealane.testing.machine import GuestMachine, Hardware, Workload
from sealane.testing.problems import RigError
from sealane.testing.qemu import all_qemus, find_qemu, probe

Made = TypeVar("Made")


def _step(text: str, make: Callable[[], Made]) -> Made:
    print(f"rig: {text} … ", end="", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        made = make()
    except BaseException:
        print("failed", file=sys.stderr)
        raise
    print(f"{made} ({time.monotonic() - started:.1f} s)", file=sys.stderr)
    return made


def _setup() -> None:
    done = cache_dir() / "ready"
    # what was made before is only checked, and not announced again
    step = _quietly if done.exists() else _step
    step("kernel for guests", packages.kernel)
    step("guest image", guest_initrd)
    qemu = step("QEMU", find_qemu)
    step("accelerator", lambda: choose_accel("auto", qemu).reason)
    done.touch()


def _quietly(text: str, make: Callable[[], Made]) -> Made:
    return make()


def _boot(arguments: argparse.Namespace) -> None:
    qemu = probe(arguments.qemu, "environment") if arguments.qemu else find_qemu()
    accel = choose_accel(arguments.accel, qemu)
    print(f"rig: {qemu}, {accel.name}: {accel.reason}", file=sys.stderr)
    workload = Workload(arguments.fill_mib, arguments.fill, arguments.rewrite_kib_per_s, canary=arguments.canary)
    hardware = Hardware(memory_mib=arguments.memory_mib)
    with (
        tempfile.TemporaryDirectory(prefix="sl-") as scratch,
        GuestMachine(Path(scratch), qemu, accel, hardware, workload) as machine,
    ):
        if arguments.warm:
            machine.start_warm()
        else:
            machine.start()
        said = 0
        deadline = time.monotonic() + arguments.seconds
        while time.monotonic() < deadline and machine.is_running:
            text = machine.console.text
            print(text[said:], end="", flush=True)
            said = len(text)
            time.sleep(0.05)


def main() -> int:
    """Runs one verb; 0 when it worked."""
    parser = argparse.ArgumentParser(prog="python -m sealane.testing", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("setup", help="fetch and build what guests need")
    verbs.add_parser("qemus", help="list the QEMU versions that tests can use")
    boot = verbs.add_parser("boot", help="boot the guest and show its console")
    boot.add_argument("seconds", type=float, nargs="?", default=10.0)
    boot.add_argument("--qemu", type=Path)
    boot.add_argument("--accel", choices=["auto", "kvm", "tcg"], default="auto")
    boot.add_argument("--memory-mib", type=int, default=256)
    boot.add_argument("--fill-mib", type=int, default=8)
    boot.add_argument("--fill", choices=["random", "text", "zero"], default="random")
    boot.add_argument("--rewrite-kib-per-s", type=int, default=0)
    boot.add_argument("--canary", default="")
    boot.add_argument("--warm", action="store_true", help="go on from a saved state")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "setup":
            _setup()
        elif arguments.verb == "qemus":
            print("\n".join(f"{qemu}  {qemu.path}" for qemu in all_qemus()))
        else:
            _boot(arguments)
    except RigError as error:
        print(f"rig: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
