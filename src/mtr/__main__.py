"""`python -m mtr` is the console script."""

from mtr.cli import main

if __name__ == "__main__":
    main()
