"""``python -m svdkern``."""

import sys

from svdkern.cli import main

sys.exit(main())
