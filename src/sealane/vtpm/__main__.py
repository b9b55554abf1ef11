"""`python -m sealane.vtpm`: the launcher of VMs' keepers; the agent starts it."""

from sealane.vtpm.launcher import main

if __name__ == "__main__":
    main()
