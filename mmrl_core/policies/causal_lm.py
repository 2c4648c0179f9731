"""Text policies: any transformers `AutoModelForCausalLM`. An action is a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmrl_core.checkpoint.initial_weights import load_initial
from mmrl_core.contracts import ActionStats, Bucket, GenerationRequest, Prompt, Record, Rollouts, Sample, TokenPolicy
from mmrl_core.errors import DataError, ModelError
from mmrl_core.lora import add_adapters, set_adapters
from mmrl_core.text import model_folder, packing
from mmrl_core.text.flops import DecoderSize
from mmrl_core.text.prefix_cache import PromptRecorder
from mmrl_core.text.token_batches import left_pad, unique_prompts
from mmrl_core.text.token_stats import token_stats

if TYPE_CHECKING:
    from mmrl_core.policies.options import CausalLmOptions, TokenSampling
    from mmrl_core.recipe import ModelSpec

REPEATED, SHARED = 0, 1
"""Plans: every row computes its own prompt in one pass, or each prompt is computed once and responses follow."""

SHARING_WORTH = 0.1
"""Fraction of the tokens that sharing prompts must save before it is used: two passes have a cost."""


class TextNetwork(nn.Module):
    """A transformers model behind one door: every use is `network(function, ...)`, one forward of the root."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function(transformers_model, *arguments)`."""
        return function(self.model, *arguments)


class CausalLmPolicy(TokenPolicy):
    """Text models. Payload by row: `prompt_ids` [L] and `response_ids` [R], int64."""

    options: CausalLmOptions
    sampling: TokenSampling

    def __init__(self, options: CausalLmOptions, model: ModelSpec, sampling: TokenSampling) -> None:
        super().__init__(options, model, sampling)
        self.tokenizer: Any = None

    # ------------------------------------------------------------------------------------------------ prompts and text

    def prepare(self) -> None:
        self.tokenizer = model_folder.load_tokenizer(self.model)
        self.eos_ids = model_folder.eos_token_ids(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.pad_id = int(pad) if pad is not None else min(self.eos_ids)

    def accepts(self, prompt: Prompt) -> bool:
        limit = self.options.max_prompt_tokens
        if limit is None:
            return True
        length = len(self.encode(prompt)["prompt_ids"])
        if length <= limit:
            return True
        if self.options.long_prompts == "skip":
            return False
        raise DataError(
            f"{prompt.origin}: the prompt has {length} tokens, more than model.policy.max_prompt_tokens = {limit}. "
            "Raise the limit, shorten the prompt, or set model.policy.long_prompts: skip"
        )

    def encode(self, prompt: Prompt) -> dict[str, Tensor]:
        if prompt.messages is not None:
            if self.tokenizer.chat_template is None:
                raise DataError(
                    f"{prompt.origin}: the prompt is a chat, but the tokenizer of {self.model.path} has no chat "
                    "template. Choose one with data.template, or template: raw"
                )
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in prompt.messages],
                tokenize=False,
                add_generation_prompt=True,
                **self.options.chat_template_kwargs,
            )
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            assert prompt.text is not None
            begin = self.tokenizer.bos_token  # a rendered template may have written it already
            written = begin is not None and prompt.text.startswith(begin)
            ids = self.tokenizer(prompt.text, add_special_tokens=not written).input_ids
        if not ids:
            raise DataError(f"{prompt.origin}: the prompt has no tokens (text {prompt.text!r})")
        return {"prompt_ids": torch.tensor(ids, dtype=torch.int64)}

    def decode(self, rollouts: Rollouts, requests: Sequence[GenerationRequest]) -> list[Sample]:
        if not len(rollouts):  # transformers decodes no rows as one empty text
            return []
        prompts = {r.group_id: r.prompt for r in requests}
        texts = self.tokenizer.batch_decode(
            [ids.tolist() for ids in rollouts.payload["response_ids"]], skip_special_tokens=True
        )
        lengths = rollouts.mask.sum(-1).tolist()
        return [
            Sample(
                sample_id=int(sample_id),
                group_id=int(group_id),
                prompt=prompts[int(group_id)],
                text=text,
                length=int(length),
                truncated=bool(truncated),
            )
            for sample_id, group_id, text, length, truncated in zip(
                rollouts.sample_id, rollouts.group_id, texts, lengths, rollouts.truncated, strict=True
            )
        ]

    def lengths(self, rollouts: Rollouts) -> tuple[list[int], list[int]]:
        prompts = [len(ids) for ids in rollouts.payload["prompt_ids"]]
        return prompts, [len(ids) for ids in rollouts.payload["response_ids"]]

    @cached_property
    def _size(self) -> DecoderSize | None:
        return DecoderSize.of(model_folder.load_config(self.model))

    def flops(self, rollouts: Rollouts) -> float | None:
        if self._size is None:
            return None
        groups: dict[int, tuple[int, list[int]]] = {}
        for group, prompt, response in zip(rollouts.group_id.tolist(), *self.lengths(rollouts), strict=True):
            groups.setdefault(group, (prompt, []))[1].append(response)
        return self._size.forward(list(groups.values()))

    # ----------------------------------------------------------------------------------------------------- the network

    def load(self, dtype: torch.dtype, *, adapters: bool = True) -> nn.Module:
        model = model_folder.load_causal_lm(self.model, dtype, self.options.attention)
        if self.model.init_from is not None:
            load_initial(model, self.model.init_from, lambda name: name, model=self.model.path)
        if adapters and self.model.lora is not None:
            add_adapters(model, self.model.lora, task_type="CAUSAL_LM")
        model_folder.check_head(model, self.model.path)
        packing.enable(model)
        return TextNetwork(model).eval()

    @contextmanager
    def reference_network(self, module: nn.Module) -> Iterator[None]:
        set_adapters(module, enabled=False)
        try:
            yield
        finally:
            set_adapters(module, enabled=True)

    def shard_units(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, TextNetwork)
        return list(_decoder(module.model).layers)

    def weight_name(self, parameter: str) -> str:
        return parameter.removeprefix("model.").replace(".base_layer.", ".")

    def save_weights(self, directory: Path, weights: Iterable[Bucket]) -> None:
        model_folder.save_folder(directory, weights, self.model, self.tokenizer)

    @property
    def max_actions(self) -> int:
        return self.sampling.max_new_tokens

    # ---------------------------------------------------------------------------------------------------------- replay

    def reference_record(self, module: nn.Module, batch: Rollouts, *, plan: int = 0) -> Record:
        stats = self.replay(module, batch, plan=plan)
        return {"log_probs": list(stats.log_probs.detach().cpu())}

    def replay(
        self,
        module: nn.Module,
        batch: Rollouts,
        *,
        actions: slice = slice(None),
        entropy_gradient: bool = False,
        reference: Record | None = None,
        plan: int = 0,
    ) -> ActionStats:
        assert actions in (slice(None), slice(0, batch.mask.shape[1])), "tokens of a row are replayed together"
        log_probs, entropy = module(self._token_stats, batch, plan == SHARED)
        pad = (0, batch.mask.shape[1] - log_probs.shape[1])  # negative: a shared prompt's response pass has two columns
        entropy = entropy if entropy_gradient else entropy.detach()
        return ActionStats(log_probs=nn.functional.pad(log_probs, pad), entropy=nn.functional.pad(entropy, pad))

    def plan(self, batch: Rollouts) -> int:
        """SHARED when computing each prompt once is asked for, or saves enough tokens."""
        if self.options.prefix_sharing != "auto":
            return SHARED if self.options.prefix_sharing == "on" else REPEATED
        prompts, responses = self.lengths(batch)
        unique, _ = unique_prompts(batch)
        saved = sum(prompts) - sum(len(p) for p in unique)
        return SHARED if saved >= SHARING_WORTH * (sum(prompts) + sum(responses)) and saved else REPEATED

    def _token_stats(self, model: Any, batch: Rollouts, shared: bool) -> tuple[Tensor, Tensor]:
        """(log-probs, entropy), both [b, width] with width at least the longest response of these rows."""
        device = next(model.parameters()).device
        # the response pass of a shared prompt feeds all tokens but the last: it must have one even here
        width = max(int(batch.mask.sum(-1).max()), 2 if shared else 1)
        responses = pad_sequence(batch.payload["response_ids"], batch_first=True, padding_value=self.pad_id)
        responses = nn.functional.pad(responses, (0, max(0, width - responses.shape[1])), value=self.pad_id)
        responses = responses[:, :width].to(device)
        taken = nn.functional.pad(batch.mask, (0, max(0, width - batch.mask.shape[1])))[:, :width].to(device)
        if not bool(taken.any()):
            taken = torch.zeros_like(taken)
            taken[0, 0] = True  # no action counts, but the network must be in the graph; its weight is 0
        embed, head = model_folder.ends(model)
        log_probs, entropy = token_stats(
            head,
            self._states(model, embed, batch, responses, taken, shared),
            responses[taken],
            temperature=self.sampling.temperature or 1.0,
            logits_bytes=self.options.logits_memory_mb << 20,
        )
        zeros = torch.zeros(taken.shape, dtype=torch.float32, device=device)
        return zeros.masked_scatter(taken, log_probs), zeros.masked_scatter(taken, entropy)

    def _states(
        self, model: Any, embed: model_folder.Embed, batch: Rollouts, responses: Tensor, taken: Tensor, shared: bool
    ) -> Tensor:
        """[n, H]: the state that predicts each of `responses[taken]`."""
        prompts, prompt_of_row = unique_prompts(batch)
        if not shared:
            prompts, prompt_of_row = batch.payload["prompt_ids"], torch.arange(len(responses))
        if packing.is_enabled(model):
            return packing.packed_states(_decoder(model), embed, prompts, prompt_of_row, responses, taken)
        if shared:
            return self._shared_hidden(model, embed, prompts, prompt_of_row, responses)[taken]
        return self._repeated_hidden(model, embed, prompts, responses)[taken]

    def _shared_hidden(
        self, model: Any, embed: model_folder.Embed, prompts: list[Tensor], prompt_of_row: Tensor, responses: Tensor
    ) -> Tensor:
        """[b, r, H]: the state that predicts each response token; each prompt computed once."""
        device = responses.device
        ids, mask = left_pad(prompts, self.pad_id)
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        recorder = PromptRecorder(len(_decoder(model).layers))
        hidden = _decoder(model)(
            **embed(ids),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=recorder,
            use_cache=True,
        ).last_hidden_state
        row = prompt_of_row.to(device)
        steps = torch.arange(responses.shape[1] - 1, device=device)
        following = _decoder(model)(
            **embed(responses[:, :-1]),
            attention_mask=nn.functional.pad(mask[row], (0, responses.shape[1] - 1), value=1),
            position_ids=positions[row, -1:] + 1 + steps,
            past_key_values=recorder.for_rows(prompt_of_row),
            use_cache=True,
        ).last_hidden_state
        return torch.cat([hidden[:, -1:][row], following], dim=1)

    def _repeated_hidden(
        self, model: Any, embed: model_folder.Embed, prompts: list[Tensor], responses: Tensor
    ) -> Tensor:
        """[b, r, H], each row computing its own prompt."""
        device = responses.device
        ids, mask = left_pad(prompts, self.pad_id)
        ids = torch.cat([ids.to(device), responses[:, :-1]], dim=1)
        mask = nn.functional.pad(mask.to(device), (0, responses.shape[1] - 1), value=1)
        hidden = _decoder(model)(
            **embed(ids),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        ).last_hidden_state
        result: Tensor = hidden[:, -responses.shape[1] :]
        return result


def _decoder(model: Any) -> Any:
    """The stack of layers below the head."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers"):
        raise ModelError(
            f"{type(model).__name__}: its decoder {type(decoder).__name__} has no `layers`; the policy causal_lm "
            "supports decoder-only models of transformers whose decoder lists its blocks there"
        )
    return decoder
