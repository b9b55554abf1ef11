"""`python -m sealane.vtpm`: a VM's keeper; the agent starts it."""

from sealane.vtpm.keeper import main

if __name__ == "__main__":
    main()
