"""``python -m lightning_int8.cli`` is ``lightning-int8``."""

import sys

from lightning_int8.cli import main

sys.exit(main())
