"""The ODE over a family's velocity and schedule is diffusers' pipeline, for every family."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from mmrl_core.errors import DataError, ModelError
from mmrl_core.policies.flow.options import FlowSampling

TEXT_TOKENS = 24
PROMPTS = ["a red cat", "two blue dogs walk on the roof of a house, at 7"]
NEGATIVES = ["the sky", "a photo"]
FAMILIES = ["flux", "sd3", "wan21", "wan22"]


def sampling_for(name: str, **changes: Any) -> FlowSampling:
    """4 steps of 64 x 96 pixels, 9 frames of video."""
    facts = {"steps": 4, "height": 64, "width": 96, "schedule": "model", "frames": 9 if "wan" in name else 1}
    return FlowSampling(**{**facts, **changes})


def embedded(pipeline: Any, name: str, texts: list[str]) -> dict[str, torch.Tensor]:
    """Conditions from the pipeline's own `encode_prompt`."""
    with torch.no_grad():
        if name == "flux":
            prompt, pooled, _ = pipeline.encode_prompt(texts, None, max_sequence_length=TEXT_TOKENS)
        elif name == "sd3":
            prompt, _, pooled, _ = pipeline.encode_prompt(
                texts, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
            )
        else:
            prompt, _ = pipeline.encode_prompt(
                texts, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
            )
            return {"prompt_embeds": prompt}
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


def run_pipeline(pipeline: Any, name: str, latents: torch.Tensor, sampling: FlowSampling, **settings: Any) -> Any:
    """The pipeline's final latents."""
    if "wan" in name:
        settings["num_frames"] = sampling.frames
    done = pipeline(
        PROMPTS,
        latents=latents.clone(),
        height=sampling.height,
        width=sampling.width,
        num_inference_steps=sampling.steps,
        max_sequence_length=TEXT_TOKENS,
        **{"output_type": "latent", **settings},
    )
    return done.frames if "wan" in name else done.images


@torch.no_grad()
def euler(velocity: Any, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """x + (sigma' - sigma) v over the schedule, each row at the same time."""
    for now, then in itertools.pairwise(sigmas):
        latents = latents + (then - now) * velocity(latents, now.expand(len(latents)))
    return latents


def initial(family: Any, sampling: FlowSampling, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, *family.latent_shape(sampling), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("name", "scheduler"), [*((name, "euler") for name in FAMILIES), ("flux", "published"), ("sd3", "published")]
)
def test_a_trajectory_is_the_pipelines(
    name: str, scheduler: str, pipeline_folder: Any, prepared: Any, diffusers_pipeline: Any
) -> None:
    """Two prompts, height other than width; FLUX also with the schedule that depends on the resolution."""
    folder = pipeline_folder(name, scheduler)
    family, pipeline, sampling = prepared(folder), diffusers_pipeline(folder), sampling_for(name)
    network, start = family.load_network(torch.float32), initial(family, sampling)
    expected = run_pipeline(
        pipeline, name, start, sampling, guidance_scale=sampling.guidance_scale if name == "flux" else 1.0
    )
    conditions, sigmas = embedded(pipeline, name, PROMPTS), family.schedule(sampling)
    got = euler(lambda x, t: family.velocity(network, x, t, conditions, sampling), start, sigmas)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (5,)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5
    assert torch.equal(sigmas, pipeline.scheduler.sigmas)
    assert (expected - start).abs().mean() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_guided_trajectory_is_the_pipelines(
    name: str, pipeline_folder: Any, prepared: Any, diffusers_pipeline: Any
) -> None:
    """Classifier-free guidance by two forwards."""
    folder = pipeline_folder(name)
    family, pipeline, sampling = prepared(folder), diffusers_pipeline(folder), sampling_for(name)
    network, start, scale = family.load_network(torch.float32), initial(family, sampling), 2.5
    word = {"true_cfg_scale": scale, "guidance_scale": 3.5} if name == "flux" else {"guidance_scale": scale}
    expected = run_pipeline(pipeline, name, start, sampling, negative_prompt=NEGATIVES, **word)
    wanted, unwanted = embedded(pipeline, name, PROMPTS), embedded(pipeline, name, NEGATIVES)

    def velocity(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        away = family.velocity(network, latents, time, unwanted, sampling)
        return away + scale * (family.velocity(network, latents, time, wanted, sampling) - away)

    got = euler(velocity, start, family.schedule(sampling))
    assert (got - expected).abs().max() <= 1e-5
    unguided = euler(lambda x, t: family.velocity(network, x, t, wanted, sampling), start, family.schedule(sampling))
    assert (unguided - expected).abs().mean() > 0.01


def test_guidance_of_a_distilled_network_is_the_samplings(
    pipeline_folder: Any, prepared: Any, diffusers_pipeline: Any
) -> None:
    folder = pipeline_folder("flux")
    family, pipeline = prepared(folder), diffusers_pipeline(folder)
    network, sampling = family.load_network(torch.float32), sampling_for("flux", guidance_scale=1.5)
    start, conditions = initial(family, sampling), embedded(pipeline, "flux", PROMPTS)
    expected = run_pipeline(pipeline, "flux", start, sampling, guidance_scale=1.5)
    other = sampling.model_copy(update={"guidance_scale": 5.0})
    got, wrong = (
        euler(lambda x, t, s=s: family.velocity(network, x, t, conditions, s), start, family.schedule(s))
        for s in (sampling, other)
    )
    assert (got - expected).abs().max() <= 1e-5
    assert (wrong - expected).abs().mean() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_have_times_of_their_own(name: str, pipeline_folder: Any, prepared: Any) -> None:
    """A batch of steps is each step alone; nothing mixes rows."""
    family, sampling = prepared(pipeline_folder(name)), sampling_for(name)
    network, latents = family.load_network(torch.float32), initial(family, sampling)
    generator = torch.Generator().manual_seed(1)
    conditions = {
        n: torch.randn(2, *((TEXT_TOKENS, width) if n == "prompt_embeds" else (width,)), generator=generator)
        for n, width in family.widths.items()
    }
    time = torch.tensor([0.95, 0.3])
    with torch.no_grad():
        together = family.velocity(network, latents, time, conditions, sampling)
        for row in range(2):
            part = slice(row, row + 1)
            alone = family.velocity(
                network, latents[part], time[part], {n: v[part] for n, v in conditions.items()}, sampling
            )
            assert (together[part] - alone).abs().max() <= 1e-5
        assert (family.velocity(network, latents, time.flip(0), conditions, sampling) - together).abs().mean() > 0.05


@torch.no_grad()
def test_one_time_for_all_tokens_is_a_row_of_equal_times(pipeline_folder: Any, prepared: Any) -> None:
    """Wan2.2-TI2V-5B is given a time a token by its pipeline."""
    family, sampling = prepared(pipeline_folder("wan22")), sampling_for("wan22")
    network, latents, time = family.load_network(torch.float32), initial(family, sampling), torch.tensor([0.9, 0.4])
    text = torch.randn(2, TEXT_TOKENS, 32, generator=torch.Generator().manual_seed(2))
    frames, height, width = latents.shape[2:]
    tokens = (1000 * time)[:, None].expand(2, frames * (height // 2) * (width // 2))
    spelled_out = network(latents, timestep=tokens, encoder_hidden_states=text, return_dict=False)[0]
    got = family.velocity(network, latents, time, {"prompt_embeds": text}, sampling)
    assert (got - spelled_out).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------------------ schedules


def rewrite_scheduler(folder: Any, name: str | None = None, **changes: Any) -> None:
    """Change a folder's scheduler, and its class."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    if name is not None:
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", name]
        (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "scheduler", "changes"),
    [
        ("wan21", "UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
        ("wan22", "UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0}),
        ("wan21", "DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 2.0}),
        ("sd3", None, {"use_dynamic_shifting": True}),
        ("sd3", None, {"use_dynamic_shifting": True, "max_shift": 2.0, "base_image_seq_len": 10}),
        ("flux", None, {"shift": 1.0}),
        ("flux", "UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 2.0}),
    ],
)
def test_a_schedule_is_what_the_pipeline_sets(
    name: str, scheduler: str | None, changes: dict[str, Any], own_folder: Any, prepared: Any, diffusers_pipeline: Any
) -> None:
    folder = own_folder(name)
    flow = {"prediction_type": "flow_prediction"} if scheduler is not None else {}
    rewrite_scheduler(folder, scheduler, **flow, **changes)
    family, sampling = prepared(folder), sampling_for(name, steps=5)
    sigmas, pipeline = family.schedule(sampling), diffusers_pipeline(folder)
    run_pipeline(pipeline, name, initial(family, sampling), sampling, guidance_scale=1.0)
    assert torch.allclose(sigmas, pipeline.scheduler.sigmas, rtol=0, atol=1e-7)
    assert sigmas.shape == (6,)
    assert sigmas[-1] == 0


@pytest.mark.parametrize(
    ("name", "scheduler", "changes", "words"),
    [
        ("wan21", "UniPCMultistepScheduler", {"use_flow_sigmas": False}, "no flow-matching schedule for 4 steps"),
        ("wan21", "DDIMScheduler", {}, "no flow-matching schedule"),
        ("sd3", "FlowMatchHeunDiscreteScheduler", {}, "no flow-matching schedule"),
        ("flux", "DDIMScheduler", {}, "cannot be set as this pipeline does"),
        ("sd3", None, {"num_train_timesteps": 500}, "num_train_timesteps is 500"),
        ("sd3", None, {"invert_sigmas": True}, "sampling.schedule: linear"),
    ],
)
def test_a_scheduler_that_is_no_flows_is_refused(
    name: str, scheduler: str | None, changes: dict[str, Any], words: str, own_folder: Any, prepared: Any
) -> None:
    folder = own_folder(name)
    rewrite_scheduler(folder, scheduler, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        prepared(folder).schedule(sampling_for(name))
    assert str(folder / "scheduler" / "scheduler_config.json") in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ precision

# diffusers' FLUX itself rounds 1000 time and 1000 guidance to the network's precision; these are exact in bf16
EXACT_TIMES, EXACT_GUIDANCE = (0.5, 0.25), 2.0


@pytest.mark.parametrize("cast_all", [False, True], ids=["as loaded", "all bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_networks_run(name: str, cast_all: bool, pipeline_folder: Any, prepared: Any) -> None:
    """As loaded, Wan keeps some modules in fp32. Conditions come in another precision; results are fp32."""
    folder, sampling = pipeline_folder(name), sampling_for(name, guidance_scale=EXACT_GUIDANCE)
    exact, family = prepared(folder), prepared(folder, torch.bfloat16)
    latents, time = initial(family, sampling), torch.tensor(EXACT_TIMES)
    conditions = {
        n: torch.randn(2, *((TEXT_TOKENS, width) if n == "prompt_embeds" else (width,))).half()
        for n, width in family.widths.items()
    }
    network = family.load_network(torch.bfloat16)
    if cast_all:
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()
    else:
        kept = {p.dtype for p in network.parameters()} == {torch.float32, torch.bfloat16}
        assert kept == ("wan" in name)
    velocity = family.velocity(network, latents, time, conditions, sampling)
    velocity.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    with torch.no_grad():
        reference = exact.velocity(exact.load_network(torch.float32), latents, time, conditions, sampling)
    assert velocity.dtype == torch.float32
    assert (velocity - reference).norm() / reference.norm() < 0.1


@pytest.mark.parametrize("name", ["sd3", "wan22"])
def test_time_is_not_rounded_with_the_latents(name: str, pipeline_folder: Any, prepared: Any) -> None:
    """Times that are one in bf16 are two to a bf16 network (diffusers' FLUX itself rounds its time)."""
    family, sampling = prepared(pipeline_folder(name), torch.bfloat16), sampling_for(name)
    times = torch.tensor([0.8985, 0.8997])
    assert times.bfloat16().unique().numel() == (1000 * times).bfloat16().unique().numel() == 1
    network = family.load_network(torch.bfloat16)
    latents = initial(family, sampling, rows=1).expand(2, *[-1] * len(family.latent_shape(sampling)))
    conditions = {
        n: torch.ones(2, *((TEXT_TOKENS, width) if n == "prompt_embeds" else (width,)))
        for n, width in family.widths.items()
    }
    with torch.no_grad():
        first, second = family.velocity(network, latents, times, conditions, sampling)
    assert (first - second).norm() / first.norm() > 0.03


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_networks_compute_in_bf16(name: str, pipeline_folder: Any, prepared: Any) -> None:
    """fp32 masters behind FSDP2, which gathers weights in bf16 and casts no input."""
    from torch import distributed, nn
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Door(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, function: Any) -> Any:
            return function(self.network)

    family, sampling = (
        prepared(pipeline_folder(name), torch.bfloat16),
        sampling_for(name, guidance_scale=EXACT_GUIDANCE),
    )
    latents, time = initial(family, sampling), torch.tensor(EXACT_TIMES)
    conditions = {
        n: torch.randn(2, *((TEXT_TOKENS, width) if n == "prompt_embeds" else (width,)))
        for n, width in family.widths.items()
    }
    network = family.load_network(torch.float32)
    with torch.no_grad():
        reference = prepared(pipeline_folder(name)).velocity(network, latents, time, conditions, sampling)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in family.blocks(network):
            fully_shard(block, mesh=mesh, mp_policy=precision)
        door = fully_shard(Door(network), mesh=mesh, mp_policy=precision)
        velocity = door(lambda inner: family.velocity(inner, latents, time, conditions, sampling))
        velocity.square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())
    finally:
        distributed.destroy_process_group()
    assert velocity.dtype == torch.float32
    assert (velocity - reference).norm() / reference.norm() < 0.1


@pytest.mark.parametrize("name", ["flux", "wan21"])
def test_embeddings_of_another_model_are_refused(name: str, pipeline_folder: Any, prepared: Any) -> None:
    family, sampling = prepared(pipeline_folder(name)), sampling_for(name)
    latents = initial(family, sampling)
    with pytest.raises(DataError, match="lack 'prompt_embeds'"):
        family.velocity(None, latents, torch.ones(2), {"text": torch.ones(2, 3)}, sampling)
    with pytest.raises(DataError, match=r"'prompt_embeds' is 7 wide; the model in .* takes 32"):
        family.velocity(None, latents, torch.ones(2), {"prompt_embeds": torch.ones(2, 3, 7)}, sampling)
