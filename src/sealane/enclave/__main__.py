"""`python -m sealane.enclave DESCRIPTOR [UID GID]`: the launcher of enclaves, started by the agent, never by hand."""

import sys

from sealane.enclave.launcher import launch

if __name__ == "__main__":
    descriptor, uid, gid = (*map(int, sys.argv[1:]), None, None)[:3]
    launch(int(descriptor or 0), uid, gid)
