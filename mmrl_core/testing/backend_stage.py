"""The tiny model, the recipe variations and the shared fixtures of the backend checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from mmrl_core.contracts import ActionStats, Minibatch, Rollouts, TrainingBackend
from mmrl_core.hookspecs import Component
from mmrl_core.plugins import load_plugins
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.texts import check_minibatch, plain_model, plain_stats, text_rollouts
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe

TEMPERATURE = 0.8
"""Not 1, so that a replay which forgets the temperature is noticed."""
GROUPS = (3, 2, 4)
"""Sizes of the groups of the checks."""


@dataclass(kw_only=True)
class Bench:
    """One rank, the model folder, and the reference numbers for the rollouts of the checks."""

    rank: Rank
    folder: Path
    model: Path
    recipe: Mapping[str, Any]
    rollouts: Rollouts
    plain: Any
    """The model as transformers loads it."""
    expected: ActionStats
    """Log-probs and entropy of the rollouts by transformers' own forward, [B, T]."""
    minibatch: Minibatch
    """All rollouts."""
    _default: list[tuple[TrainingBackend, Cast]] = field(default_factory=list)

    def default(self) -> tuple[TrainingBackend, Cast]:
        """One backend for checks that change nothing."""
        if not self._default:
            self._default.append(self.fresh())
        return self._default[0]

    def fresh(
        self,
        *,
        options: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        lora: bool = False,
        reference: bool = False,
    ) -> tuple[TrainingBackend, Cast]:
        """A new backend, set up, for the recipe with these changes."""
        cast = self.rank.cast(self.varied(options=options, policy=policy, optimizer=optimizer, lora=lora))
        return cast.backend(reference=reference), cast

    def varied(
        self,
        *,
        options: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        lora: bool = False,
    ) -> dict[str, Any]:
        """The recipe with these changes, as plain values."""
        model = {**self.recipe["model"], "policy": {**self.recipe["model"]["policy"], **(policy or {})}}
        if lora:
            model["lora"] = {"rank": 4, "alpha": 8.0}
        return {
            **self.recipe,
            "model": model,
            "backend": {**self.recipe["backend"], **(options or {})},
            "optimizer": {**self.recipe["optimizer"], **(optimizer or {})},
        }


class BackendStage:
    """What a backend's checks may be told, and their fixtures."""

    kind: ClassVar[str]
    component: ClassVar[str | Component]
    options: ClassVar[Mapping[str, Any]]

    device: ClassVar[str] = "cpu"
    """The device to check on."""
    policy: ClassVar[Mapping[str, Any]] = {"name": "causal_lm"}
    """The text policy, with options."""
    architecture: ClassVar[Literal["llama", "qwen2"]] = "llama"
    """The tiny model's."""
    tie_word_embeddings: ClassVar[bool] = True
    """Whether the tiny model's head is its embedding."""
    equivalent_options: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Options that change speed and memory and must not change results: sizes of micro-batches, recomputation."""
    equivalent_policy_options: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"prefix_sharing": "on"},
        {"prefix_sharing": "off"},
        {"logits_memory_mb": 1},
    )
    """The same for the policy."""
    lora: ClassVar[bool] = True
    """Whether it trains adapters."""
    ranks: ClassVar[int] = 2
    """Processes for the checks across ranks; 0 skips them."""
    rank_options: ClassVar[Mapping[str, Any]] = {}
    """Options beside `options` for the checks across ranks: a layout that one process cannot have."""
    log_prob_tolerance: ClassVar[float] = 2e-5
    """Largest difference of a log-prob from transformers' own, fp32."""
    gradient_tolerance: ClassVar[float] = 1e-5
    """Largest relative L2 difference between gradients of equal work split in different ways, fp32."""

    @pytest.fixture(scope="class")
    @classmethod
    def bench(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
        """One connected rank for the checks of a class; skipped where the component or the device is missing."""
        assert isinstance(cls.component, str), "install the plugin and name the component by its word"
        for kind, word in (("device", cls.device), (cls.kind, cls.component)):
            found = load_plugins().get(kind, word)
            probe = found.probe()
            if not probe.available:
                pytest.skip(f"{kind} {word} cannot run here: {probe.reason}. {probe.cure}")
        folder = tmp_path_factory.mktemp("conformance")
        model = tiny_language_model(
            folder / "model", architecture=cls.architecture, tie_word_embeddings=cls.tie_word_embeddings
        )
        recipe = tiny_recipe(
            model,
            folder / "run",
            device=cls.device,
            model={"policy": dict(cls.policy)},
            backend={"name": cls.component, **cls.options},
            sampling={"temperature": TEMPERATURE, "max_new_tokens": 9},
            optimizer={"lr": 1e-2, "eps": 1e-6, "clip_grad": 1.0, "weight_decay": 0.1},
        )
        with Rank.join(cls.device, folder) as rank:
            rollouts = text_rollouts(rank.cast(recipe).policy, GROUPS)
            plain = plain_model(model)
            expected = plain_stats(plain, rollouts, TEMPERATURE)
            yield Bench(
                rank=rank,
                folder=folder,
                model=model,
                recipe=recipe,
                rollouts=rollouts,
                plain=plain,
                expected=ActionStats(
                    log_probs=expected.log_probs.detach(),
                    entropy=None if expected.entropy is None else expected.entropy.detach(),
                ),
                minibatch=check_minibatch(rollouts, expected.log_probs),
            )
