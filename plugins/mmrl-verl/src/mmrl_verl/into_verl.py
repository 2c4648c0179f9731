"""What verl loads when it is imported: the other direction, mmrl for verl."""

from __future__ import annotations

import mmrl_verl.platform_cpu  # noqa: F401  registers itself
