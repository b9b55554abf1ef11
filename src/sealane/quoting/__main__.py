"""`python -m sealane.quoting DESCRIPTOR`: started by the agent, never by hand."""

import sys

from sealane.quoting.process import main

if __name__ == "__main__":
    main(int(sys.argv[1]))
