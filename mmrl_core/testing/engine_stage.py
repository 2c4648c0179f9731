"""The tiny model, requests and shared fixture of the rollout-engine checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from mmrl_core.contracts import GenerationRequest, Prompt, RolloutEngine, TrainingBackend
from mmrl_core.grpo.collect import request
from mmrl_core.hookspecs import Component
from mmrl_core.plugins import import_string, load_plugins
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.texts import plain_model
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe

END_TOKENS = tuple("abcdefghijklmnopqrstuvwxyz")
"""So many tokens end a response that the tiny model's responses differ in length."""
LONGEST = 12
"""max_new_tokens of the checks."""

QUESTIONS = (
    Prompt(index=0, messages=({"role": "user", "content": "3 + 4 ="},), answer="7", origin="check 0"),
    Prompt(index=1, text="7", answer="7", origin="check 1"),
    Prompt(
        index=2,
        messages=({"role": "system", "content": "Add."}, {"role": "user", "content": "What is 21 + 21, exactly?"}),
        answer="42",
        origin="check 2",
    ),
    Prompt(index=3, text="The answer is", answer="0", origin="check 3"),
)
"""Chats and plain texts of different lengths."""


@dataclass(kw_only=True)
class Studio:
    """One rank with a set-up engine, and what it is compared with."""

    rank: Rank
    model: Path
    recipe: Mapping[str, Any]
    cast: Cast
    backend: TrainingBackend
    engine: RolloutEngine
    plain: Any
    """The model as transformers loads it; the engine's weights as long as a check has not updated them."""

    def requests(self, prompts: int, group_size: int, *, first: int = 0, step: int = 1) -> list[GenerationRequest]:
        """Requests for `prompts` questions; sample ids and seeds as in a run."""
        return [
            request(0, step, QUESTIONS[group % len(QUESTIONS)], group, group_size)
            for group in range(first, first + prompts)
        ]

    def sampling(self, **overrides: Any) -> Any:
        """The policy's sampling options of the recipe with these changes."""
        dotted = self.cast.selection.policy.found.component.sampling
        assert dotted is not None, "a text policy declares its sampling options"
        return import_string(dotted, "sampling options").model_validate({**self.recipe["sampling"], **overrides})


class EngineStage:
    """What an engine's checks may be told, and their fixture."""

    kind: ClassVar[str]
    component: ClassVar[str | Component]
    options: ClassVar[Mapping[str, Any]]

    device: ClassVar[str] = "cpu"
    """The device to check on."""
    policy: ClassVar[Mapping[str, Any]] = {"name": "causal_lm"}
    """The text policy, with options."""
    backend: ClassVar[Mapping[str, Any]] = {"name": "fsdp2"}
    """The training backend beside it, with options: whose replay the log-probs must equal."""
    architecture: ClassVar[Literal["llama", "qwen2"]] = "llama"
    """The tiny model's."""
    tie_word_embeddings: ClassVar[bool] = True
    """Whether the tiny model's head is its embedding."""
    head_dim: ClassVar[int] = 16
    """Width of an attention head of the tiny model."""
    batch_invariant: ClassVar[bool] = True
    """Whether a sample's tokens on the tiny fp32 model do not depend on what else is in the batch."""

    @pytest.fixture(scope="class")
    @classmethod
    def studio(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
        """One connected rank with backend and engine; skipped where the component or the device is missing."""
        assert isinstance(cls.component, str), "install the plugin and name the component by its word"
        for kind, word in (("device", cls.device), (cls.kind, cls.component)):
            probe = load_plugins().get(kind, word).probe()
            if not probe.available:
                pytest.skip(f"{kind} {word} cannot run here: {probe.reason}. {probe.cure}")
        folder = tmp_path_factory.mktemp("conformance")
        model = tiny_language_model(
            folder / "model",
            architecture=cls.architecture,
            tie_word_embeddings=cls.tie_word_embeddings,
            end_tokens=END_TOKENS,
            head_dim=cls.head_dim,
        )
        recipe = tiny_recipe(
            model,
            folder / "run",
            device=cls.device,
            model={"policy": dict(cls.policy)},
            backend=dict(cls.backend),
            rollout={"name": cls.component, **cls.options},
            sampling={"max_new_tokens": LONGEST, "temperature": 1.0},
            optimizer={"lr": 2e-2},
        )
        with Rank.join(cls.device, folder) as rank:
            cast = rank.cast(recipe)
            backend = cast.backend()
            engine = cast.engine(backend)
            try:
                yield Studio(
                    rank=rank,
                    model=model,
                    recipe=recipe,
                    cast=cast,
                    backend=backend,
                    engine=engine,
                    plain=plain_model(model),
                )
            finally:
                engine.close()
