"""What verl loads when it is imported (its entry-point group `verl.plugins`): mmrl for verl.

Registers the platform `cpu`, mmrl's advantage estimators and its policy losses. mmrl's rewards need no registration:
`reward.custom_reward_function.path=pkg://mmrl_verl.rewards` with the reward's name, see `mmrl_verl.rewards`.

verl logs it at DEBUG when an entry point cannot be loaded, which nobody sees; here it is printed as well.
"""

from __future__ import annotations

import sys
import traceback

try:
    import mmrl_verl.estimators_for_verl
    import mmrl_verl.losses_for_verl
    import mmrl_verl.platform_cpu  # noqa: F401
except Exception:
    print(
        "mmrl-verl: what mmrl offers to verl (estimators and losses called mmrl_*, the platform cpu) could not be "
        f"loaded, and verl goes on without it:\n{traceback.format_exc()}",
        file=sys.stderr,
        flush=True,
    )
    raise
