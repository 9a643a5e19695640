"""`python -m lite_attention`: the command line."""

from __future__ import annotations

import sys

from lite_attention.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
