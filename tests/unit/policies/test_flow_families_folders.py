"""Folders: which family reads one, what it says of broken ones, and what of it a trained network takes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrl_core.errors import ModelError, RecipeError
from mmrl_core.policies.flow import families
from mmrl_core.policies.flow.diffusers_folder import local_folder
from mmrl_core.policies.flow.options import FlowSampling

FAMILIES = ["flux", "sd3", "wan21", "wan22"]
CLASSES = {"flux": "FluxFamily", "sd3": "Sd3Family", "wan21": "WanFamily", "wan22": "WanFamily"}


def change_index(folder: Path, **entries: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def change_config(folder: Path, component: str, **entries: Any) -> None:
    file = folder / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# -------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("name", FAMILIES)
def test_the_index_says_the_family(name: str, pipeline_folder: Any, prepared: Any) -> None:
    family = prepared(str(pipeline_folder(name)), torch.bfloat16)
    assert type(family).__name__ == CLASSES[name]
    assert family.folder == pipeline_folder(name)
    assert family.dtype == torch.bfloat16


def test_the_tables_agree_with_the_classes() -> None:
    import importlib

    assert set(families.PIPELINES.values()) == set(families.FAMILIES)
    for name, target in families.FAMILIES.items():
        module, _, word = target.partition(":")
        family = getattr(importlib.import_module(module), word)
        assert set(family.pipelines) == {p for p, n in families.PIPELINES.items() if n == name}


def test_another_pipeline_is_refused_unless_the_recipe_says_what_it_is(own_folder: Any, prepared: Any) -> None:
    folder = own_folder("flux")
    change_index(folder, _class_name="FluxxPipeline")
    with pytest.raises(ModelError, match=r"no model family for the pipeline 'FluxxPipeline'. Did you mean") as caught:
        prepared(folder)
    assert "FluxPipeline, StableDiffusion3Pipeline, WanPipeline" in str(caught.value)
    assert "model.policy.family" in str(caught.value)
    assert type(prepared(folder, family="flux")).__name__ == "FluxFamily"


def test_a_wrong_family_in_the_recipe(pipeline_folder: Any, prepared: Any) -> None:
    with pytest.raises(
        ModelError, match=r"transformer is diffusers\.FluxTransformer2DModel; .* knows SD3Transformer2D"
    ):
        prepared(pipeline_folder("flux"), family="sd3")


# ---------------------------------------------------------------------------------------------------------- hub ids


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("path", ["someone/a-model", "/nowhere/at/all", "two words/and/more"])
def test_a_path_that_is_nothing(path: str, offline_cache: Path) -> None:
    with pytest.raises(ModelError, match=r"no such folder, and no pipeline of the hub") as caught:
        local_folder(path)
    assert repr(path) in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_a_hub_id_in_the_cache(offline_cache: Path, pipeline_folder: Any, prepared: Any) -> None:
    repository = offline_cache / "models--someone--tiny-flux"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "0123abc").symlink_to(pipeline_folder("flux"))
    family = prepared("someone/tiny-flux")
    assert family.folder == repository / "snapshots" / "0123abc"
    assert family.load_network(torch.float32).config["num_single_layers"] == 2


def test_only_the_pipelines_components_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published repositories hold the same weights in other forms beside them."""
    asked: list[dict[str, Any]] = []

    def snapshot(repository: str, **settings: Any) -> str:
        assert repository == "someone/model"
        asked.append(settings)
        (tmp_path / "model_index.json").write_text(
            json.dumps({"_class_name": "X", "vae": ["diffusers", "A"], "unet": [None, None]})
        )
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert local_folder("someone/model") == tmp_path
    first, second = asked
    assert first["allow_patterns"] == ["model_index.json"]
    assert second["allow_patterns"] == ["model_index.json", "vae/*"]
    assert "*.bin" in second["ignore_patterns"]


# ------------------------------------------------------------------------------------------------------ broken folders


def test_without_diffusers(pipeline_folder: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    with pytest.raises(ModelError, match=r"pip install 'mmrl-core\[diffusion\]'"):
        prepared(pipeline_folder("flux"))


def test_importing_the_families_imports_no_diffusers() -> None:
    import subprocess
    import sys

    code = (
        "import sys, mmrl_core.policies.flow.flux, mmrl_core.policies.flow.sd3, mmrl_core.policies.flow.wan, "
        "mmrl_core.policies.flow.families, mmrl_core.testing.tiny_pipelines; "
        "assert not {'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("model_index.json", None, "no such file"),
        ("model_index.json", "[]", "holds a list"),
        ("model_index.json", "{", "cannot be read as JSON"),
        ("transformer/config.json", None, "no such file; is .*/transformer a complete folder"),
        ("vae/config.json", "{'a': 1}", "cannot be read as JSON"),
    ],
)
def test_unreadable_configurations(file: str, text: str | None, words: str, own_folder: Any, prepared: Any) -> None:
    folder = own_folder("flux")
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(ModelError, match=words) as caught:
        prepared(folder)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"transformer": [None, None]}, "names no component 'transformer'"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, r"vae is diffusers\.AutoencoderTiny; .* knows AutoencoderKL"),
        ({"vae": ["my_code", "AutoencoderKL"]}, r"vae is my_code\.AutoencoderKL; .* of diffusers and transformers"),
    ],
)
def test_components_that_are_not_the_familys(entries: Any, words: str, own_folder: Any, prepared: Any) -> None:
    folder = own_folder("flux")
    change_index(folder, **entries)
    with pytest.raises(ModelError, match=words) as caught:
        prepared(folder)
    assert str(folder / "model_index.json") in str(caught.value)


def test_a_class_that_the_library_lacks(own_folder: Any, prepared: Any) -> None:
    folder = own_folder("sd3")
    change_index(folder, scheduler=["diffusers", "SchedulerOfTheFuture"])
    with pytest.raises(ModelError, match=r"SchedulerOfTheFuture, which the installed diffusers [\d.]+ lacks"):
        prepared(folder).schedule(FlowSampling(height=64, width=64, steps=4))


@pytest.mark.parametrize(
    ("name", "component", "entries", "words"),
    [
        ("flux", "transformer", {"in_channels": 32}, "from 32 to 32 channels is no denoiser of the VAE's 4"),
        ("flux", "transformer", {"out_channels": 8}, "another image"),
        ("flux", "vae", {"shift_factor": None}, "scaling_factor or shift_factor"),
        ("sd3", "transformer", {"in_channels": 16}, "from 16 to 4 channels"),
        ("wan21", "transformer", {"in_channels": 36}, "image-to-video models are not supported"),
        ("wan21", "transformer", {"image_dim": 1280}, "image-to-video models are not supported"),
        ("wan21", "transformer", {"patch_size": [2, 2, 2]}, "one frame and a square"),
    ],
)
def test_models_of_another_shape(
    name: str, component: str, entries: Any, words: str, own_folder: Any, prepared: Any
) -> None:
    folder = own_folder(name)
    change_config(folder, component, **entries)
    with pytest.raises(ModelError, match=words) as caught:
        prepared(folder)
    assert str(folder / component) in str(caught.value)


@pytest.mark.parametrize(
    "entries", [{"transformer_2": ["diffusers", "WanTransformer3DModel"]}, {"boundary_ratio": 0.875}]
)
def test_wan_with_two_networks_is_refused(entries: Any, own_folder: Any, prepared: Any) -> None:
    folder = own_folder("wan22")
    change_index(folder, **entries)
    with pytest.raises(ModelError, match=r"Wan2.2-A14B.* not supported; use Wan2.1-T2V or Wan2.2-TI2V-5B"):
        prepared(folder)


def test_the_wan_vae_of_older_folders_has_the_classes_defaults(own_folder: Any, prepared: Any) -> None:
    """Wan2.1's published vae/config.json is older than the fields that say its scale."""
    folder = own_folder("wan21")
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    new = {"scale_factor_spatial", "scale_factor_temporal", "is_residual", "patch_size", "in_channels", "out_channels"}
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in new}))
    family = prepared(folder)
    assert family.latent_shape(FlowSampling(height=64, width=96, frames=9)) == (16, 3, 8, 12)


def test_weights_that_cannot_be_loaded(own_folder: Any, prepared: Any) -> None:
    folder = own_folder("flux")
    family, file = prepared(folder), folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)

    def expect(words: str) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            family.load_network(torch.float32)
        assert str(folder / "transformer") in str(caught.value)

    save_file({k: v for k, v in weights.items() if k != "proj_out.bias"}, file)
    expect("1 weights of FluxTransformer2DModel are in none of its safetensors files, the first 'proj_out.bias'")
    save_file({**weights, "proj_out.bias": torch.zeros(3)}, file)
    expect("cannot load FluxTransformer2DModel: .*proj_out.bias")
    file.write_bytes(b"not safetensors at all")
    expect("cannot load FluxTransformer2DModel")
    file.rename(file.with_suffix(".bin"))  # a pickle would run code
    expect("cannot load FluxTransformer2DModel")
    (folder / "vae").rename(folder / "elsewhere")
    with pytest.raises(ModelError, match=r"vae \(no such folder\): cannot load AutoencoderKL"):
        family.load_decoder()


def test_text_encoders_that_cannot_be_loaded(own_folder: Any, prepared: Any) -> None:
    folder = own_folder("wan21")
    family, file = prepared(folder), folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    lost = next(k for k in weights if k.endswith("layer_norm.weight"))
    save_file({k: v for k, v in weights.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights of UMT5EncoderModel"):
        family.load_encoders()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load T5Tokenizer"):
        family.load_encoders()


# --------------------------------------------------------------------------------------------------------- pixel sizes


@pytest.mark.parametrize(
    ("name", "shape"),
    [("flux", (4 * 6, 16)), ("sd3", (4, 8, 12)), ("wan21", (16, 3, 8, 12)), ("wan22", (48, 3, 4, 6))],
)
def test_latents_of_64_by_96(name: str, shape: tuple[int, ...], pipeline_folder: Any, prepared: Any) -> None:
    sampling = FlowSampling(height=64, width=96, frames=9 if "wan" in name else 1)
    assert prepared(pipeline_folder(name)).latent_shape(sampling) == shape


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("flux", {"height": 500}, r"sampling\.height = 500: FLUX needs multiples of 16; nearest: 496 and 512"),
        ("flux", {"width": 7}, r"sampling\.width = 7: FLUX needs multiples of 16; nearest: 16$"),
        ("flux", {"frames": 5}, r"sampling\.frames = 5: FLUX makes images; set it to 1"),
        ("sd3", {"width": 100}, r"sampling\.width = 100: SD3 needs multiples of 16; nearest: 96 and 112"),
        ("sd3", {"height": 400}, r"sampling\.height = 400: SD3 takes at most 384"),
        ("sd3", {"frames": 2}, r"sampling\.frames = 2: SD3 makes images"),
        ("wan21", {"height": 72}, r"sampling\.height = 72: Wan needs multiples of 16; nearest: 64 and 80"),
        ("wan22", {"height": 80}, r"sampling\.height = 80: Wan needs multiples of 32; nearest: 64 and 96"),
        ("wan22", {"frames": 16}, r"sampling\.frames = 16: Wan needs 1 \+ a multiple of 4; nearest: 13 and 17"),
        ("wan21", {"frames": 2}, r"sampling\.frames = 2: .*; nearest: 1 and 5"),
        ("wan21", {"frames": 257}, r"sampling\.frames = 257: Wan takes at most 253"),
        ("wan21", {"width": 1040}, r"sampling\.width = 1040: Wan takes at most 1024"),
    ],
)
def test_sizes_that_do_not_fit(name: str, sizes: Any, words: str, pipeline_folder: Any, prepared: Any) -> None:
    with pytest.raises(RecipeError, match=words):
        prepared(pipeline_folder(name)).latent_shape(FlowSampling(**{"height": 64, "width": 64, **sizes}))


# ------------------------------------------------------------------------------------------------- a trained network


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_the_network_in_forward_order(name: str, pipeline_folder: Any, prepared: Any) -> None:
    family = prepared(pipeline_folder(name))
    network, order = family.load_network(torch.float32), []
    blocks = family.blocks(network)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: order.append(number))
    sampling = FlowSampling(height=64, width=64, frames=1)
    conditions = {n: torch.ones(1, *((3, w) if n == "prompt_embeds" else (w,))) for n, w in family.widths.items()}
    latents = torch.randn(1, *family.latent_shape(sampling))
    with torch.no_grad():
        family.velocity(network, latents, torch.ones(1), conditions, sampling)
    assert order == list(range(len(blocks)))
    assert len(blocks) == (3 if name == "flux" else 2)
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    assert inside > 0.4 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_saved_and_read_again(name: str, pipeline_folder: Any, prepared: Any, tmp_path: Path) -> None:
    """Configuration, parameters and fixed weights are all that a folder of the network needs."""
    import diffusers

    family = prepared(pipeline_folder(name))
    network = family.load_network(torch.float32)
    weights = {**dict(network.named_parameters()), **dict(family.fixed_weights())}
    family.save_config(tmp_path)
    save_file({k: v.detach() for k, v in weights.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    again, found = getattr(diffusers, type(network).__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    state, other = network.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in network.config.items() if k[0] != "_"
    }


def test_tiny_pipelines_are_their_seeds(pipeline_folder: Any, tmp_path: Path) -> None:
    from mmrl_core.testing.tiny_pipelines import tiny_pipeline

    torch.manual_seed(1)
    state = torch.get_rng_state()
    same, other = tiny_pipeline(tmp_path / "a", "flux"), tiny_pipeline(tmp_path / "b", "flux", 1)
    assert torch.equal(torch.get_rng_state(), state)
    file = "transformer/diffusion_pytorch_model.safetensors"
    want, got, differs = (load_file(f / file) for f in (pipeline_folder("flux"), same, other))
    assert all(torch.equal(want[k], got[k]) for k in want)
    assert not any(torch.equal(want[k], differs[k]) for k in want)
