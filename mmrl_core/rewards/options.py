"""Options of the built-in rewards. Imports no torch and no checker, so recipes are checked anywhere."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import Field, field_validator, model_validator

from mmrl_core.recipe import NonNegative, Positive, Spec

THINK_ANSWER = r"\s*<think>(?:(?!</?(?:think|answer)>).)*</think>\s*<answer>(?:(?!</?(?:think|answer)>).)*</answer>\s*"
"""`<think>...</think><answer>...</answer>`, each tag exactly once, nothing but white space around them."""


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _compilable(pattern: str | None) -> str | None:
    if pattern is not None:
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"not a valid regular expression: {error}") from None
    return pattern


class MathOptions(Spec):
    r"""Options of `math`: the answer in `\boxed{}`, compared as mathematics by math-verify."""

    require_boxed: bool = True
    r"""The answer must stand in `\boxed{}` (the last one counts). False: without a box, the last expression that
    math-verify finds in the text counts."""
    timeout_s: Positive = 5
    """Seconds that reading an expression, or one comparison, may take. After it the sample has failed."""


class NumericOptions(Spec):
    """Options of `numeric`: the last number in the text is compared with the reference."""

    correct_weight: float = 1.0
    """Credit when the last number in the text equals the reference."""
    format_weight: float = 0.0
    """Credit on top when the text is that right number and nothing else (white space and a final full stop aside)."""
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Largest absolute difference that counts as equal; 0: exactly equal as decimals."""


class ExactOptions(Spec):
    """Options of `exact`: the text equals the reference, or one of them when the reference is a list."""

    strip: bool = True
    """Ignore white space at both ends."""
    casefold: bool = False
    """Ignore case."""
    extract: str | None = None
    """A regular expression whose last match in the text is compared instead of the whole text: its first group, or
    all of it when it has none. No match scores 0. `.` matches line ends too."""

    _check_extract = field_validator("extract")(_compilable)


class FormatOptions(Spec):
    """Options of `format`: 1 when the text matches a regular expression, else 0."""

    pattern: str = THINK_ANSWER
    """The regular expression (`.` matches line ends too); by default `<think>...</think><answer>...</answer>`."""
    match: Literal["full", "search"] = "full"
    """The pattern must match the whole text, or be found anywhere in it."""

    _check_pattern = field_validator("pattern")(_compilable)


class LengthOptions(Spec):
    """Options of `length`."""

    shape: Literal["band", "soft_overlong"] = "band"
    """`band`: 1 inside [minimum, maximum], falling linearly to 0 over `ramp` units outside.
    `soft_overlong`: DAPO's punishment, 0 up to maximum - ramp, falling linearly to -1 at maximum, -1 beyond."""
    minimum: NonNegative = 0
    """Shortest length inside the band; `band` only."""
    maximum: Positive
    """Longest length inside the band, or DAPO's L_max."""
    ramp: NonNegative = 0
    """Units over which the reward changes: outside the band, or DAPO's L_cache below maximum. 0: a step."""
    unit: Literal["actions", "characters", "words"] = "actions"
    """What is counted: actions taken (tokens, for text), characters, or words between white space."""

    @model_validator(mode="after")
    def _consistent(self) -> LengthOptions:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) exceeds maximum ({self.maximum})")
        if self.shape == "soft_overlong":
            if self.minimum:
                raise ValueError("shape: soft_overlong punishes long samples only; remove minimum or use shape: band")
            if self.ramp > self.maximum:
                raise ValueError(f"ramp ({self.ramp}) exceeds maximum ({self.maximum})")
        return self


class FrameOptions(Spec):
    """What a reward for images looks at in a video."""

    video: Literal["first", "mean"] = "first"
    """Of a video, the value of its first frame, or the mean of the values of every `every`-th frame."""
    every: Positive = 4
    """With `video: mean`, frames 0, every, 2 * every, ... count."""


class JpegCompressibilityOptions(FrameOptions):
    """Options of `jpeg_compressibility`: the size of the image as a JPEG file, in kB (1000 bytes)."""

    quality: Annotated[int, Field(ge=1, le=95)] = 95
    """JPEG quality on the usual scale; 95 is that of DDPO."""
    prefer: Literal["small", "large"] = "small"
    """`small`: the reward is minus the size (compressibility). `large`: the size (incompressibility)."""


class BrightnessOptions(FrameOptions):
    """Options of `brightness`: mean luma, 0 (black) to 1 (white)."""


class SharpnessOptions(FrameOptions):
    """Options of `sharpness`: variance of the Laplacian of luma."""


class DigitsRewardOptions(Spec):
    """Options of `digits`: what a classifier of 8 x 8 digits says of the prompted one."""

    score: Literal["probability", "correct"] = "probability"
    """`probability`: the classifier's probability of the prompted digit. `correct`: 1 when no digit has a higher one,
    else 0."""


class DigitsJudgeOptions(Spec):
    """Options of `digits_judge`: what a second classifier says, which shares nothing with the first."""

    score: Literal["probability", "correct"] = "correct"
    """`correct`: 1 when no digit is likelier than the prompted one, else 0. `probability`: that of the prompted one."""


class ReasoningGymRewardOptions(Spec):
    """Options of `reasoning_gym`: the verifier that belongs to the task which made the prompt."""

    dataset: str | None = None
    """Name of the reasoning-gym task whose verifier scores every sample; by default what each prompt's
    column `dataset` says, or else `source_dataset` in its column `metadata`."""
    answer_tag: Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")] | None = "answer"
    """The answer is what the last `<answer>...</answer>` holds (0 when there is none); null: the whole text."""


class RemoteOptions(Spec):
    """Options of `remote`: a reward that `mmrl serve-reward` runs elsewhere, on another device or machine."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")]
    """Where the service listens: `http://host:port`."""
    reward: str | None = None
    """The reward that is expected there, by the name it is served with; another one stops the run before it begins. Not
    set: whatever is there."""
    version: str | None = None
    """Versions of that reward's distribution that are accepted, as pip writes them: `>=1.2,<2`. Not set: any."""
    samples_per_request: Positive = 64
    """Samples a call; the recipe's `batch_size` overrides it."""
    timeout_s: Seconds = 45
    """Seconds that a batch may take, all attempts together. Keep it below the recipe's `deadline_s` (60 by default), so
    that the answer is a reason and not a killed worker."""
    retries: NonNegative = 2
    """How often a request is sent again when the service cannot be reached, is busy, or breaks off. A reward that fails
    there is not asked again."""
    retry_wait_s: Seconds = 0.5
    """Seconds before the first repetition; each further wait is twice as long."""
    start_wait_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60
    """Seconds to wait, before the run begins, for the service to answer and to have its reward set up."""
    columns: list[str] | None = None
    """Columns of the prompt's data row that are sent along; not set: all of them."""

    @field_validator("version")
    @classmethod
    def _is_a_specifier(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                SpecifierSet(value)
            except InvalidSpecifier as error:
                raise ValueError(f"{error}; write for example >=1.2,<2") from None
        return value
