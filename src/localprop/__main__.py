"""`python -m localprop`, the same as `localprop`."""

import sys

from localprop.cli import main

sys.exit(main())
