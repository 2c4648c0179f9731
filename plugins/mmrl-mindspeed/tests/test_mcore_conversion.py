"""Weights into Megatron's files and back, bit for bit, in every layout; what is wrong is said beforehand."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import weight_models
from mmrl_mindspeed.format_options import McoreOptions
from weight_models import VARIANTS, Variant, same, tensors

from mmrl_core.checkpoint.conversion import Conversion, convert
from mmrl_core.checkpoint.formats import detect_format, open_weights
from mmrl_core.checkpoint.initial_weights import load_initial
from mmrl_core.errors import ModelError

LAYOUTS: list[dict[str, Any]] = [
    {"tensor_parallel": 1, "pipeline_parallel": 1},
    {"tensor_parallel": 2, "pipeline_parallel": 1, "vocabulary_multiple": 128},
    {"tensor_parallel": 4, "pipeline_parallel": 2, "layers_per_stage": [4, 1]},
    {
        "tensor_parallel": 2,
        "pipeline_parallel": 3,
        "layers_per_stage": [1, 2, 2],
        "transformer_impl": "transformer_engine",
    },
    {"tensor_parallel": 1, "pipeline_parallel": 5, "iteration": 7},
]


def run(source: Path, target: Path, word: str, *, verify: bool = False, **options: Any) -> Path:
    """Convert; options that are fields of Conversion are, the others are the format's."""
    from mmrl_core.checkpoint.format_options import HuggingFaceOptions

    fields: dict[str, Any] = {"source_format": None, "model": None, "dtype": None}
    fields.update({key: options.pop(key) for key in list(options) if key in fields})
    kinds: dict[str, Callable[..., Any]] = {"mcore": McoreOptions, "hf": HuggingFaceOptions, "dcp": lambda: None}
    job = Conversion(
        source=source, target=target, target_format=word, options=kinds[word](**options), verify=verify, **fields
    )
    convert(job, lambda what, done, total: None)
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, Path]:
    root = tmp_path_factory.mktemp("models")
    return {variant: weight_models.write_model(root / str(variant), variant) for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_to_every_layout_and_back_is_bit_equal(models: dict[Variant, Path], tmp_path: Path, variant: Variant) -> None:
    own = tensors(models[variant])
    before = models[variant]
    for i, chosen in enumerate(LAYOUTS):  # each from the one before: re-splitting
        there = run(before, tmp_path / f"mcore{i}", "mcore", verify=True, **chosen)
        assert detect_format(there, "") == "mcore"
        back = run(there, tmp_path / f"hf{i}", "hf")
        assert same(tensors(back), own), chosen
        before = there
    dcp = run(before, tmp_path / "dcp", "dcp", verify=True)
    back = run(run(dcp, tmp_path / "last", "mcore", tensor_parallel=2), tmp_path / "end", "hf", shard_gb=1e-5)
    assert same(tensors(back), own)
    assert len(list(back.glob("*.safetensors"))) > 2


def test_files_are_where_and_what_megatron_expects(models: dict[Variant, Path], tmp_path: Path) -> None:
    source = models[Variant("qwen2", True)]
    target = run(source, tmp_path / "m", "mcore", tensor_parallel=2, pipeline_parallel=2, layers_per_stage=[2, 3])
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "release"
    ranks = sorted(p.name for p in (target / "release").iterdir())
    assert ranks == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    with torch.serialization.safe_globals([argparse.Namespace]):  # PyTorch's own reader, nothing else allowed
        last = torch.load(target / "release/mp_rank_01_001/model_optim_rng.pt", weights_only=True)
    assert set(last) == {"args", "checkpoint_version", "iteration", "model"}
    assert last["checkpoint_version"] == 3.0
    args = last["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.num_layer_list) == (2, 2, "2,3")
    assert (args.num_layers, args.num_query_groups, args.kv_channels, args.padded_vocab_size) == (5, 4, 6, 132)
    assert args.params_dtype == torch.float32
    layers = {name.split(".")[2] for name in last["model"] if name.startswith("decoder.layers.")}
    assert layers == {"0", "1", "2"}
    assert last["model"]["output_layer.weight"].shape == (66, 48)
    assert torch.equal(last["model"]["output_layer.weight"][65], torch.zeros(48))
    size = sum(t.nbytes for t in last["model"].values())
    assert (target / "release/mp_rank_01_001/model_optim_rng.pt").stat().st_size < size + 40_000
    target = run(source, tmp_path / "n", "mcore", iteration=12)
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "12"
    assert [p.name for p in (target / "iter_0000012").iterdir()] == ["mp_rank_00"]


def test_what_comes_with_a_model_goes_with_it(models: dict[Variant, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(models[Variant("llama", True)], source)
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.bin").write_text("")
    target = run(source, tmp_path / "m", "mcore", dtype=torch.bfloat16)
    assert sorted(p.name for p in (target / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    ]
    back = run(target, tmp_path / "hf", "hf")
    assert {p.name for p in back.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(back)
    assert loaded.dtype == torch.bfloat16
    own = tensors(source)
    assert all(torch.equal(t, own[n].bfloat16()) for n, t in tensors(back).items())
    shutil.rmtree(target / "hf")
    with pytest.raises(ModelError, match=r"Name the original Hugging Face folder with --model"):
        run(target, tmp_path / "x", "hf")
    again = run(target, tmp_path / "y", "hf", model=source)
    assert same(tensors(again), tensors(back))


def test_training_starts_from_megatrons_files(models: dict[Variant, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    variant = Variant("qwen3", True, shard="40KB")
    target = run(models[variant], tmp_path / "m", "mcore", tensor_parallel=2)
    shutil.rmtree(target / "hf")
    module = AutoModelForCausalLM.from_pretrained(models[variant])
    expected = {n: p.detach().clone() for n, p in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    load_initial(module, str(target), lambda name: name, model=str(models[variant]))
    assert all(torch.equal(p, expected[n]) for n, p in module.named_parameters())


# ------------------------------------------------------------------------------------------------ checkpoints of others


def saved_by_others(folder: Path, change: Callable[[dict[str, Any]], None], protocol: int = 2) -> None:
    """Every rank's file once more, by torch.save, after `change`."""
    for file in folder.glob("*/mp_rank_*/model_optim_rng.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file, pickle_protocol=protocol)


class Enum:
    """Some class that is not installed where the checkpoint is read."""

    def __init__(self) -> None:
        self.value = 3

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the checkpoint ran")


@pytest.mark.parametrize("protocol", [2, 4])
def test_checkpoints_of_a_training_run_are_read(models: dict[Variant, Path], tmp_path: Path, protocol: int) -> None:
    """As MindSpeed-LLM's converter and Megatron's training write them: defaultdicts, Parameters, classes of theirs, an
    optimizer, TransformerEngine's extra state, another pickle protocol."""
    from collections import defaultdict

    import numpy as np

    def change(content: dict[str, Any]) -> None:
        model: defaultdict[str, Any] = defaultdict(dict)
        model.update({n: torch.nn.Parameter(t) for n, t in content["model"].items()})
        model["decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.zeros(3, dtype=torch.uint8)
        model["decoder.final_layernorm._extra_state"] = None
        content["model"] = model
        content["args"].attention_backend = Enum()
        content["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]}
        content["rng_state"] = [{"np_rng_state": ("MT19937", np.arange(4)), "random_rng_state": (3, (1, 2), None)}]

    source = models[Variant("qwen2", False)]
    target = run(source, tmp_path / "m", "mcore", tensor_parallel=2)
    saved_by_others(target, change, protocol)
    assert same(tensors(run(target, tmp_path / "hf", "hf")), tensors(source))


def test_code_in_a_checkpoint_does_not_run(models: dict[Variant, Path], tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('code of the checkpoint ran')",))

    source = models[Variant("llama", False, shard="40KB")]
    target = run(source, tmp_path / "m", "mcore")
    saved_by_others(target, lambda content: content.update(extra=Boom()))
    assert same(tensors(run(target, tmp_path / "hf", "hf")), tensors(source))


# ------------------------------------------------------------------------------------------------------------- failures


def wrong_rank(target: Path) -> None:
    shutil.rmtree(target / "release" / "mp_rank_01_000")


def last_ranks(target: Path) -> None:
    for stage in range(2):
        shutil.rmtree(target / "release" / f"mp_rank_01_{stage:03d}")


def cut(target: Path) -> None:
    file = target / "release/mp_rank_00_001/model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-5000])


def no_file(target: Path) -> None:
    (target / "release/mp_rank_00_001/model_optim_rng.pt").unlink()


def no_folder(target: Path) -> None:
    (target / "latest_checkpointed_iteration.txt").write_text("40")


def experts(target: Path) -> None:
    (target / "release/mp_rank_00_001").rename(target / "release/mp_rank_00_001_000")


def virtual(target: Path) -> None:
    saved_by_others(target, lambda content: content.update(model0=content.pop("model")))


def lost(target: Path) -> None:
    saved_by_others(target, lambda content: content["model"].pop("decoder.layers.1.mlp.linear_fc2.weight"))


def extra(target: Path) -> None:
    saved_by_others(target, lambda content: content["model"].update({"decoder.other.weight": torch.zeros(2)}))


def reshaped(target: Path) -> None:
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    saved_by_others(target, lambda content: content["model"].update({name: content["model"][name][:-1].clone()}))


def other_args(target: Path) -> None:
    saved_by_others(target, lambda content: setattr(content["args"], "num_layers", 40))


def torch_dist(target: Path) -> None:
    shutil.rmtree(target / "release")
    (target / "release").mkdir()
    (target / "release" / ".metadata").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (wrong_rank, r"2 tensor-parallel x 2 pipeline ranks, but release lacks mp_rank_01_000"),
        (last_ranks, r"lacks mp_rank_01_000, mp_rank_01_001"),
        (cut, r"mp_rank_00_001/model_optim_rng.pt is cut short"),
        (no_file, r"mp_rank_00_001/model_optim_rng.pt cannot be read: FileNotFoundError"),
        (no_folder, r"names iter_0000040, which is not there"),
        (experts, r"mp_rank_00_001_000 is of an expert-parallel layout"),
        (virtual, r"virtual pipeline, which is not supported"),
        (lost, r"(?s)does not hold the weights.*missing: decoder.layers.1.mlp.linear_fc2.weight \(stage 0\)"),
        (extra, r"unexpected: decoder.other.weight \(stage 0, rank 0\)"),
        (reshaped, r"of another shape: decoder.layers.0.self_attention.linear_qkv.weight: \(79, 40\) on a rank"),
        (other_args, r"of a model with num_layers = 40; the config given for it says 5"),
        (torch_dist, r"distributed checkpoint: save it with --ckpt-format torch"),
    ],
)
def test_damaged_and_foreign_checkpoints(
    models: dict[Variant, Path], tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    source = models[Variant("llama", False, shard="40KB")]
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "layers_per_stage": [2, 3]}
    target = run(source, tmp_path / "m", "mcore", **layout)
    damage(target)
    with pytest.raises(ModelError, match=said):
        run(target, tmp_path / "out", "hf", source_format="mcore")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_checkpoint_of_another_model(models: dict[Variant, Path], tmp_path: Path) -> None:
    llama, qwen = models[Variant("llama", False, shard="40KB")], models[Variant("qwen3", False)]
    target = run(llama, tmp_path / "m", "mcore")
    with pytest.raises(ModelError, match=r"(?s)missing: decoder.layers.0.self_attention.q_layernorm.weight"):
        open_weights(target, model=qwen)
    with pytest.raises(ModelError, match=r"(?s)unexpected \(\d+\): .*q_norm"):
        run(qwen, tmp_path / "x", "mcore", model=llama)
    tied = run(models[Variant("qwen2", True)], tmp_path / "tied", "mcore", pipeline_parallel=5)
    saved_by_others(tied, lambda content: content["model"].get("output_layer.weight", torch.zeros(1)).add_(1))
    with pytest.raises(ModelError, match=r"differs from the embedding, but they are one tied weight"):
        run(tied, tmp_path / "y", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "tied"]


def test_layouts_that_do_not_divide_write_nothing(models: dict[Variant, Path], tmp_path: Path) -> None:
    source = models[Variant("qwen2", True)]
    for options in (
        {"tensor_parallel": 3},
        {"pipeline_parallel": 2},
        {"pipeline_parallel": 2, "layers_per_stage": [4, 2]},
    ):
        with pytest.raises(ModelError, match=r"^format mcore: "):
            run(source, tmp_path / "m", "mcore", **options)
    assert list(tmp_path.iterdir()) == []
