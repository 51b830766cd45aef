"""``python -m streammerge``."""

from __future__ import annotations

import sys

from streammerge.cli import main

sys.exit(main())
