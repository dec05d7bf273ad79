"""`python -m cowfs`: the command without its entry point."""

import sys

from cowfs.cli import main

sys.exit(main())
