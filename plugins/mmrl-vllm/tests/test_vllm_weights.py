"""New weights in a running engine: log-probs of the new ones, whatever was cached, tied or left out."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mmrl_vllm import engine as engine_module
from mmrl_vllm.probe import vllm
from mmrl_vllm.weights import names_of
from torch import Tensor

from mmrl_core.contracts import Bucket, GenerationRequest, Prompt, RolloutEngine, Rollouts
from mmrl_core.errors import RolloutError
from mmrl_core.grpo.collect import request
from mmrl_core.recipe import ModelSpec
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.texts import plain_model, plain_stats
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe

pytestmark = pytest.mark.skipif(not vllm().available, reason=vllm().reason)

TOLERANCE = 5e-5
LONG = Prompt(index=0, text="What is the sum of one and two and three? " * 8, origin="test 0")
"""Longer than two blocks of vLLM's cache on a CPU (128 tokens each)."""
SHORT = Prompt(index=1, text="3 + 4 =", origin="test 1")


@dataclass(kw_only=True)
class Bench:
    """An engine without a training backend, and transformers' copy of its model."""

    cast: Cast
    engine: Any
    plain: Any

    def generate(self, *prompts: Prompt, size: int = 4, **overrides: Any) -> Rollouts:
        requests = [request(0, 1, prompt, group, size) for group, prompt in enumerate(prompts)]
        return self.engine.generate(requests, self.cast.selection.sampling.model_copy(update=overrides))

    def error(self, rollouts: Rollouts, temperature: float = 1.0) -> float:
        """The largest difference from transformers' log-probs."""
        with torch.no_grad():
            expected = plain_stats(self.plain, rollouts, temperature).log_probs
        return (rollouts.behaviour_log_probs - expected)[rollouts.mask].abs().max().item()

    def perturb(self, seed: int, chosen: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Other weights, in transformers' copy too. Tied ones once."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.plain.named_parameters():
                if chosen(name):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.05 * parameter.abs().mean() * noise)
        return {name: parameter.detach().clone() for name, parameter in self.plain.named_parameters()}


def buckets(weights: dict[str, Tensor], size: int = 3) -> Iterator[Bucket]:
    items = list(weights.items())
    return (items[start : start + size] for start in range(0, len(items), size))


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rank]:
    with Rank.join("cpu", tmp_path_factory.mktemp("rank")) as rank:
        yield rank


def bench_of(rank: Rank, folder: Path, *, tied: bool, **rollout: Any) -> Bench:
    model = tiny_language_model(folder / "model", tie_word_embeddings=tied, head_dim=32, architecture="llama")
    recipe = tiny_recipe(
        model,
        folder / "run",
        rollout={"name": "vllm", "kv_cache_mb": 64, "max_num_seqs": 32, **rollout},
        sampling={"max_new_tokens": 12, "temperature": 1.0},
    )
    cast = rank.cast(recipe)
    return Bench(cast=cast, engine=cast.engine(None), plain=plain_model(model))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def bench(request: pytest.FixtureRequest, rank: Rank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = bench_of(rank, tmp_path_factory.mktemp("bench"), tied=request.param)
    yield made
    made.engine.close()


def test_log_probs_after_an_update_are_those_of_the_new_weights(bench: Bench) -> None:
    old = bench.generate(SHORT, LONG)
    assert bench.error(old) < TOLERANCE
    bench.engine.update_weights(buckets(bench.perturb(1)), 1)
    assert bench.error(old) > 100 * TOLERANCE, "the weights changed too little for this check"
    new = bench.generate(SHORT, LONG)
    assert new.policy_version == 1
    assert bench.error(new) < TOLERANCE


def test_a_change_of_the_embedding_alone_reaches_the_head(bench: Bench) -> None:
    bench.engine.update_weights(buckets(bench.perturb(2, lambda name: "embed" in name or "lm_head" in name)), 2)
    assert bench.error(bench.generate(SHORT, LONG)) < TOLERANCE


def test_a_stale_head_would_be_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two tests above are worth something: without the tied name the head stays as it was, and it shows."""
    names = bench.engine._names
    if not names.aliases:
        assert "lm_head.weight" in names.own
        return
    weights = bench.perturb(3)
    with monkeypatch.context() as planted:
        planted.setattr(bench.engine, "_names", replace(names, aliases={}))
        planted.setattr(engine_module, "release_packed", lambda model: None)  # it would end the stale copy too
        bench.engine.update_weights(buckets(weights), 3)
        assert bench.error(bench.generate(SHORT, LONG)) > 10 * TOLERANCE
    bench.engine.update_weights(buckets(weights), 3)
    assert bench.error(bench.generate(SHORT, LONG)) < TOLERANCE


def test_temperature_is_in_the_log_probs(bench: Bench) -> None:
    assert bench.error(bench.generate(SHORT, LONG, temperature=0.6), 0.6) < TOLERANCE


@pytest.mark.parametrize("change", ["left out", "unknown", "twice"])
def test_a_stream_that_does_not_fit_is_refused(bench: Bench, change: str) -> None:
    weights = list(bench.perturb(4).items())
    stream = {
        "left out": weights[:3] + weights[4:],
        "unknown": [*weights, ("model.layers.9.mlp.down_proj.weight", torch.zeros(2, 2))],
        "twice": [*weights, weights[3]],
    }[change]
    said = weights[3][0] if change == "left out" else stream[-1][0]
    with pytest.raises(RolloutError, match=said.replace(".", r"\.")):
        bench.engine.update_weights(iter([stream]), 4)
    bench.engine.update_weights(iter([weights]), 4)
    assert bench.error(bench.generate(SHORT)) < TOLERANCE


def test_keys_of_the_old_weights_are_not_used_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """`update_weights` resets the prefix cache, and without that the old keys would show."""
    engine = bench.engine
    forget = engine._forget_prefixes
    bench.generate(LONG)
    weights = bench.perturb(5)
    monkeypatch.setattr(engine, "_forget_prefixes", lambda: None)
    engine.update_weights(buckets(weights), 5)
    assert bench.error(bench.generate(LONG)) > TOLERANCE, "nothing was cached: the test below proves nothing"
    monkeypatch.setattr(engine, "_forget_prefixes", forget)
    bench.generate(LONG)
    weights = bench.perturb(6)
    engine.update_weights(buckets(weights), 6)
    monkeypatch.setattr(engine, "_forget_prefixes", lambda: None)  # what `generate` does by itself
    assert bench.error(bench.generate(LONG)) < TOLERANCE


def test_a_group_computes_its_prompt_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    generate = bench.engine._llm.generate
    monkeypatch.setattr(bench.engine._llm, "generate", lambda *a, **k: seen.extend(generate(*a, **k)) or seen)
    bench.generate(LONG, size=4)
    cached = [output.num_cached_tokens for output in seen]
    assert cached[0] == 0
    assert min(cached[1:]) >= 128, "whole blocks of 128 tokens come from the cache"


def test_what_does_not_fit_is_refused_before_anything_is_sampled(bench: Bench) -> None:
    with pytest.raises(RolloutError, match=r"test 0: a prompt of \d+ tokens .* rollout.max_model_len"):
        bench.generate(LONG, max_new_tokens=500)
    with pytest.raises(RolloutError, match=r"temperature 0\.001"):
        bench.generate(SHORT, temperature=0.001)


def test_the_process_is_left_as_it_was(bench: Bench) -> None:
    """vLLM seeds generators, stops torch.set_num_threads and, when it ends, leaves the process group."""
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_num_threads(), torch.set_num_threads
    generator = torch.get_rng_state()
    engine: RolloutEngine = bench.cast.engine(None)
    assert bench.cast.context.seed != 5
    engine.generate([request(0, 1, SHORT, 0, 2)], bench.cast.selection.sampling)
    engine.close()
    engine.close()
    del engine
    gc.collect()
    assert (random.getstate(), torch.get_num_threads(), torch.set_num_threads) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.distributed.is_initialized(), "the process group belongs to the run"
    bench.generate(SHORT)


def test_other_first_weights_reach_the_engine(rank: Rank, tmp_path: Path) -> None:
    """`model.init_from`: vLLM reads `model.path`, whose weights are replaced."""
    first = tiny_language_model(tmp_path / "model", head_dim=32)
    other = tiny_language_model(tmp_path / "other", head_dim=32, seed=7)
    recipe = tiny_recipe(
        first,
        tmp_path / "run",
        model={"init_from": str(other)},
        rollout={"name": "vllm", "kv_cache_mb": 64, "max_num_seqs": 8},
    )
    cast = rank.cast(recipe)
    made = Bench(cast=cast, engine=cast.engine(None), plain=plain_model(other))
    try:
        assert made.error(made.generate(SHORT)) < TOLERANCE
    finally:
        made.engine.close()


def test_names_come_from_the_config_alone(tmp_path: Path) -> None:
    model = tiny_language_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    recipe = tiny_recipe(model, tmp_path / "run")
    names = names_of(ModelSpec(path=recipe["model"]["path"]))
    assert names.aliases == {"model.embed_tokens.weight": ("lm_head.weight",)}
    assert "lm_head.weight" not in names.own
    assert "model.layers.1.mlp.down_proj.weight" in names.own


def test_requests_of_a_step_are_answered_in_order(bench: Bench) -> None:
    requests: list[GenerationRequest] = [request(0, 3, SHORT, g, 3) for g in (4, 1, 7)]
    rollouts = bench.engine.generate(requests, bench.cast.selection.sampling)
    assert rollouts.group_id.tolist() == [4, 4, 4, 1, 1, 1, 7, 7, 7]
