"""`python -m simlm` and `torchrun ... -m simlm`: the command line."""

from simlm.cli import main

if __name__ == "__main__":
    main()
