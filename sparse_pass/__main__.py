"""``python -m sparse_pass``."""

import sys

from .cli.main import main

sys.exit(main())
