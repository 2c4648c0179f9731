"""Loading, adapting, checking and saving transformers models as ordinary Hugging Face folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmrl_core.checkpoint.weight_files import replaced_folder, write_weights
from mmrl_core.contracts import Bucket
from mmrl_core.errors import ModelError

if TYPE_CHECKING:
    from mmrl_core.recipe import ModelSpec

log = logging.getLogger("mmrl.model")


def load_tokenizer(spec: ModelSpec) -> Any:
    """The folder's tokenizer. Raises ModelError."""
    from transformers import AutoTokenizer

    return _loading(spec, "tokenizer", lambda: AutoTokenizer.from_pretrained(spec.path, **_remote(spec)))


def load_config(spec: ModelSpec) -> Any:
    """The folder's config. Raises ModelError."""
    from transformers import AutoConfig

    return _loading(spec, "config", lambda: AutoConfig.from_pretrained(spec.path, **_remote(spec)))


def eos_token_ids(spec: ModelSpec, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a response: the generation config's and the tokenizer's. Raises ModelError when none is known."""
    from transformers import GenerationConfig

    ids: set[int] = set()
    try:
        stated = GenerationConfig.from_pretrained(spec.path, **_remote(spec)).eos_token_id
    except OSError:  # a folder without generation_config.json is ordinary
        stated = None
    ids.update([stated] if isinstance(stated, int) else stated or [])
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    if not ids:
        raise ModelError(f"{spec.path}: neither generation_config.json nor the tokenizer names an end-of-text token")
    return frozenset(ids)


def load_causal_lm(spec: ModelSpec, dtype: torch.dtype, attention: str) -> Any:
    """`AutoModelForCausalLM` on the CPU in `dtype`, every row of whose embedding is trained. Raises ModelError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = _loading(
        spec,
        "model",
        lambda: AutoModelForCausalLM.from_pretrained(
            spec.path, dtype=dtype, attn_implementation=attention, **_remote(spec)
        ),
    )
    train_padding_row(model)
    return model


def train_padding_row(model: Any) -> None:
    """Let the padding token's row of the embedding have a gradient, which transformers leaves out.

    Padding is in no loss here, and many models pad with a token that also stands in prompts (the end of a turn): what
    it does there would not be learned, and backends whose embedding knows no padding would differ.
    """
    model.get_input_embeddings().padding_idx = None


def _remote(spec: ModelSpec) -> dict[str, bool]:
    if spec.trust_remote_code:
        log.warning("model.trust_remote_code: code from %s will run in this process", spec.path)
    return {"trust_remote_code": spec.trust_remote_code}


def _loading(spec: ModelSpec, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        here = Path(spec.path)
        hint = (
            "the folder exists: is it a Hugging Face model folder (config.json, *.safetensors, tokenizer files)?"
            if here.is_dir()
            else "no such folder; for a hub id the hub must be reachable (HF_HUB_OFFLINE unset)"
        )
        raise ModelError(f"model.path {spec.path!r}: cannot load its {what}: {hint}\n{error}") from error


# ------------------------------------------------------------------------------------------------------------- the head


Embed = Callable[[Tensor], dict[str, Tensor]]
"""Token ids to the decoder's first argument, by name."""


def ends(model: Any) -> tuple[Embed, Callable[[Tensor], Tensor]]:
    """What lies around the decoder: token ids -> its first argument by name, and `head`. For one graph.

    On a CPU a tied table gets the gradients of both ends through `_TiedTable`. Devices with fast memory need not care,
    and not all have sparse sums.
    """
    embedding, linear = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(embedding) is torch.nn.Embedding and type(linear) is torch.nn.Linear and linear.bias is None
    if not plain or embedding.weight is not linear.weight or embedding.weight.device.type != "cpu":
        return lambda ids: {"input_ids": ids}, head(model)
    rows, table = _TiedTable.apply(embedding.weight)  # type: ignore[no-untyped-call]

    def embed(ids: Tensor) -> dict[str, Tensor]:
        return {"inputs_embeds": torch.nn.functional.embedding(ids, rows, sparse=True)}

    return embed, head(model, _Product(table))


class _TiedTable(torch.autograd.Function):
    """The weight [V, H] of a tied model twice, for looking up and for the head; their gradients meet in one place.

    The head's is the whole table, that of looking up has the rows of the batch. Autograd would make a table of zeros
    for each look-up and new ones for their sums: a tenth of an update of a small model.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        rows, table = gradients
        if rows is None:
            return table
        if table is None:
            return rows.to_dense()
        return table.add_(rows)  # nobody else has it: the head's product made it for this node


class _Product:
    """hidden [n, H] @ table [V, H] transposed."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.out_features = len(table)

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.table)


def head(model: Any, product: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """Hidden states [n, H] -> logits [n, V], with the model family's scaling; `product` stands for the layer."""
    linear = product or model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    cap = getattr(config, "final_logit_softcapping", None)
    divide = getattr(config, "logits_scaling", None)
    multiply = getattr(config, "logit_scale", None)
    if cap is None and divide in (None, 1.0) and multiply in (None, 1.0):
        plain: Callable[[Tensor], Tensor] = linear
        return plain

    def scaled(hidden: Tensor) -> Tensor:
        logits: Tensor = linear(hidden)
        if divide is not None:
            logits = logits / divide
        if multiply is not None:
            logits = logits * multiply
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return scaled


@torch.no_grad()
def check_head(model: Any, path: str) -> None:
    """Prove on two tokens that decoder + head is the model's own forward. Raises ModelError when it is not."""
    model.eval()
    ids = torch.tensor([[0, 1]])
    want = model(input_ids=ids, use_cache=False).logits[0].float()
    embed, to_logits = ends(model)
    got = to_logits(model.get_decoder()(**embed(ids), use_cache=False).last_hidden_state[0]).float()
    if want.shape != got.shape or not torch.allclose(want, got, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{path}: {type(model).__name__} transforms its logits in a way that the policy causal_lm does not know; "
            "its log-probs would be wrong. Please report the model"
        )


# ------------------------------------------------------------------------------------------------------------- saving


def save_folder(directory: Path, weights: Iterable[Bucket], spec: ModelSpec, tokenizer: Any) -> None:
    """Stream weights into an ordinary folder: safetensors shards, index, config, generation config, tokenizer.

    The folder is written beside its final place and renamed; one that is there is replaced.
    """
    dtype = getattr(torch, spec.dtype)
    with replaced_folder(directory) as partial:
        write_weights(partial, weights, dtype, stem="model")
        config = load_config(spec)
        config.dtype = dtype
        config.save_pretrained(partial)
        _copy_generation_config(spec, partial)
        tokenizer.save_pretrained(partial)


def _copy_generation_config(spec: ModelSpec, folder: Path) -> None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(spec.path, **_remote(spec)).save_pretrained(folder)
    except OSError:  # the source has none, so neither has the export
        log.info("%s has no generation_config.json; the export has none either", spec.path)
