"""What building any of verl's engines needs: the plan, verl's description of the model, and quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers.utils import logging as transformers_logging

from mmrl_core.contracts import RunContext, TokenPolicy, TrainingSpec
from mmrl_core.errors import ModelError

log = logging.getLogger("mmrl.verl")

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[Options]):
    """What one engine is built from."""

    context: RunContext
    policy: TokenPolicy
    training: TrainingSpec
    options: Options
    trained: bool
    """False: the frozen reference, without adapters and optimizer."""


class _Printed:
    """A text stream that passes what verl prints on to the log."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("verl: %s", text.strip())
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


@contextmanager
def quietly() -> Iterator[None]:
    """Within the block, verl's prints go to the log, and warnings about engines that are not installed nowhere."""
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings(), redirect_stdout(_Printed()):
        warnings.simplefilter("ignore")
        yield


def model_config(plan: Plan[Any], **settings: Any) -> Any:
    """verl's HFModelConfig of the plan's model. Raises ModelError."""
    from verl.workers.config import HFModelConfig

    model = plan.policy.model
    try:
        return HFModelConfig(
            path=model.path,
            trust_remote_code=model.trust_remote_code,
            use_remove_padding=plan.options.remove_padding,
            **settings,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {model.path!r}: verl cannot read its config: {error}") from error
