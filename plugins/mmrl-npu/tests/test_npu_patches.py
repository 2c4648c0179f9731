"""Networks compute the same with their patches as without, each can be switched off alone, and nothing is left."""

from __future__ import annotations

import collections
import copy
import importlib.metadata
import sys
from pathlib import Path

import npu_reference_ops
import pytest
import torch
from mmrl_npu.device import NpuDevice
from mmrl_npu.options import NpuOptions
from mmrl_npu.patches import DEFAULT, NAMES, PATCHES, apply_chosen
from mmrl_npu.patches.choice import chosen
from mmrl_npu.patches.rms_norm import FusedRMSNorm, image_rms_norm
from npu_tiny_networks import FAMILIES, Family, output
from pydantic import ValidationError
from torch import Tensor, nn

from mmrl_core.errors import RecipeError
from mmrl_core.launch.components import create_device
from mmrl_core.patches import Applied, apply
from mmrl_core.plugins import resolve
from mmrl_core.recipe import load_recipe
from mmrl_core.testing.patches import PatchConformance
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file

TOLERANCE = 1e-5
OPERATOR = {
    "transformers-rms-norm": "npu_rms_norm",
    "transformers-swiglu": "npu_swiglu",
    "transformers-rotary": "npu_rotary_mul",
    "transformers-attention": "npu_fusion_attention",
    "diffusers-rms-norm": "npu_rms_norm",
    "diffusers-rotary": "npu_rotary_mul",
    "diffusers-attention": "npu_fusion_attention",
    "diffusers-gelu": "npu_gelu",
}
"""Patch -> the operator that runs only because of it (the layout patch runs none)."""


class TestPatches(PatchConformance):
    """The core's rules for patches."""

    distribution = "mmrl-npu"
    device = "npu"
    packages = ("transformers", "diffusers", "torch_npu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """The operators by their documentation stand for torch_npu; counts of their runs."""
    return npu_reference_ops.install(monkeypatch)


def named(*names: str) -> Applied:
    """These patches, in force, whatever torch-npu is installed."""
    return apply([patch for patch in PATCHES if patch.name in names], device="npu")


def run(family: Family, network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's answer, and the gradients of a weighted sum of it: of every parameter and every input."""
    torch.manual_seed(7)
    inputs = {
        name: value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in family.inputs().items()
    }
    network.zero_grad()
    answer = output(network, inputs)
    (answer * torch.randn(answer.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    gradients |= {name: x.grad for name, x in inputs.items() if isinstance(x, Tensor) and x.grad is not None}
    return answer.detach(), gradients


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest deviation, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("which", ["default", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_forward_and_backward_agree(name: str, which: str, calls: collections.Counter[str]) -> None:
    """The same network, first as its library has it, then patched: built before or after makes no difference to keys,
    values and gradients, and the operators that we mean did run."""
    family = FAMILIES[name]
    torch.manual_seed(3)
    plain = family.build()
    expected, expected_gradients = run(family, plain)
    assert not calls
    with named(*(NAMES if which == "all" else DEFAULT)):
        torch.manual_seed(3)
        network = family.build()
        assert list(network.state_dict()) == list(plain.state_dict())
        answer, gradients = run(family, network)
        assert dict(calls) == (family.all if which == "all" else family.default)
        assert difference(answer, expected) < TOLERANCE
        assert gradients.keys() == expected_gradients.keys()
        for parameter, gradient in gradients.items():
            assert difference(gradient, expected_gradients[parameter]) < TOLERANCE, parameter
    calls.clear()
    again, _ = run(family, network)
    assert torch.equal(again, expected)
    assert not calls
    assert [type(m) for m in network.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", OPERATOR)
def test_each_patch_can_be_switched_off_alone(name: str, calls: collections.Counter[str]) -> None:
    """Without it its operator does not run, and all others do."""
    library = name.partition("-")[0]
    family = FAMILIES["qwen3" if library == "transformers" else "flux"]
    with named(*(other for other in NAMES if other != name)), torch.no_grad():
        output(family.build(), family.inputs())
    missing = {OPERATOR[name]}
    assert set(calls) == set(family.all) - missing


def test_a_network_that_was_copied_forgets_the_patch_too(calls: collections.Counter[str]) -> None:
    """Copies are found by nobody: their class stays, and computes as the plain one once the patch is gone."""
    family = FAMILIES["flux"]
    with named("diffusers-rms-norm", "diffusers-gelu"), torch.no_grad():
        network = copy.deepcopy(family.build())
        output(network, family.inputs())
        assert calls == {"npu_rms_norm": 8, "npu_gelu": 4}
    calls.clear()
    with torch.no_grad():
        output(network, family.inputs())
    assert not calls
    with named("diffusers-rms-norm"), torch.no_grad():
        output(network, family.inputs())
    assert calls == {"npu_rms_norm": 8}


def test_a_subclass_with_a_forward_of_its_own_is_left_alone(calls: collections.Counter[str]) -> None:
    """Only instances of exactly the class we know become fused ones."""

    class Scaled(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled, self.plain = Scaled(8), nn.RMSNorm(8)

    Owner.__init__ = image_rms_norm(Owner.__init__)  # type: ignore[method-assign]
    owner = Owner()
    assert type(owner.scaled) is Scaled
    assert type(owner.plain) is FusedRMSNorm
    Owner.__init__.mmrl_undo()  # type: ignore[attr-defined]
    assert type(owner.plain) is nn.RMSNorm


@pytest.mark.parametrize("name", ["qwen3", "flux"])
def test_tensors_elsewhere_take_no_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every patch in force, a network on the CPU never imports torch_npu."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    family = FAMILIES[name]
    torch.manual_seed(3)
    expected, _ = run(family, family.build())
    with named(*NAMES):
        torch.manual_seed(3)
        answer, _ = run(family, family.build())
    assert torch.equal(answer, expected)


def test_mixed_dtypes_are_left_to_the_library(calls: collections.Counter[str]) -> None:
    """npu_rms_norm wants one dtype; bfloat16 activations with a float32 weight stay as they are."""
    norm = FusedRMSNorm(8)
    with named("diffusers-rms-norm"):
        assert norm(torch.randn(3, 8, dtype=torch.bfloat16)).shape == (3, 8)
        assert not calls
        norm(torch.randn(3, 8))
    assert calls == {"npu_rms_norm": 1}


@pytest.mark.parametrize("name", ["qwen3", "flux", "wan"])
def test_bfloat16_goes_through_every_operator(name: str, calls: collections.Counter[str]) -> None:
    """The dtype that training uses: as far from float32 as the unpatched network is."""
    family = FAMILIES[name]
    torch.manual_seed(3)
    network = family.build()
    inputs = family.inputs()
    short = {
        key: value.to(torch.bfloat16) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    short |= {key: value for key, value in inputs.items() if key.endswith("ids")}
    with torch.no_grad():
        expected = output(network, inputs)
        plain = output(network.to(torch.bfloat16), short).float()
        with named(*NAMES):
            torch.manual_seed(3)
            ours = output(family.build().to(torch.bfloat16), short).float()
    assert dict(calls) == family.all
    assert 0 < difference(ours, expected) < 1.5 * difference(plain, expected)


def test_the_layout_of_rotary_tables_changes_no_bit(calls: collections.Counter[str]) -> None:
    """FLUX's positions, and a form that the patch leaves alone."""
    from diffusers.models.transformers import transformer_flux

    positions, form = (
        torch.arange(9.0),
        {"use_real": True, "repeat_interleave_real": True, "freqs_dtype": torch.float32},
    )
    original = transformer_flux.get_1d_rotary_pos_embed
    expected = original(8, positions, theta=500.0, **form)
    complex_form = original(8, positions)
    with named("diffusers-rotary-layout"):
        ours = transformer_flux.get_1d_rotary_pos_embed
        assert ours is not original
        for left, right in zip(ours(8, positions, theta=500.0, **form), expected, strict=True):
            assert torch.equal(left, right)
            assert left.is_contiguous()
        assert torch.equal(ours(8, positions), complex_form)


@pytest.mark.parametrize("cached", [0, 5])
def test_causal_attention_without_a_mask(cached: int, calls: collections.Counter[str]) -> None:
    """The compressed triangle means the same as sdpa's is_causal, for keys that are more than the queries too; one
    query alone sees every key."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    torch.manual_seed(0)
    for rows in (1, 6):
        query = torch.randn(2, 4, rows, 8)
        key, value = torch.randn(2, 2, rows + cached, 8), torch.randn(2, 2, rows + cached, 8)
        expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
        with named("transformers-attention"):
            ours = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
            assert difference(ours(module, query, key, value, None, scaling=0.3)[0], expected) < TOLERANCE
            assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", len) is len
    assert calls == {"npu_fusion_attention": 2}


def test_masks_that_the_operator_does_not_take_go_to_the_library(calls: collections.Counter[str]) -> None:
    """An additive mask, and one that is to be repeated over the queries."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind(0)
    additive = torch.randn(2, 1, 5, 5)
    expected, _ = sdpa_attention_forward(nn.Module(), query, key, value, additive)
    repeated = torch.rand(2, 1, 1, 4) > 0.3
    native = dispatch_attention_fn(query, key, value, attn_mask=repeated)
    with named("transformers-attention", "diffusers-attention"):
        ours = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        assert torch.equal(ours(nn.Module(), query, key, value, additive)[0], expected)
        assert torch.equal(dispatch_attention_fn(query, key, value, attn_mask=repeated), native)
        assert not calls
        full = repeated.expand(2, 1, 4, 4)
        assert difference(dispatch_attention_fn(query, key, value, attn_mask=full), native) < TOLERANCE
    assert calls == {"npu_fusion_attention": 1}


def test_what_is_too_large_for_rotary_mul_goes_to_the_library(calls: collections.Counter[str]) -> None:
    """1000 rows of text, 1000 rows times heads of FLUX."""
    from diffusers.models.transformers import transformer_flux
    from transformers.models.qwen2 import modeling_qwen2

    angles = torch.rand(1, 3, 8)
    with named("transformers-rotary", "diffusers-rotary"):
        rows = torch.randn(1000, 1, 3, 8)
        modeling_qwen2.apply_rotary_pos_emb(rows, rows, angles.cos(), angles.sin())
        pictures = torch.randn(250, 3, 4, 8)
        transformer_flux.apply_rotary_emb(pictures, (angles[0].cos(), angles[0].sin()), sequence_dim=1)
        assert not calls
        modeling_qwen2.apply_rotary_pos_emb(rows[:999], rows[:999], angles.cos(), angles.sin())
        transformer_flux.apply_rotary_emb(pictures[:249], (angles[0].cos(), angles[0].sin()), sequence_dim=1)
    assert calls == {"npu_rotary_mul": 3}


# ------------------------------------------------------------------------------------------------ what a recipe can say


def test_a_recipe_switches_single_patches() -> None:
    """True is the default set, false none; a mapping changes single ones of the default set."""
    assert set(chosen(True)) == DEFAULT
    assert chosen(False) == ()
    assert set(chosen({"diffusers-gelu": True, "transformers-rotary": False})) == (
        DEFAULT - {"transformers-rotary"} | {"diffusers-gelu"}
    )
    assert NpuOptions.model_validate({"patches": {"diffusers-gelu": True}}).patches == {"diffusers-gelu": True}


def test_a_patch_that_does_not_exist_is_an_error_that_names_the_nearest() -> None:
    """It is found when the recipe is read."""
    with pytest.raises(ValidationError, match=r"'transformers-swiglo'\. Did you mean 'transformers-swiglu'"):
        NpuOptions.model_validate({"patches": {"transformers-swiglo": False}})


def test_options_of_the_device_reach_it(tmp_path: Path) -> None:
    """From the recipe; and what it cannot mean is an error with its line."""
    model = tiny_language_model(tmp_path / "model")
    recipe = {**tiny_recipe(model, tmp_path / "run"), "device": {"name": "npu", "patches": {"diffusers-gelu": True}}}
    path = write_recipe_file(tmp_path / "recipe.yaml", recipe)
    device = create_device(resolve(*load_recipe(path)))
    assert isinstance(device, NpuDevice)
    assert device.options.patches == {"diffusers-gelu": True}
    assert device.fused_ops() == frozenset()
    path = write_recipe_file(tmp_path / "recipe.yaml", {**recipe, "device": {"name": "npu", "fused_adamw": True}})
    assert create_device(resolve(*load_recipe(path))).fused_ops() == {"adamw"}
    path = write_recipe_file(tmp_path / "recipe.yaml", {**recipe, "device": {"name": "npu", "patches": {"gelu": True}}})
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+.*there is no patch 'gelu'"):
        resolve(*load_recipe(path))


def test_an_unknown_torch_npu_gets_no_patches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its operators may take other arguments: unpatched, and a warning says why."""
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda d: "3.0.0" if d == "torch-npu" else installed(d))
    assert apply_chosen(True, device="npu").patches == []
    assert "torch-npu 3.0.0 is not in >=2.7.1,<2.15" in caplog.text
    monkeypatch.setattr(importlib.metadata, "version", lambda d: "2.13.0" if d == "torch-npu" else installed(d))
    with apply_chosen(True, device="npu") as applied:
        assert {patch.name for patch in applied.patches} == DEFAULT
    with apply_chosen({"transformers-swiglu": False}, device="npu") as applied:
        assert {patch.name for patch in applied.patches} == DEFAULT - {"transformers-swiglu"}
