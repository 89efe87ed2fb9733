"""`python -m mtr` is the console script."""

from mtr.cli.app import main

if __name__ == "__main__":
    main()
