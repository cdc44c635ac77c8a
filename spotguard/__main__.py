"""Entry point: `python -m spotguard`, and the console script."""

import sys

from spotguard.cli import main

if __name__ == "__main__":
    sys.exit(main())
