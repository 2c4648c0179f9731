"""What mmrl relies on in any reward, checked by its conformance kit."""

from __future__ import annotations

from mmrl_changeme import plugin

from mmrl_core.testing.rewards import RewardConformance


class TestChangeme(RewardConformance):
    component = plugin.mmrl_rewards()[0]
