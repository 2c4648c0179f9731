"""What is written is read by plain megatron-core, strictly, in real processes, and computes what transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import weight_models
from mmrl_mindspeed.format_options import McoreOptions
from weight_models import VARIANTS, same, tensors

from mmrl_core.checkpoint.conversion import Conversion, convert
from mmrl_core.checkpoint.format_options import HuggingFaceOptions
from mmrl_core.errors import MmrlError
from mmrl_core.testing.stage import run_ranks


def to_mcore(source: Path, target: Path, **options: object) -> None:
    chosen = McoreOptions(**options)  # type: ignore[arg-type]
    job = Conversion(
        source=source,
        target=target,
        source_format=None,
        target_format="mcore",
        options=chosen,
        model=None,
        dtype=None,
        verify=False,
    )
    convert(job, lambda what, done, total: None)


def test_plain_megatron_reads_every_rank_and_computes_what_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for variant in VARIANTS:
        source = weight_models.write_model(tmp_path / "hf" / str(variant), variant)
        to_mcore(source, tmp_path / "mcore" / "tensor" / str(variant), tensor_parallel=2)
        to_mcore(source, tmp_path / "mcore" / "pipeline" / str(variant), pipeline_parallel=2, layers_per_stage=[3, 2])
    output = tmp_path / "logits.pt"
    run_ranks("mcore_reader", [str(tmp_path / "mcore"), str(output)], 2, tmp_path / "ranks", 400)
    logits = torch.load(output, weights_only=True)
    assert set(logits) == {str(variant) for variant in VARIANTS}
    ids = torch.arange(24).reshape(2, 12) * 5 % weight_models.SIZES["vocab_size"]
    for variant in VARIANTS:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / str(variant), attn_implementation="eager")
        with torch.no_grad():
            expected = model(ids).logits
        assert expected.std() > 0.3
        assert (logits[str(variant)] - expected).abs().max() < 1e-5, variant


@pytest.mark.network
def test_a_published_model_goes_there_and_back(tmp_path: Path) -> None:
    from mmrl_core.packaged_models import local_path

    try:
        source = Path(local_path("mmrl:smollm2-135m-instruct"))
    except MmrlError as error:
        pytest.skip(f"the model cannot be fetched here: {error}")
    to_mcore(source, tmp_path / "m", tensor_parallel=3, pipeline_parallel=4, layers_per_stage=[8, 8, 8, 6])
    job = Conversion(
        source=tmp_path / "m",
        target=tmp_path / "hf",
        source_format=None,
        target_format="hf",
        options=HuggingFaceOptions(shard_gb=0.1),
        model=None,
        dtype=None,
        verify=True,
    )
    convert(job, lambda what, done, total: None)
    assert same(tensors(tmp_path / "hf"), tensors(source))
