"""``python -m spectool``."""

from __future__ import annotations

import sys

from spectool.cli import main

if __name__ == "__main__":
    sys.exit(main())
