"""Layouts of the checkpoint that are accepted, and what is said about files that cannot be used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmrl_hpsv3.options import HpsV3Options
from mmrl_hpsv3.reward import HpsV3
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrl_core import Sample
from mmrl_core.errors import RewardError

Tensors = dict[str, Tensor]
Make = Callable[..., Sample]


def set_up(checkpoint: str | Path, base: str | Path) -> HpsV3:
    made = HpsV3(HpsV3Options(checkpoint=str(checkpoint), base=str(base)))
    made.setup("cpu")
    return made


def refusal(files: dict[str, str]) -> str:
    with pytest.raises(RewardError) as caught:
        set_up(**files)
    message = str(caught.value)
    assert "Cure: " in message
    return message


def as_transformers_5_spells(name: str) -> str:
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return "model." + name if name.startswith("visual.") else name


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        (".safetensors", lambda tensors: {"model." + name: tensor for name, tensor in tensors.items()}),
        (".safetensors", lambda tensors: {as_transformers_5_spells(name): t for name, t in tensors.items()}),
        (".safetensors", lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"}),
        (".safetensors", lambda tensors: {name: tensor.float() for name, tensor in tensors.items()}),
        (".pt", lambda tensors: tensors),
        (".pth", lambda tensors: {"model": tensors, "step": 3}),
    ],
    ids=["prefix", "transformers-5", "no-lm-head", "float32", "pt", "pt-entry"],
)
def test_the_same_weights_in_other_layouts_score_the_same(
    tiny: dict[str, str],
    reward: HpsV3,
    sample: Make,
    tmp_path: Path,
    suffix: str,
    change: Callable[[Tensors], dict[str, Any]],
) -> None:
    content = change(load_file(tiny["checkpoint"]))
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(content, file)
    samples = [sample(0, (64, 64), "a cat"), sample(1, (30, 90), "a dog")]
    assert set_up(file, tiny["base"]).score(samples) == reward.score(samples)


def test_weights_of_the_base_are_not_read(copied: dict[str, str], reward: HpsV3, sample: Make) -> None:
    (Path(copied["base"]) / "model.safetensors").write_bytes(b"no weights")
    samples = [sample(0, (64, 64), "a cat")]
    assert set_up(**copied).score(samples) == reward.score(samples)


def test_every_tensor_of_the_file_is_used(tiny: dict[str, str]) -> None:
    """Each one changes what is loaded: none is left as initialised, none is taken for another."""
    stored = load_file(tiny["checkpoint"])
    network = set_up(**tiny)._network
    loaded = {
        name.replace("backbone.language_model.", "model.").replace("backbone.visual.", "visual."): tensor
        for name, tensor in network.state_dict().items()
    }
    assert set(loaded) == set(stored) - {"lm_head.weight"}
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in loaded.items())


def test_on_a_cpu_no_tensor_is_held_twice(tiny: dict[str, str]) -> None:
    """`onload` has nothing to copy there."""
    made = HpsV3(HpsV3Options(**tiny, dtype="bfloat16"))
    made.setup("cpu")
    held = {id(tensor) for tensor in made._host.values()}
    assert held == {id(tensor) for tensor in [*made._network.parameters(), *made._network.buffers()]}
    made.onload()
    assert made._loaded is not None
    assert {id(tensor) for tensor in made._loaded.values()} == held


# ------------------------------------------------------------------------------------------------------ bad checkpoints


def test_a_missing_checkpoint(copied: dict[str, str]) -> None:
    message = refusal({**copied, "checkpoint": "/nowhere/HPSv3.safetensors"})
    assert "'/nowhere/HPSv3.safetensors': there is no such file" in message
    assert "MizzenAI/HPSv3" in message
    assert "is a folder" in refusal({**copied, "checkpoint": copied["base"]})


def test_a_checkpoint_of_unknown_kind(copied: dict[str, str]) -> None:
    file = Path(copied["checkpoint"]).rename(Path(copied["checkpoint"]).with_suffix(".gguf"))
    assert "unknown suffix '.gguf'" in refusal({**copied, "checkpoint": str(file)})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>\n<html><title>401</title>", "is a web page"),
        (b"\n<html lang='en'>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"", "0 bytes"),
        (b"\x80\x02}q\x00.", "bytes"),
        (b"not a checkpoint at all, only text", "34 bytes"),
    ],
)
def test_something_else_under_the_name(copied: dict[str, str], suffix: str, content: bytes, said: str) -> None:
    file = Path(copied["checkpoint"]).with_suffix(suffix)
    file.write_bytes(content)
    message = refusal({**copied, "checkpoint": str(file)})
    assert str(file) in message
    assert said in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_checkpoint(copied: dict[str, str], suffix: str) -> None:
    file = Path(copied["checkpoint"])
    if suffix == ".pt":
        file = file.with_suffix(suffix)
        torch.save(load_file(copied["checkpoint"]), file)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    assert f"({size // 2} bytes)" in refusal({**copied, "checkpoint": str(file)})


def test_code_in_a_pickle_is_not_run(copied: dict[str, str], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "was_run",))

    file = tmp_path / "evil.pt"
    torch.save({"model": Evil()}, file)
    assert "cannot be read as tensors only" in refusal({**copied, "checkpoint": str(file)})
    assert not (tmp_path / "was_run").exists()


def change_tensors(files: dict[str, str], change: Callable[[Tensors], Any]) -> dict[str, str]:
    tensors = {name: tensor.clone() for name, tensor in load_file(files["checkpoint"]).items()}
    change(tensors)
    save_file(tensors, files["checkpoint"])
    return files


def test_missing_and_unexpected_tensors_are_named(copied: dict[str, str]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["visual.blocks.0.extra"] = torch.ones(3)
        for part in "qkv":
            del tensors[f"model.layers.1.self_attn.{part}_proj.weight"]
        del tensors["rm_head.5.bias"]

    message = refusal(change_tensors(copied, change))
    assert copied["checkpoint"] in message
    assert "missing: model.layers.1.self_attn.q_proj.weight, " in message
    assert "and 1 more" in message
    assert "unexpected: visual.blocks.0.extra" in message


def test_tensors_of_another_shape_are_named_with_both_shapes(copied: dict[str, str]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["rm_head.5.weight"] = torch.ones(1, 16)

    message = refusal(change_tensors(copied, change))
    assert "of another shape: rm_head.5.weight [1, 16] instead of [2, 16]" in message
    assert copied["base"] in message


def test_weights_without_a_reward_head(copied: dict[str, str]) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("rm_head.")]:
            del tensors[name]

    assert "no reward head `rm_head.*`" in refusal(change_tensors(copied, change))


def test_quantised_weights(copied: dict[str, str]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    assert "model.norm.weight is torch.int8, a quantised copy" in refusal(change_tensors(copied, change))


@pytest.mark.parametrize("rows", [-1, 1])
def test_a_token_table_of_another_size(copied: dict[str, str], rows: int) -> None:
    def change(tensors: Tensors) -> None:
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = table.new_zeros(len(table) + rows, table.shape[1])

    before = len(load_file(copied["checkpoint"])["model.embed_tokens.weight"])
    message = refusal(change_tensors(copied, change))
    assert f"has {before + rows} rows" in message
    assert f"has {before} tokens" in message
    assert copied["base"] in message


def test_without_a_token_table(copied: dict[str, str]) -> None:
    message = refusal(change_tensors(copied, lambda tensors: tensors.pop("model.embed_tokens.weight")))
    assert "has no model.embed_tokens.weight" in message


# ------------------------------------------------------------------------------------------------------------ bad bases


def change_json(files: dict[str, str], name: str, **changes: Any) -> dict[str, str]:
    file = Path(files["base"]) / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return files


def test_a_missing_base(copied: dict[str, str]) -> None:
    message = refusal({**copied, "base": "Qwen/Qwen2-VL-7B-Instruct"})
    assert "'Qwen/Qwen2-VL-7B-Instruct' is no folder on this machine" in message
    assert "hf download Qwen/Qwen2-VL-7B-Instruct" in message


def test_a_base_of_qwen_2_5(copied: dict[str, str]) -> None:
    message = refusal(change_json(copied, "config.json", model_type="qwen2_5_vl"))
    assert "is a Qwen2.5-VL model; HPSv3 is trained from Qwen2-VL" in message


def test_a_base_of_another_model(copied: dict[str, str]) -> None:
    assert "model_type is 'clip'" in refusal(change_json(copied, "config.json", model_type="clip"))
    (Path(copied["base"]) / "config.json").write_text("[]")
    assert "model_type is None" in refusal(copied)


def test_a_base_of_another_width(copied: dict[str, str]) -> None:
    message = refusal(change_json(copied, "config.json", intermediate_size=48))
    assert "mlp.gate_proj.weight [96, 48] instead of [48, 48]" in message


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json"], "config.json cannot be read"),
        (["tokenizer.json", "vocab.json"], "there is no tokenizer"),
        (["preprocessor_config.json"], "there is no preprocessor_config.json"),
    ],
)
def test_missing_files_of_the_base(copied: dict[str, str], files: list[str], said: str) -> None:
    for file in files:
        (Path(copied["base"]) / file).unlink()
    message = refusal(copied)
    assert said in message
    assert copied["base"] in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_damaged_files_of_the_base(copied: dict[str, str], name: str) -> None:
    (Path(copied["base"]) / name).write_text("<html>not found</html>")
    message = refusal(copied)
    assert copied["base"] in message
    assert name.removesuffix(".json") in message


def test_a_tokenizer_of_another_model(copied: dict[str, str]) -> None:
    message = refusal(change_json(copied, "config.json", image_token_id=3))
    assert "but token 3 in config.json" in message


def test_an_image_processor_that_cuts_other_patches(copied: dict[str, str]) -> None:
    message = refusal(change_json(copied, "preprocessor_config.json", patch_size=16))
    assert "(16, 2, 2) in preprocessor_config.json and (14, 2, 2) in config.json" in message


def test_limits_of_the_image_processor_change_no_score(copied: dict[str, str], reward: HpsV3, sample: Make) -> None:
    """People lower them to save memory; HPSv3 has its own."""
    changed = set_up(**change_json(copied, "preprocessor_config.json", min_pixels=784, max_pixels=4 * 784))
    samples = [sample(0, (64, 100), "a cat")]
    assert changed.score(samples) == reward.score(samples)


def test_rotary_positions_of_another_kind(copied: dict[str, str]) -> None:
    scaling = {"type": "linear", "rope_type": "linear", "factor": 2.0, "mrope_section": [2, 1, 1]}
    assert "rotary positions of kind 'linear'" in refusal(change_json(copied, "config.json", rope_scaling=scaling))


def test_transformers_without_the_image_processor(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(tiny)
    assert re.search(r"transformers 5\.\S+ has no Qwen2VLImageProcessorPil", message)
    assert "pip install" in message


def test_torchvision_is_never_imported(tiny: dict[str, str]) -> None:
    """It need not be installed, and where a wrong build is, importing it breaks transformers."""
    program = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import numpy as np\n"
        "from mmrl_core import Sample\n"
        "from mmrl_core.contracts import Prompt\n"
        "from mmrl_hpsv3.options import HpsV3Options\n"
        "from mmrl_hpsv3.reward import HpsV3\n"
        "made = HpsV3(HpsV3Options(checkpoint=sys.argv[1], base=sys.argv[2])); made.setup('cpu')\n"
        "image = np.zeros((40, 50, 3), dtype=np.uint8)\n"
        "sample = Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text='a cat'), image=image)\n"
        "print(made.score([sample])[0].value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tiny["checkpoint"], tiny["base"]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    float(done.stdout)
