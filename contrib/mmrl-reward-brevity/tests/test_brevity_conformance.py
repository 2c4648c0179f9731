"""What mmrl relies on in any reward, checked by its conformance kit."""

from __future__ import annotations

from mmrl_reward_brevity import plugin

from mmrl_core.testing.rewards import RewardConformance

DECLARED = {component.name: component for component in plugin.mmrl_rewards()}


class TestBrevity(RewardConformance):
    component = DECLARED["brevity"]


class TestDistinct(RewardConformance):
    component = DECLARED["distinct"]
