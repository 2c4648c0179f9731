"""Which files are read, and what is said of all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hpsv2_tiny
import pytest
import torch
from mmrl_hpsv2.checkpoint import read_checkpoint
from mmrl_hpsv2.network import build, entries, renamed, shape_of
from safetensors.torch import save_file

from mmrl_core.errors import RewardError

State = hpsv2_tiny.State


def load(path: Path, **heads: int | None) -> Any:
    """The network, as the reward makes it."""
    state = read_checkpoint(path)
    shape = shape_of(state, path, **{**hpsv2_tiny.HEADS, **heads})
    return build(shape, renamed(state, path, shape, torch.float32))


# ----------------------------------------------------------------------------------------------------------- right ones


def test_every_tensor_becomes_a_parameter_once(checkpoint: Path, state: State) -> None:
    network = load(checkpoint)
    shape = shape_of(state, checkpoint, **hpsv2_tiny.HEADS)
    assert {e.name for e in entries(shape)} == set(state)
    targets = [target for e in entries(shape) for target in e.targets]
    assert len(targets) == len(set(targets))
    assert set(targets) == {name for name, _ in network.named_parameters()}
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in state.values())


def test_sizes_come_from_the_shapes(tmp_path: Path) -> None:
    size = hpsv2_tiny.Size(image=48, patch=8, vision=24, vision_layers=3, text=16, text_layers=1, embed=8, context=20)
    path = hpsv2_tiny.write_checkpoint(tmp_path / "x.pt", hpsv2_tiny.parameters(size))
    config = load(path, vision_head_width=8, text_heads=4).config
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (48, 8, 24, 3)
    assert (vision.num_attention_heads, vision.intermediate_size, vision.hidden_act) == (3, 96, "gelu")
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (16, 1, 4)
    assert (text.max_position_embeddings, text.vocab_size, config.projection_dim) == (20, size.vocabulary, 8)


def test_tensors_by_name_without_a_state_dict(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "flat.pt")
    save_file(state, tmp_path / "flat.safetensors")
    for name in ("flat.pt", "flat.safetensors"):
        assert set(read_checkpoint(tmp_path / name)) == set(state)


def test_the_old_file_format_of_torch(state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert set(read_checkpoint(tmp_path / "old.pt")) == set(state)


def test_weights_outlive_the_file(checkpoint: Path, state: State, tmp_path: Path) -> None:
    """Nothing stays mapped from a file that may be replaced during the run."""
    copy = tmp_path / "copy.pt"
    copy.write_bytes(checkpoint.read_bytes())
    network = load(copy)
    with copy.open("r+b") as file:
        file.write(b"\0" * copy.stat().st_size)
    assert torch.equal(network.visual_projection.weight, state["visual.proj"].T)
    assert torch.equal(network.vision_model.embeddings.class_embedding, state["visual.class_embedding"])


# ---------------------------------------------------------------------------------------------------------- wrong files


def html(path: Path, good: bytes) -> None:
    path.write_text("<!DOCTYPE html>\n<html><body>Not found</body></html>")


def empty(path: Path, good: bytes) -> None:
    path.write_bytes(b"")


def pointer(path: Path, good: bytes) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def truncated(path: Path, good: bytes) -> None:
    path.write_bytes(good[: len(good) // 2])


def noise(path: Path, good: bytes) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def pickled(path: Path, good: bytes) -> None:
    torch.save({"state_dict": {}, "args": Path("x")}, path)


def folder(path: Path, good: bytes) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (html, "web page"),
        (empty, "is empty"),
        (pointer, "Git LFS pointer"),
        (truncated, r"\d+ bytes\) cannot be read"),
        (noise, "cannot be read"),
        (pickled, "holds more than tensors"),
        (folder, "is not a file"),
        (lambda path, good: None, "does not exist"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_not_a_checkpoint(
    checkpoint: Path, tmp_path: Path, write: Callable[[Path, bytes], None], reason: str, suffix: str
) -> None:
    path = tmp_path / f"file{suffix}"
    write(path, checkpoint.read_bytes())
    with pytest.raises(RewardError, match=reason) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "Cure: " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"epoch": 3, "optimizer": {}}, "'epoch' is a int"),
        ({"state_dict": {"a": torch.ones(2), "b": 1.0}}, "'b' is a float"),
        ({"state_dict": {"a": torch.ones(2, dtype=torch.int8)}}, "'a' is of torch.int8"),
    ],
)
def test_what_does_not_hold_tensors_by_name(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(RewardError, match=reason):
        read_checkpoint(tmp_path / "x.pt")


# ------------------------------------------------------------------------------------------------------- wrong networks


def without(name: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k != name}


def reshaped(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(*shape)}


BLOCK = "visual.transformer.resblocks.1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {}, "no 'visual.conv1.weight'.*it has nothing"),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, "no 'visual.conv1.weight'.*'module.positional"),
        (without("text_projection"), "missing: 'text_projection'"),
        (without("logit_scale"), "missing: 'logit_scale'"),
        (without(f"{BLOCK}.attn.in_proj_bias"), f"missing: '{BLOCK}.attn.in_proj_bias'"),
        (without("visual.transformer.resblocks.0.mlp.c_fc.weight"), "no 'visual.transformer.resblocks.0.mlp.c_fc"),
        (lambda state: {**state, "rm_head.0.weight": torch.ones(2)}, "unexpected: 'rm_head.0.weight'"),
        (lambda state: {**state, "visual.ln_pre.more": torch.ones(2)}, "unexpected: 'visual.ln_pre.more'"),
        (
            lambda state: {(k.replace(".1.", ".7.") if k.startswith(BLOCK) else k): v for k, v in state.items()},
            r"missing: '.*resblocks\.1\..* and 8 more; unexpected: '.*resblocks\.7\.",
        ),
        (reshaped("visual.proj", 41, 24), r"'visual.proj' has shape \(41, 24\), expected \(40, 24\)"),
        (reshaped("text_projection", 32, 25), r"'text_projection' has shape \(32, 25\), expected \(32, 24\)"),
        (reshaped("logit_scale", 1), r"'logit_scale' has shape \(1,\), expected \(\)"),
        (reshaped(f"{BLOCK}.mlp.c_proj.weight", 40, 8), rf"'{BLOCK}.mlp.c_proj.weight' has shape \(40, 8\), expected"),
        (reshaped("visual.conv1.weight", 40, 3, 14, 7), r"\(40, 3, 14, 7\), expected \(40, 3, 14, 14\)"),
        (reshaped("visual.conv1.weight", 40, 3), r"'visual.conv1.weight' has shape \(40, 3\); 4 dimensions"),
        (reshaped("visual.positional_embedding", 6, 40), "has 6 rows, which is not one more than a square"),
        (reshaped("visual.positional_embedding", 1, 40), "has 1 rows"),
    ],
)
def test_another_network_is_named(state: State, tmp_path: Path, change: Callable[[State], State], reason: str) -> None:
    path = hpsv2_tiny.write_checkpoint(tmp_path / "other.pt", change(state))
    with pytest.raises(RewardError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "Cure: " in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        ({"vision_head_width": None}, "image tower is 40 wide .published: 1280.*give the option vision_head_width"),
        ({"text_heads": None}, "text tower is 32 wide .published: 1024.*give the option text_heads"),
        ({"vision_head_width": 7}, "vision_head_width 7 does not divide the width 40"),
        ({"text_heads": 5}, "text_heads 5 does not divide the width 32"),
    ],
)
def test_heads_that_are_unknown_or_impossible(checkpoint: Path, heads: dict[str, int | None], reason: str) -> None:
    with pytest.raises(RewardError, match=reason):
        load(checkpoint, **heads)


def test_a_code_carrying_file_runs_nothing(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.write_text, (tmp_path / "trapped", "x"))

    (tmp_path / "trap.pt").write_bytes(pickle.dumps({"state_dict": Trap()}))
    with pytest.raises(RewardError, match="cannot be read"):
        read_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "trapped").exists()


def test_names_are_those_of_a_clip_checkpoint_written_by_transformers(checkpoint: Path, tmp_path: Path) -> None:
    """The result is an ordinary CLIPModel: saved and loaded again it computes the same."""
    from transformers import CLIPModel

    network = load(checkpoint)
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    again, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pixels = torch.rand(2, 3, 28, 28)
    mine, theirs = (n.vision_model(pixel_values=pixels).pooler_output for n in (network, again))
    torch.testing.assert_close(mine, theirs)
