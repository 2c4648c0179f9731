"""Architectures out of configs, and the layout of their tensors: inverse of itself, for every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmrl_mindspeed import layout
from mmrl_mindspeed.architecture import Architecture, architecture

from mmrl_core.errors import ModelError


def config(family: str, **changes: Any) -> dict[str, Any]:
    values = {
        "model_type": family,
        "vocab_size": 131,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def arch_of(family: str, **changes: Any) -> Architecture:
    return architecture(config(family, **changes), "config.json")


# -------------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_config_of_transformers_is_read_as_transformers_reads_it(family: str) -> None:
    import transformers

    kind = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[family]
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    for given in (
        {},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128},
        {"rope_parameters": scaling},
    ):
        theirs = getattr(transformers, kind)(**given)
        arch = architecture(theirs.to_dict(), "config.json")
        assert (arch.layers, arch.hidden, arch.heads) == (
            theirs.num_hidden_layers,
            theirs.hidden_size,
            theirs.num_attention_heads,
        )
        assert arch.kv_heads == theirs.num_key_value_heads
        own = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert arch.head_dim == own
        assert (arch.qkv_bias, arch.qk_norm) == (family == "qwen2", family == "qwen3")
        if given.get("rope_parameters"):
            assert (arch.rope_theta, arch.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})
        else:
            assert (arch.rope_theta, arch.rope_scaling) == (10000.0, None)


def test_configs_of_transformers_4_and_what_they_leave_out() -> None:
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    arch = arch_of("llama", rope_theta=5e5, rope_scaling=scaling, head_dim=None, hidden_size=40)
    assert arch.rope_theta == 5e5
    assert arch.rope_scaling == {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    assert arch.head_dim == 5
    assert arch_of("llama", num_key_value_heads=None).kv_heads == 8
    assert arch_of("qwen3", head_dim=None).head_dim == 128


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is none of llama, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias = True asks for a bias on the output projection"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
    ],
)
def test_what_megatron_cannot_express_is_refused_by_field_and_value(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=rf"^/m/config.json: .*{said}"):
        architecture(
            {**config("llama"), **changes}
            if changes.get("num_hidden_layers", 1) is not None
            else config("llama", **changes),
            "/m/config.json",
        )


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_merge_shard_unshard_split_is_the_identity(family: str, tied: bool, pipeline: int) -> None:
    arch = arch_of(family, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(1)
    seen: set[str] = set()
    for weight in layout.weights(arch, pipeline_parallel=pipeline):
        parts = [torch.randn(layout.source_shape(n, arch), generator=generator) for n in weight.sources]
        full = layout.merge(weight, parts, arch)
        assert tuple(full.shape) == layout.full_shape(weight, arch)
        for ranks in (1, 2, 4):
            padded = layout.padded_vocabulary(arch.vocab, ranks, 8)
            assert padded >= arch.vocab
            assert padded % (8 * ranks) == 0
            shards = [layout.shard(weight, full, r, ranks, padded_vocab=padded) for r in range(ranks)]
            expected = layout.shard_shape(weight, arch, ranks, padded_vocab=padded)
            assert {tuple(s.shape) for s in shards} == {expected}
            again = layout.split(weight, layout.unshard(weight, shards, arch), arch)
            assert all(torch.equal(a, b) for a, b in zip(again, parts, strict=True)), weight.name
        seen |= set(weight.sources)
    assert len(seen) == 2 + (not tied) + arch.layers * {"llama": 9, "qwen2": 12, "qwen3": 11}[family]
    names = [w.name for w in layout.weights(arch, pipeline_parallel=pipeline)]
    assert ("output_layer.weight" in names) == (not tied or pipeline > 1)
    assert len(set(names)) == len(names)


def test_rows_of_a_key_value_group_stand_together() -> None:
    """Megatron's order: the queries of a group, its key, its value."""
    arch = arch_of("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=1)
    weight = next(w for w in layout.weights(arch, pipeline_parallel=1) if w.kind == "qkv")
    q, k, v = (torch.tensor(rows).reshape(-1, 1) for rows in ([1, 2, 3, 4], [10, 20], [100, 200]))
    assert layout.merge(weight, [q, k, v], arch).flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"tensor_parallel": 3},
            r"tensor_parallel = 3 does not divide the model's num_attention_heads = 8. .*: 1, 2, 4$",
        ),
        ({"tensor_parallel": 8}, r"num_key_value_heads = 4"),
        ({"pipeline_parallel": 2}, r"does not divide the model's 5 layers"),
        ({"pipeline_parallel": 2, "uneven": [3, 3]}, r"add up to the model's 5 layers"),
        ({"pipeline_parallel": 2, "uneven": [5]}, r"must be 2 numbers"),
        ({"pipeline_parallel": 2, "uneven": [5, 0]}, r"at least 1"),
        ({"tensor_parallel": 0}, r"tensor_parallel = 0"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(given: dict[str, Any], said: str) -> None:
    values = {"tensor_parallel": 1, "pipeline_parallel": 1, "uneven": None, **given}
    with pytest.raises(ModelError, match=f"^here: .*{said}"):
        layout.check_layout(arch_of("llama"), **values, where="here")


def test_stages_follow_each_other() -> None:
    assert layout.stage_layers(6, 3, None) == [range(0, 2), range(2, 4), range(4, 6)]
    assert layout.stage_layers(5, 2, [2, 3]) == [range(0, 2), range(2, 5)]
