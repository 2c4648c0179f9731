"""Options of the policy `flow` and its sampling section. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mmrl_core.recipe import NonNegative, Positive, Spec


class FlowOptions(Spec):
    """Flow-matching models for images and video (diffusers folders)."""

    family: Literal["auto", "flux", "sd3", "wan", "dit"] = "auto"
    """The model family; auto: as the folder's model_index.json says."""
    steps_at_once: Positive = 1
    """Denoising steps of a sample in one forward and backward. More is faster on small models and needs more memory."""
    share_start: bool = True
    """With `sampling.same_initial_noise` the samples of a group are one until the first stochastic step has added its
    noise: compute that step, and the deterministic ones before it, once a group. Off: for every sample."""
    max_text_tokens: Positive | None = None
    """Longest prompt of the T5 or UMT5 encoder, in tokens; longer ones are cut. Null: the family's own, 512 for FLUX
    and Wan, 256 for SD3."""
    encoder_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of text encoders; the model's when not set."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which latents are decoded."""
    negative_prompt: str | None = None
    """What classifier-free guidance leads away from. Null: the text that stored embeddings bring along, and no text
    where they bring none or prompts are encoded here. Another text than theirs is an error."""


class WindowSpec(Spec):
    """A few stochastic steps; the others follow the ODE."""

    size: Positive
    """Consecutive stochastic steps."""
    first: NonNegative = 0
    """The earliest step at which the window may start."""
    last: NonNegative | None = None
    """The latest step it may contain; the last step that can be trained when not set. Where the window lies between
    `first` and `last` is drawn once a group."""


class FlowSampling(Spec):
    """How images are denoised. Replay uses the same schedule, kernel and guidance."""

    evaluation_defaults: ClassVar[dict[str, Any]] = {"noise": 0.0, "window": None}

    steps: Annotated[int, Field(ge=2)] = 16
    """Denoising steps."""
    height: Positive = 512
    """Height in pixels."""
    width: Positive = 512
    """Width in pixels."""
    frames: Positive = 1
    """Video frames; 1 for images."""
    fps: Positive = 16
    """Frames a second of video files."""
    schedule: Literal["linear", "model"] = "linear"
    """linear: sigma from 1 to 0 in equal parts, then `shift`. model: what the scheduler of the model's folder does for
    these steps, its own shift included."""
    shift: Annotated[float, Field(gt=0)] = 3.0
    """sigma -> shift sigma / (1 + (shift - 1) sigma), for the schedule linear."""
    kernel: Literal["dance", "flow", "cps"] = "dance"
    """How noise enters a step. dance: g = noise. flow: g = noise sqrt(sigma / (1 - sigma)). cps: noise that keeps the
    marginals' coefficients."""
    noise: Annotated[float, Field(ge=0)] = 0.3
    """Noise level (eta of DanceGRPO, a of Flow-GRPO and CPS); 0: the ODE, for evaluation only."""
    log_prob: Literal["standard", "guard"] = "standard"
    """standard: of the Gaussian, mean over the latent's elements (without constants for cps). guard: GRPO-Guard, whose
    log-ratios have mean 0 and equal spread at every step, with its weight 1 / (sigma - sigma')."""
    quantise_time: bool = False
    """The network sees floor(1000 sigma) / 1000, as DanceGRPO trains; off: sigma, as diffusers' pipelines do."""
    trained_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the stochastic steps that are trained, drawn anew for each sample; the last step never is."""
    permute_steps: bool = True
    """Replay a sample's steps in an order of its own, so that steps of different noise share a batch."""
    window: WindowSpec | None = None
    """Stochastic steps in a window only, or null: everywhere."""
    same_initial_noise: bool = True
    """The samples of a group start from one noise and part by the steps' noise; else each from its own."""
    guidance_scale: Annotated[float, Field(ge=0)] = 3.5
    """Input of guidance-distilled networks (FLUX.1-dev)."""
    cfg_scale: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance: velocity of the negative prompt plus cfg_scale times the difference; 1: off."""
    cfg_in_replay: bool = True
    """Replay with the same guidance, which makes replayed log-probs equal to sampled ones; off: replay the prompt's
    velocity alone, at half the cost."""

    @model_validator(mode="after")
    def _window_is_inside(self) -> FlowSampling:
        first, last = self.stochastic_range()
        if self.window is not None and first + self.window.size - 1 > last:
            raise ValueError(
                f"window of {self.window.size} steps does not fit between step {first} and step {last} "
                f"(of {self.steps}, the last of which is never trained)"
            )
        return self

    def stochastic_range(self) -> tuple[int, int]:
        """First and last step, counted from 0, that may be stochastic and trained."""
        last = self.steps - 2
        if self.window is None:
            return 0, last
        return self.window.first, last if self.window.last is None else min(last, self.window.last)

    def stochastic_steps(self) -> int:
        """Stochastic steps of a sample that can be trained."""
        first, last = self.stochastic_range()
        return last - first + 1 if self.window is None else self.window.size

    def trained_steps(self) -> int:
        """Steps of a sample that are trained: int(stochastic steps * fraction), at least 1."""
        return max(1, int(self.stochastic_steps() * self.trained_fraction))
