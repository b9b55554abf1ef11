"""`python -m sealane.enclave DESCRIPTOR`: started by the agent, never by hand."""

import sys

from sealane.enclave.hardening import harden
from sealane.enclave.process import main

if __name__ == "__main__":
    harden()
    main(int(sys.argv[1]))
