"""`python -m sealane.enclave DESCRIPTOR`: started by the agent, never by hand."""

import gc
import sys

from sealane.enclave.hardening import harden
from sealane.enclave.process import main

if __name__ == "__main__":
    harden()
    gc.disable()  # one migration long: what its few cycles hold is less than looking for them in mid-stream costs
    main(int(sys.argv[1]))
