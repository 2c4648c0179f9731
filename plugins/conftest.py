"""Makes the packages under plugins/ importable for a test run of the whole repository without installing them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(source) for source in sorted(Path(__file__).parent.glob("*/src"))]
