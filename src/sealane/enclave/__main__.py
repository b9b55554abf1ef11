"""`python -m sealane.enclave DESCRIPTOR`: the launcher of enclaves, started by the agent, never by hand."""

import sys

from sealane.enclave.launcher import launch

if __name__ == "__main__":
    launch(int(sys.argv[1]))
