"""`python -m sealane.cli` is `sealane`."""

from sealane.cli import main

if __name__ == "__main__":
    main()
