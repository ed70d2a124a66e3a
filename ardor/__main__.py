"""`python -m ardor` is `ardor`."""

import sys

from ardor.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
