"""`python -m distillkit`: the `distillkit` command."""

from __future__ import annotations

import sys

from distillkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
