"""``python -m lutest``: the command line."""

from __future__ import annotations

import sys

from lutest.cli.main import main

sys.exit(main())
