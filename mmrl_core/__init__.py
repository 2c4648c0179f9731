"""mmrl: one GRPO core, any backend, any modality.

What a plugin needs is importable from here without importing torch.
"""

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.hookspecs import API_VERSION, Component, Diagnosis, EnvironmentVariable, Patch, Probe, hookimpl
from mmrl_core.rewards.function import reward

__version__ = "0.1.0"

__all__ = [
    "API_VERSION",
    "Component",
    "Diagnosis",
    "EnvironmentVariable",
    "Patch",
    "Probe",
    "Reward",
    "RewardResult",
    "Sample",
    "__version__",
    "hookimpl",
    "reward",
]
