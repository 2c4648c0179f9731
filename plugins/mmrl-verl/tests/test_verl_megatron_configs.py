"""From a recipe's options to verl's own config objects, and what is refused before verl's engine is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from mmrl_verl import megatron_engine
from mmrl_verl.building import Plan, quietly
from mmrl_verl.megatron_backend import VerlMegatronBackend
from mmrl_verl.megatron_options import VerlMegatronOptions
from verl.workers.config import McoreEngineConfig, McoreOptimizerConfig

from mmrl_core.contracts import TrainingSpec
from mmrl_core.errors import BackendError
from mmrl_core.testing.stage import TOTAL_UPDATES, Cast, Rank
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe

NAME = "verl-megatron"


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rank]:
    folder = tmp_path_factory.mktemp("configs")
    tiny_language_model(folder / "model", architecture="llama")
    with Rank.join("cpu", folder) as joined:
        yield joined


def cast(rank: Rank, options: Mapping[str, Any] | None = None, **sections: Any) -> Cast:
    recipe = {
        "model": {"path": str(rank.folder / "model"), "policy": "causal_lm", "dtype": "bfloat16"},
        "optimizer": {"lr": 2e-6, "weight_decay": 0.02, "betas": (0.8, 0.95), "eps": 1e-7, "clip_grad": 0.5},
        **sections,
    }
    return rank.cast(
        tiny_recipe(rank.folder / "model", rank.folder / "run", backend={"name": NAME, **(options or {})}, **recipe)
    )


def plan(rank: Rank, options: Mapping[str, Any] | None = None, *, trained: bool = True, **sections: Any) -> Plan[Any]:
    made = cast(rank, options, **sections)
    return Plan(
        context=made.context,
        policy=made.policy,
        training=TrainingSpec(optimizer=made.recipe.optimizer, total_updates=TOTAL_UPDATES, reference=False),
        options=VerlMegatronOptions.model_validate(options or {}),
        trained=trained,
    )


def changed(config: Any, default: Any) -> dict[str, Any]:
    """The fields that are not verl's defaults."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }


def made(rank: Rank, options: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    with quietly():
        return megatron_engine.configs(plan(rank, options, **settings))


DROPOUT = {"sequence_parallel": False, "attention_dropout": 0.0, "hidden_dropout": 0.0}


def test_defaults_are_those_of_verl(rank: Rank) -> None:
    """But for what this table says: what a field that is not in it means is verl's business."""
    with quietly():
        default = McoreEngineConfig()
    assert changed(made(rank)["engine_config"], default) == {
        "use_dynamic_bsz": False,
        "seed": 0,
        "dist_ckpt_optim_fully_reshardable": True,
        "vanilla_mbridge": True,
        "override_ddp_config": {"check_for_nan_in_grad": False},
        "override_transformer_config": DROPOUT,
    }


def test_every_option_arrives(rank: Rank) -> None:
    options = {
        "tensor_parallel": 4,
        "pipeline_parallel": 2,
        "sequence_parallel": True,
        "distributed_optimizer": False,
        "remove_padding": False,
        "activation_checkpointing": True,
        "entropy_chunk_tokens": 128,
        "bridge": "megatron-bridge",
        "transformer": {"attention_backend": "flash"},
    }
    found = made(rank, options)
    with quietly():
        default = McoreEngineConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2)
    assert changed(found["engine_config"], default) == {
        "use_distributed_optimizer": False,
        "use_remove_padding": False,
        "use_dynamic_bsz": False,
        "entropy_from_logits_with_chunking": True,
        "entropy_from_logits_chunk_size": 128,
        "seed": 0,
        "dist_ckpt_optim_fully_reshardable": True,
        "override_ddp_config": {"check_for_nan_in_grad": False},
        "override_transformer_config": {
            **DROPOUT,
            "sequence_parallel": True,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            "attention_backend": "flash",
        },
    }
    assert found["engine_config"].sequence_parallel
    assert not found["model_config"].use_remove_padding
    covered = set(options) | {"micro_batch_samples", "offload"}  # of batches, and of phases of a step
    assert covered == set(VerlMegatronOptions.model_fields)


def test_the_recipes_optimizer_arrives(rank: Rank) -> None:
    found = changed(made(rank)["optimizer_config"], McoreOptimizerConfig())
    assert found == {
        "lr": 2e-6,
        "weight_decay": 0.02,
        "betas": (0.8, 0.95),
        "clip_grad": 0.5,
        "total_training_steps": TOTAL_UPDATES,
        "override_optimizer_config": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-7},
    }


def test_the_reference_only_runs_forward(rank: Rank) -> None:
    found = made(rank, {"activation_checkpointing": True}, trained=False)["engine_config"]
    assert found.forward_only
    assert "recompute_granularity" not in found.override_transformer_config


@pytest.mark.parametrize(
    ("options", "sections", "said"),
    [
        ({"tensor_parallel": 2}, {}, "= 2 ranks hold one copy of the model, and the run has 1 rank"),
        ({}, {"lora": {"rank": 4, "alpha": 8.0}}, "trains no adapters"),
        ({}, {"init_from": "elsewhere"}, "starts from model.path alone"),
    ],
)
def test_what_is_refused(rank: Rank, options: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    model = {"path": str(rank.folder / "model"), "policy": "causal_lm", "dtype": "bfloat16", **sections}
    with pytest.raises(BackendError, match=said):
        megatron_engine.build(plan(rank, options, model=model), NAME)


def test_a_missing_bridge_is_refused(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_engine, "bridge_is_here", lambda word: False)
    with pytest.raises(BackendError, match="bridge: megatron-bridge is not installed"):
        megatron_engine.build(plan(rank, {"bridge": "megatron-bridge"}), NAME)


def test_rotary_scaling_that_mbridge_would_lose_is_refused(rank: Rank) -> None:
    """transformers 5 keeps it in `rope_parameters`, where mbridge does not look."""
    from transformers import LlamaConfig

    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(rope_parameters={**scaled, "original_max_position_embeddings": 512})
    with pytest.raises(BackendError, match=r"scales its rotary embeddings \(llama3\)"):
        megatron_engine._check_rotary(config, VerlMegatronOptions(), NAME)
    megatron_engine._check_rotary(config, VerlMegatronOptions(bridge="megatron-bridge"), NAME)
    megatron_engine._check_rotary(LlamaConfig(), VerlMegatronOptions(), NAME)


def test_the_wrong_device_and_precision_are_refused(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a program asks for the backend without a recipe's checks."""
    with pytest.raises(BackendError, match="runs on the device cuda, and the recipe's is cpu"):
        cast(rank).backend()
    monkeypatch.setattr(VerlMegatronBackend, "device", "cpu")
    model = {"path": str(rank.folder / "model"), "policy": "causal_lm", "dtype": "float32"}
    with pytest.raises(BackendError, match=r"trains in bfloat16, and model\.dtype is float32"):
        cast(rank, model=model).backend()
