"""`python -m sealane.enclave DESCRIPTOR`: the launcher of enclaves, started by the agent, never by hand."""

import os
import sys

# numpy's linear algebra, of which nothing is used here, would start threads, which a fork loses; read when it is imported
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from sealane.enclave.launcher import launch

if __name__ == "__main__":
    launch(int(sys.argv[1]))
