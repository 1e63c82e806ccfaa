"""`python -m mirror`: the same as the `mirror` command."""

from mirror.cli import main

if __name__ == "__main__":
    main(prog_name="mirror")
