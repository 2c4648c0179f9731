"""A program of its own: plain megatron-core reads what `mmrl convert` wrote. Of ours it has what lets it run on a CPU.

`python -m mcore_reader FOLDER OUTPUT` on two ranks: FOLDER/tensor/NAME and FOLDER/pipeline/NAME are checkpoints in two
parts. Every rank loads every one strictly; logits of fixed tokens in the tensor-parallel layout are written to OUTPUT.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from mmrl_mindspeed.cpu_patches import apply_for
from torch import Tensor


def build(args: argparse.Namespace, first_stage: int | None) -> GPTModel:
    """A GPTModel as Megatron's own pretrain_gpt.py builds it from the checkpoint's arguments."""
    uneven = {} if first_stage is None else {"num_layers_in_first_pipeline_stage": first_stage}
    transformer = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=args.params_dtype,
        pipeline_dtype=args.params_dtype,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        **uneven,
    )
    return GPTModel(
        transformer,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    )


def checkpoint_of(folder: Path) -> dict[str, Any]:
    tensor, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    several = parallel_state.get_pipeline_model_parallel_world_size() > 1
    rank = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if several else "")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / "release" / rank / "model_optim_rng.pt", weights_only=True)


@torch.no_grad()
def logits_of(model: GPTModel, vocabulary: int) -> Tensor:
    """[2, 12, V] of fixed tokens."""
    ids = torch.arange(24).reshape(2, 12) * 5 % vocabulary
    mask = torch.triu(torch.ones(1, 1, 12, 12, dtype=torch.bool), 1)
    return model(ids, torch.arange(12).expand(2, 12), mask)[..., :vocabulary]


def read(place: Path) -> tuple[GPTModel, argparse.Namespace]:
    """A model with this rank's part, loaded strictly and compared."""
    content = checkpoint_of(place)
    args = content["args"]
    first = int(args.num_layer_list.split(",")[0]) if args.num_layer_list else None
    model = build(args, first).eval()
    result = model.load_state_dict(content["model"], strict=False)
    # what is no parameter: empty extra state of the layers, which have none without TransformerEngine
    lacking = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    assert not lacking, (place.name, lacking)
    assert not result.unexpected_keys, (place.name, result.unexpected_keys)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, content["model"][name]), (place.name, name)
    return model, args


def main(folder: Path, output: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MMRL_STORE']}", rank=rank, world_size=size)
    logits = {}
    for layout, sizes in {"tensor": (2, 1), "pipeline": (1, 2)}.items():
        parallel_state.initialize_model_parallel(*sizes)
        model_parallel_cuda_manual_seed(1)
        for place in sorted((folder / layout).iterdir()):
            model, args = read(place)
            if layout == "tensor":
                logits[place.name] = logits_of(model, args.vocab_size)
        parallel_state.destroy_model_parallel()
    if rank == 0:
        torch.save(logits, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with apply_for("cpu"):
        main(Path(sys.argv[1]), Path(sys.argv[2]))
