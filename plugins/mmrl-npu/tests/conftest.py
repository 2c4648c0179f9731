"""The modules beside the tests are importable by them, wherever the tests are run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
