"""What one process can show of the backend `megatron`: models, precision, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_models import write_model
from mmrl_mindspeed.options import MegatronOptions
from pydantic import ValidationError

from mmrl_core.errors import BackendError, MmrlError, ModelError
from mmrl_core.testing.stage import Rank
from mmrl_core.testing.texts import (
    CheckLoss,
    check_minibatch,
    collected,
    plain_gradients,
    plain_model,
    plain_stats,
    relative_difference,
    text_rollouts,
    unequal,
)
from mmrl_core.testing.tiny import tiny_recipe

ROPES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 5000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0},
    "yarn with magnitudes": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 5000.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
}


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rank]:
    with Rank.join("cpu", tmp_path_factory.mktemp("rank")) as joined:
        yield joined


def recipe(model: Path, /, **sections: Any) -> dict[str, Any]:
    return tiny_recipe(
        model, model.parent / "run", sampling={"temperature": 0.8}, **{"backend": "megatron", **sections}
    )


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *(("llama", {"rope_parameters": dict(rope)}) for rope in ROPES.values()),
        ("llama", {"head_dim": 24, "num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    ],
    ids=[*ROPES, "heads of their own width", "qwen2 tied", "qwen3 untied"],
)
def test_models_are_those_of_transformers(rank: Rank, tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    """Log-probs, entropy and gradients are transformers' own, the weights come out as they went in."""
    folder = write_model(tmp_path / "model", family, layers=2, **config)
    cast = rank.cast(recipe(folder))
    backend = cast.backend()
    plain, rollouts = plain_model(folder), text_rollouts(cast.policy)
    expected = plain_stats(plain, rollouts, 0.8)
    stats = backend.replay(rollouts)
    assert (stats.log_probs - expected.log_probs).abs().max() <= 2e-6
    assert stats.entropy is not None
    assert expected.entropy is not None
    assert (stats.entropy - expected.entropy)[rollouts.mask].abs().max() <= 1e-5
    weights = collected(backend.export_weights())
    assert not unequal(weights, {name: plain.state_dict()[name] for name in weights})
    minibatch = check_minibatch(rollouts, expected.log_probs)
    found = collected(backend.gradients(minibatch, CheckLoss()))
    assert relative_difference(found, plain_gradients(plain, minibatch, CheckLoss(), 0.8)) <= 1e-5


def test_half_precision_trains_full_precision_weights(rank: Rank, tmp_path: Path) -> None:
    """In bfloat16 the optimizer starts from the checkpoint's own values, and steps too small for bfloat16 add up."""
    folder = write_model(tmp_path / "model", "llama", layers=2)
    stored = plain_model(folder).state_dict()
    for options in ({"distributed_optimizer": False}, {"distributed_optimizer": True}):
        cast = rank.cast(
            recipe(
                folder,
                backend={"name": "megatron", **options},
                model={"dtype": "bfloat16"},
                optimizer={"lr": 1e-5, "eps": 1e-8},
            )
        )
        backend: Any = cast.backend()
        norm = next(p for w, p in backend.work.named_shards() if w.name == "decoder.final_layernorm.weight")
        assert norm.dtype == torch.bfloat16
        main = backend.work.optimizer.main_values(norm).values
        assert torch.equal(main, stored["model.norm.weight"])
        rollouts = text_rollouts(cast.policy)
        exact = plain_stats(plain_model(folder), rollouts, 0.8).log_probs
        assert (backend.replay(rollouts).log_probs - exact).abs().max() < 0.1
        for _ in range(3):
            backend.update(check_minibatch(rollouts), CheckLoss())
        change = (main - stored["model.norm.weight"]).abs()
        # AdamW's first steps are lr long; where the bfloat16 gradient is next to nothing its sign may change
        assert torch.allclose(change.median(), torch.tensor(3e-5), rtol=0.1)
        assert change.max() < 3.3e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"virtual_pipeline": 2}, "micro_batch_groups"),
        ({"context_parallel": 2}, "sequence_parallel"),
        ({"sequence_parallel": True}, "tensor_parallel is 1"),
        ({"pipeline_parallel": 2, "layers_per_stage": [1, 1, 1]}, "one number a stage"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MegatronOptions(**options)


@pytest.mark.parametrize(
    ("config", "sections", "words"),
    [
        ({}, {"backend": {"name": "megatron", "tensor_parallel": 2}}, "multiple of 2 ranks"),
        ({}, {"model": {"lora": {"rank": 4}}}, "trains no adapters"),
        ({}, {"model": {"dtype": "float16"}}, "float32 or bfloat16"),
        ({}, {"model": {"policy": {"name": "causal_lm", "prefix_sharing": "on"}}}, "prefix_sharing must be auto"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {}, "'dynamic'"),
        ({"rope_parameters": dict(ROPES["yarn"])}, {"backend": {"name": "megatron", "attention": "megatron"}}, "sdpa"),
        ({"attention_bias": True}, {}, "attention_bias"),
        ({}, {"backend": {"name": "megatron", "layers_per_stage": [1]}}, "layers_per_stage"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_read(
    rank: Rank,
    tmp_path: Path,
    config: dict[str, Any],
    sections: dict[str, Any],
    words: str,
) -> None:
    folder = write_model(tmp_path / "model", "llama", layers=2, **config)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(MmrlError, match=words):
        rank.cast(recipe(folder, **sections)).backend()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "uneven", "words"),
    [
        (3, 1, None, "num_attention_heads = 4"),
        (4, 1, None, "num_key_value_heads = 2"),
        (1, 3, None, "does not divide the model's 2 layers"),
        (1, 2, [2, 1], "add up to the model's 2 layers"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(
    rank: Rank, tmp_path: Path, tensor: int, pipeline: int, uneven: list[int] | None, words: str
) -> None:
    """Heads and layers, with the number that does not fit, on the ranks that there are to be."""
    from mmrl_mindspeed.plan import text_plan

    cast = rank.cast(recipe(write_model(tmp_path / "model", "llama", layers=2)))
    options = MegatronOptions(tensor_parallel=tensor, pipeline_parallel=pipeline, layers_per_stage=uneven)
    with pytest.raises(ModelError, match=words):
        text_plan(cast.policy, options)


def test_checkpoint_of_another_model_is_refused(rank: Rank, tmp_path: Path) -> None:
    """The config says one model, the files hold another: names and shapes are compared before anything is trained."""
    folder = write_model(tmp_path / "model", "llama", layers=2)
    other = write_model(tmp_path / "other", "llama", layers=2, intermediate_size=64)
    (other / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"(?s)another shape.*gate_proj"):
        rank.cast(recipe(folder)).backend()


def test_network_is_not_shared(rank: Rank, tmp_path: Path) -> None:
    """`rollout: hf` as it is generates with a copy; asking for the training network is an error that says so."""
    folder = write_model(tmp_path / "model", "llama", layers=2)
    cast = rank.cast(recipe(folder))
    backend = cast.backend()
    assert cast.engine(backend).weights == "own"
    with pytest.raises(BackendError, match=r"rollout\.weights"), backend.inference_module():
        pass
    asked = rank.cast(recipe(folder, rollout={"name": "hf", "weights": "shared"}))
    with pytest.raises(MmrlError, match="weights: auto or own"):
        asked.engine(backend)


def test_every_option_is_on_the_page() -> None:
    """docs/how-to/megatron.md lists the options with their defaults: the generated reference has built-ins only."""
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "megatron.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", page.partition("## Options")[2], re.MULTILINE))
    defaults = MegatronOptions().model_dump()
    assert {name: json.loads(text) if text in ("null", "true", "false") else text for name, text in rows.items()} == {
        name: value if value is None or isinstance(value, bool) else str(value) for name, value in defaults.items()
    }
