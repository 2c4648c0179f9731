"""Options of verl's advantage estimators and policy losses in mmrl's loop. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmrl_core.recipe import Spec

Positive = Annotated[float, Field(gt=0)]


class VerlEstimatorOptions(Spec):
    """One of verl's advantage estimators that give a sample one advantage. `algorithm.advantage.eps` is its epsilon."""

    estimator: Annotated[str, Field(min_length=1)]
    """Its name in verl's registry (`algorithm.adv_estimator` there): grpo, grpo_passk, rloo, opo, gpg,
    reinforce_plus_plus, ..., or one that a module of `import_modules` registers."""
    normalize_by_std: bool = True
    """For those that can do without (verl's norm_adv_by_std_in_grpo)."""
    import_modules: list[str] = Field(default=[])
    """Modules to import first, which register estimators of their own with verl."""


class VerlLossOptions(Spec):
    """One of verl's policy losses. Of `algorithm.loss`, `clip_low` and `clip_high` are its clip_ratio_low and
    clip_ratio_high, and `dual_clip` is its clip_ratio_c."""

    loss: Annotated[str, Field(min_length=1)]
    """Its name in verl's registry (`policy_loss.loss_mode` there): vanilla, gspo, cispo, sapo, dppo_tv, dppo_kl, gpg,
    dro, or one that a module of `import_modules` registers."""
    tau_pos: Positive = 1.0
    """Of sapo, for positive advantages."""
    tau_neg: Positive = 1.05
    """Of sapo, for negative advantages."""
    dro_beta: Positive | None = None
    """Of dro, which needs it."""
    import_modules: list[str] = Field(default=[])
    """Modules to import first, which register losses of their own with verl."""
