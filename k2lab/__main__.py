"""`python -m k2lab` is `k2`."""

import sys

from k2lab.cli import main

sys.exit(main())
