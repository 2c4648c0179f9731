"""Wan transformers between diffusers, MindSpeed-MM and DCP, bit for bit, text to video and image to video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import wan_models
from mmrl_mindspeed.format_options import MindSpeedMmOptions
from mmrl_mindspeed.wan_names import to_diffusers, to_mindspeed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from wan_models import WANS
from weight_models import same, tensors

from mmrl_core.checkpoint.conversion import Conversion, convert
from mmrl_core.checkpoint.format_options import HuggingFaceOptions
from mmrl_core.checkpoint.formats import detect_format
from mmrl_core.errors import ModelError

pytest.importorskip("diffusers")


def run(source: Path, target: Path, word: str, *, model: Path | None = None, **options: Any) -> Path:
    kinds: dict[str, Any] = {"mindspeed-mm": MindSpeedMmOptions, "hf": HuggingFaceOptions, "dcp": lambda: None}
    job = Conversion(
        source=source,
        target=target,
        source_format=None,
        target_format=word,
        options=kinds[word](**options),
        model=model,
        dtype=None,
        verify=True,
    )
    convert(job, lambda what, done, total: None)
    return target


@pytest.mark.parametrize("name", sorted(WANS))
def test_there_and_back_is_bit_equal(tmp_path: Path, name: str) -> None:
    from diffusers import WanTransformer3DModel

    source = wan_models.write_wan(tmp_path / "hf", name, torch.bfloat16, shard="20KB")
    own = tensors(source)
    before = source
    for i, options in enumerate(({}, {"storage": "dcp"}, {"layers_per_stage": [2, 1]})):
        there = run(before, tmp_path / f"mm{i}", "mindspeed-mm", **options)
        assert detect_format(there, "") == "mindspeed-mm"
        before = there
    before = run(before, tmp_path / "dcp", "dcp")
    back = run(before, tmp_path / "back", "hf", shard_gb=2e-5)
    assert same(tensors(back), own)
    network = WanTransformer3DModel.from_pretrained(back, torch_dtype=torch.bfloat16)
    assert all(torch.equal(p, own[n]) for n, p in network.named_parameters())


def test_names_are_those_of_mindspeed_mm(tmp_path: Path) -> None:
    """Against the original names of Wan where MindSpeed-MM keeps them, and its own where it does not."""
    source = wan_models.write_wan(tmp_path / "hf", "wan2.1-flf2v")
    target = run(source, tmp_path / "mm", "mindspeed-mm")
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "release"
    content = torch.load(target / "release/mp_rank_00/model_optim_rng.pt", weights_only=True)
    stored = content["model"]
    block = {n.removeprefix("blocks.2.") for n in stored if n.startswith("blocks.2.")}
    both, leaves = ("self_attn", "cross_attn"), ("weight", "bias")
    attention = {f"{a}.proj_{x}.{leaf}" for a in both for x in ("q", "k", "v", "out") for leaf in leaves}
    norms = {f"{a}.{x}_norm.weight" for a in both for x in "qk"} | {"cross_attn.k_norm_img.weight"}
    image = {f"cross_attn.{x}_img.{leaf}" for x in "kv" for leaf in leaves}
    rest = {"modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"}
    assert block == attention | norms | image | rest
    outside = {n for n in stored if not n.startswith("blocks.")}
    modules = ["patch_embedding", "text_embedding.linear_1", "text_embedding.linear_2", "time_embedding.0"]
    modules += ["time_embedding.2", "time_projection.1", "head.head", *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4))]
    expected = {f"{m}.{leaf}" for m in modules for leaf in ("weight", "bias")} | {"head.modulation", "img_emb.emb_pos"}
    assert outside == expected
    own = tensors(source)
    assert torch.equal(stored["blocks.1.cross_attn.proj_k.weight"], own["blocks.1.attn2.to_k.weight"])
    assert torch.equal(stored["img_emb.proj.4.bias"], own["condition_embedder.image_embedder.norm2.bias"])
    assert torch.equal(stored["head.modulation"], own["scale_shift_table"])
    assert all(to_diffusers(to_mindspeed(n, ""), "") == n for n in own)


def test_dcp_is_what_mindspeed_mm_loads_and_saves(tmp_path: Path) -> None:
    """PyTorch's own tools read what is written; what a training run saved, behind its prefix and with an optimizer, is
    read here."""
    source = wan_models.write_wan(tmp_path / "hf", "wan2.1-t2v")
    target = run(source, tmp_path / "mm", "mindspeed-mm", storage="dcp")
    dcp_to_torch_save(target / "release", tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=False)
    own = tensors(source)
    assert plain["checkpoint_version"] == 3.0
    assert {to_diffusers(n, ""): t.sum() for n, t in plain["model"].items()} == {n: t.sum() for n, t in own.items()}
    saved = tmp_path / "run"
    model = {f"predictor.{n}": t for n, t in plain["model"].items()}
    state = {"model": model, "optimizer": {"exp_avg": {"patch_embedding.weight": torch.zeros(3)}}, "iteration": 30}
    dcp.save(state, checkpoint_id=saved / "iter_0000030")
    (saved / "latest_checkpointed_iteration.txt").write_text("30")
    back = run(saved, tmp_path / "back", "hf", model=source)
    assert same(tensors(back), own)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = wan_models.write_wan(tmp_path / "hf", "wan2.1-t2v")
    with pytest.raises(ModelError, match=r"layers_per_stage = \[2, 2\] must add up to the transformer's 3 blocks"):
        run(source, tmp_path / "x", "mindspeed-mm", layers_per_stage=[2, 2])
    with pytest.raises(ModelError, match=r"with dcp leave it out"):
        run(source, tmp_path / "x", "mindspeed-mm", layers_per_stage=[2, 1], storage="dcp")
    target = run(source, tmp_path / "mm", "mindspeed-mm", layers_per_stage=[2, 1])
    other = wan_models.write_wan(tmp_path / "other", "wan2.1-i2v")
    with pytest.raises(ModelError, match=r"(?s)missing \(\d+\): .*image_embedder"):
        run(target, tmp_path / "x", "hf", model=other)
    file = target / "release/mp_rank_00_001/model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="is cut short"):
        run(target, tmp_path / "x", "hf")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))
