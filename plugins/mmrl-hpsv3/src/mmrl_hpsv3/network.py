"""HPSv3's network: Qwen2-VL without its language-model head, and a reward head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmrl_core.errors import RewardError
from mmrl_hpsv3.base import CURE as BASE_CURE
from mmrl_hpsv3.base import Base
from mmrl_hpsv3.checkpoint import CURE, EMBEDDING, Checkpoint
from mmrl_hpsv3.inputs import Inputs


class HpsV3Network(nn.Module):
    """Hidden state at the reward token -> (mu, sigma)."""

    def __init__(self, config: Any, reward_id: int) -> None:
        from transformers import AutoModel

        super().__init__()
        self.reward_id = reward_id
        self.backbone: Any = AutoModel.from_config(config, attn_implementation="sdpa")
        hidden = config.text_config.hidden_size
        self.rm_head = nn.Sequential(
            nn.Linear(hidden, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """[B, 2] float32: mu and sigma of every row.

        Positions count through the row, image tokens included, the same in all three components: hpsv3 1.0.0 (with the
        transformers 4.45.2 that it pins) gives the language model no positions, so HPSv3 was trained without
        Qwen2-VL's two-dimensional positions of image tokens, which transformers would compute by default.
        """
        rows, length = inputs.token_ids.shape
        positions = torch.arange(length, device=inputs.token_ids.device).expand(3, rows, length)
        hidden = self.backbone(
            input_ids=inputs.token_ids,
            attention_mask=inputs.attention_mask,
            position_ids=positions,
            pixel_values=inputs.patches,
            image_grid_thw=inputs.grids,
            use_cache=False,
        ).last_hidden_state
        logits: Tensor = self.rm_head(hidden[inputs.token_ids == self.reward_id].float())
        return logits


def load_network(base: Base, checkpoint: Checkpoint, dtype: torch.dtype) -> HpsV3Network:
    """The network on the CPU, Qwen2-VL in `dtype` and the reward head in float32, in evaluation mode.

    Built without memory and filled with the file's tensors, so that the weights are held once.

    Raises RewardError naming what does not fit.
    """
    _check_vocabulary(base, checkpoint)
    base.config.text_config.vocab_size = checkpoint.tensors[EMBEDDING].shape[0]
    with torch.device("meta"):
        network = HpsV3Network(base.config, base.reward_id)
    names = {_published(own): own for own in network.state_dict()}
    _check_names(checkpoint, {name: tuple(network.get_parameter(own).shape) for name, own in names.items()}, base)
    state = {}
    for name, own in names.items():
        tensor = checkpoint.tensors[name].read()
        if not tensor.is_floating_point():
            raise RewardError(f"checkpoint {checkpoint.path}: {name} is {tensor.dtype}, a quantised copy. {CURE}")
        state[own] = tensor.to(torch.float32 if own.startswith("rm_head.") else dtype)
    network.load_state_dict(state, strict=True, assign=True)
    _restore_frequencies(network, base.config)
    left = [name for name, tensor in [*network.named_parameters(), *network.named_buffers()] if tensor.is_meta]
    if left:
        import transformers

        raise RewardError(
            f"transformers {transformers.__version__} keeps {', '.join(left)} outside the checkpoint, which mmrl-hpsv3 "
            "cannot restore. Cure: pip install 'transformers==5.9.*'"
        )
    return network.requires_grad_(False).eval()


def _published(own: str) -> str:
    """The published name of one of the network's tensors."""
    return own.replace("backbone.language_model.", "model.", 1).replace("backbone.visual.", "visual.", 1)


def _check_vocabulary(base: Base, checkpoint: Checkpoint) -> None:
    if EMBEDDING not in checkpoint.tensors:
        raise RewardError(f"checkpoint {checkpoint.path} has no {EMBEDDING}: these are not HPSv3's weights. {CURE}")
    rows = checkpoint.tensors[EMBEDDING].shape[0]
    if rows != len(base.tokenizer):
        raise RewardError(
            f"checkpoint {checkpoint.path}: {EMBEDDING} has {rows} rows, but the tokenizer of {base.folder} with the "
            f"reward token has {len(base.tokenizer)} tokens, so the reward token would not be row {rows - 1}. Cure: "
            "name the model that the checkpoint was trained from as `base`; for the published one that is "
            "Qwen/Qwen2-VL-7B-Instruct"
        )


def _check_names(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]], base: Base) -> None:
    found = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    problems = []
    for what, names in (
        ("missing", [name for name in wanted if name not in found]),
        ("unexpected", [name for name in found if name not in wanted]),
        (
            "of another shape",
            [
                f"{name} {list(found[name])} instead of {list(shape)}"
                for name, shape in wanted.items()
                if name in found and found[name] != shape
            ],
        ),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{what}: {', '.join(names[:3])}{more}")
    if problems:
        raise RewardError(
            f"checkpoint {checkpoint.path} does not fit HPSv3 on the configuration of {base.folder}; "
            f"{'; '.join(problems)}. {CURE}, with the folder of Qwen/Qwen2-VL-7B-Instruct as `base`"
        )


def _restore_frequencies(network: HpsV3Network, config: Any) -> None:
    """The rotary frequencies, which no checkpoint holds: 1 / theta^(2i / d), rounded to bfloat16.

    hpsv3 casts the whole module to bfloat16, these tables included, in training as in inference, so HPSv3's network has
    the rounded ones, whatever the precision it is computed in now. The visual tower multiplies, and takes sine and
    cosine, in the table's own dtype, and the language model in float32.
    """
    text, vision = config.text_config, config.vision_config
    kind = text.rope_parameters["rope_type"]
    if kind != "default":
        raise RewardError(f"config.json asks for rotary positions of kind {kind!r}, Qwen2-VL's is 'mrope'. {BASE_CURE}")
    of_text = _frequencies(text.hidden_size // text.num_attention_heads, text.rope_parameters["rope_theta"])
    rotary = network.backbone.language_model.rotary_emb
    for name in dict(rotary.named_buffers()):
        rotary.register_buffer(name, of_text.float(), persistent=False)
    of_vision = _frequencies(vision.embed_dim // vision.num_heads // 2, 10000.0)
    network.backbone.visual.rotary_pos_emb.register_buffer("inv_freq", of_vision, persistent=False)


def _frequencies(dimensions: int, theta: float) -> Tensor:
    """[dimensions / 2] bfloat16."""
    exponents = torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions
    return (1.0 / theta**exponents).to(torch.bfloat16)
