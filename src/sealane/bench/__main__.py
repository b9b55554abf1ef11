"""`python -m sealane.bench NAME …`: run one bench; `--help` after the name tells its options."""

import importlib
import sys
from typing import Final

BENCHES: Final = {
    "attest": "quote, appraisal and attested handshake, ms",
    "codecs": "sealing, page codecs, digests and compression, GB/s of one core",
    "evacuate": "a host emptied several VMs at once and one after another: the ratio of what it took",
    "link": "a guest with real files over a 1 Gb/s link: QEMU's ways and Sealane's protections, with and without reduction",
    "migrate": "one guest moved by QEMU plain, QEMU TLS and Sealane, single-stream and multifd",
    "vtpm": "a VM's own TPM: image, the four operations, whole moves; no protection, swtpm's, Sealane's",
    "pages": "page classes of a guest from outside: recall, precision, ms a GiB, and what it does to a busy lane",
    "paper-kvm": "the first paper's figures 11 to 16 and table 1: sizes, loads, ways",
    "paper-sgx": "the second paper's table 2, and what an enclave adds to the vTPM's calls (figures 11 to 13)",
    "wire": "reading QEMU's stream, GB/s of one core",
}


def main() -> int:
    """Run the bench that is named."""
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        print("usage: ./run bench NAME [options]\n")
        for name, what in BENCHES.items():
            print(f"  {name:10} {what}")
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    status: int = importlib.import_module(f"sealane.bench.{sys.argv[1].replace('-', '_')}").main(sys.argv[2:])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
