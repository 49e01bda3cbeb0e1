"""`python -m common.metrics`, until this file holds the metrics again."""

import sys

from common.old.metrics import *  # noqa: F403
from common.old.metrics import main

if __name__ == "__main__":
    sys.exit(main())
