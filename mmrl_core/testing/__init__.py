"""The conformance kit: checks of every contract, for anybody's component, on a laptop's CPU.

A plugin's tests subclass one class a component and run it with pytest::

    from mmrl_core.testing.backends import BackendConformance

    class TestMine(BackendConformance):
        component = "mine"
        options = {"micro_batch_groups": 2}

| class | module | needs torch |
|---|---|---|
| `ComponentConformance` (the declaration; a part of all others) | `mmrl_core.testing.components` | no |
| `RewardConformance` | `mmrl_core.testing.rewards` | no |
| `PromptSourceConformance` | `mmrl_core.testing.prompt_sources` | no |
| `WriterConformance` | `mmrl_core.testing.writers` | no |
| `WeightFormatConformance` | `mmrl_core.testing.weight_formats` | yes |
| `LauncherConformance` | `mmrl_core.testing.launchers` | yes |
| `PatchConformance` (not of a component) | `mmrl_core.testing.patches` | no |
| `AdvantageEstimatorConformance` | `mmrl_core.testing.algorithm_parts` | yes |
| `PolicyGradientConformance` | `mmrl_core.testing.algorithm_parts` | yes |
| `DeviceConformance` | `mmrl_core.testing.devices` | yes |
| `PolicyConformance` | `mmrl_core.testing.policies` | yes |
| `BackendConformance` | `mmrl_core.testing.backends` | yes |
| `RolloutEngineConformance` | `mmrl_core.testing.engines` | yes |

Every check is one test method whose docstring says what the core relies on. A component that is not available on the
machine is skipped with its probe's reason; its declaration is checked all the same. `mmrl_core.testing.tiny` and
`mmrl_core.testing.texts` hold the tiny model, recipe and rollouts that the checks use, for tests of your own;
`mmrl_core.testing.tiny_pipelines` writes tiny pipelines for images and video.
"""

import sys

if "pytest" in sys.modules:  # so that a failed check shows its values; nothing else of this package needs pytest
    import pytest

    pytest.register_assert_rewrite(
        *(
            f"{__name__}.{module}"
            for module in (
                "algorithm_parts",
                "backend_gradients",
                "backend_replicas",
                "backend_updates",
                "backend_weights",
                "backends",
                "components",
                "devices",
                "engine_sampling",
                "engines",
                "launchers",
                "patches",
                "policies",
                "prompt_sources",
                "rewards",
                "weight_formats",
                "writers",
            )
        )
    )
