"""`python -m gpu PART`, with benchmarks/ on the path."""

import sys

from gpu.parts import main

if __name__ == "__main__":
    sys.exit(main())
