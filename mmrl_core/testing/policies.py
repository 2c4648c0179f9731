"""`PolicyConformance`: what the core relies on in a text policy, proved on a tiny language model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_saver

from mmrl_core.contracts import ActionStats, GenerationRequest, Prompt, Rollouts, TokenPolicy
from mmrl_core.errors import DataError, ModelError
from mmrl_core.plugins import import_string
from mmrl_core.recipe import ModelSpec
from mmrl_core.testing.components import ComponentConformance
from mmrl_core.testing.texts import plain_model, plain_stats, stored_names, text_rollouts
from mmrl_core.testing.tiny import tiny_language_model

TEMPERATURE = 0.8
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 + 30?"})


@dataclass(kw_only=True)
class Easel:
    """A prepared policy with its loaded network, and reference numbers."""

    folder: Path
    policy: TokenPolicy
    module: nn.Module
    rollouts: Rollouts
    plain: Any
    expected: ActionStats


class PolicyConformance(ComponentConformance):
    """Subclass it as `Test...` and name the `component`: a policy whose actions are tokens."""

    kind = "policy"
    architecture: ClassVar[Literal["llama", "qwen2"]] = "llama"
    """The tiny model's."""
    tie_word_embeddings: ClassVar[bool] = True
    """Whether the tiny model's head is its embedding."""
    sampling: ClassVar[Mapping[str, Any]] = {"temperature": TEMPERATURE, "max_new_tokens": 9}
    """The recipe's sampling section."""
    lora: ClassVar[bool] = True
    """Whether it can load adapters."""
    plans: ClassVar[Sequence[int]] = (0, 1)
    """Plans of `replay` to check (see Policy.plan)."""
    log_prob_tolerance: ClassVar[float] = 2e-5
    """Largest difference of a log-prob from transformers' own, fp32."""

    @classmethod
    def make(cls, folder: Path, model: Mapping[str, Any] | None = None) -> TokenPolicy:
        """The policy for a model folder, prepared."""
        selected = cls.selected()
        dotted = selected.found.component.sampling
        assert dotted is not None, "a policy declares the model of the recipe's `sampling` section"
        sampling = import_string(dotted, "sampling options").model_validate(cls.sampling)
        policy: TokenPolicy = selected.create(
            ModelSpec.model_validate({"path": str(folder), **(model or {})}), sampling
        )
        policy.prepare()
        return policy

    @pytest.fixture(scope="class")
    @classmethod
    def easel(cls, tmp_path_factory: pytest.TempPathFactory) -> Easel:
        """The policy on the tiny model."""
        cls.require_available()
        folder = tiny_language_model(
            tmp_path_factory.mktemp("conformance") / "model",
            architecture=cls.architecture,
            tie_word_embeddings=cls.tie_word_embeddings,
            extra_vocabulary=5,
        )
        policy = cls.make(folder)
        rollouts = text_rollouts(policy)
        plain = plain_model(folder)
        with torch.no_grad():
            expected = plain_stats(plain, rollouts, cls.sampling["temperature"])
        return Easel(
            folder=folder,
            policy=policy,
            module=policy.load(torch.float32),
            rollouts=rollouts,
            plain=plain,
            expected=expected,
        )

    def test_prompts_encode_and_decode(self, easel: Easel) -> None:
        """Engines get token ids, int64, [L], L >= 1; chats go through the chat template and say so in their text."""
        for prompt in (Prompt(index=0, text="1 + 1 ="), Prompt(index=1, messages=CHAT)):
            ids = easel.policy.encode(prompt)["prompt_ids"]
            assert ids.dtype == torch.int64
            assert ids.ndim == 1
            assert prompt.question() in easel.policy.tokenizer.decode(ids.tolist())
            assert torch.equal(ids, easel.policy.encode(prompt)["prompt_ids"]), "the same prompt, other ids"

    def test_chat_prompts_end_where_the_model_answers(self, easel: Easel) -> None:
        """The template's generation prompt is there and its begin-of-text token is not doubled."""
        ids = easel.policy.encode(Prompt(index=0, messages=CHAT))["prompt_ids"].tolist()
        tokenizer = easel.policy.tokenizer
        text = tokenizer.apply_chat_template([dict(m) for m in CHAT], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids) == text
        assert ids.count(tokenizer.bos_token_id) == 1

    def test_stop_and_padding_tokens_are_known(self, easel: Easel) -> None:
        """Engines stop at `eos_ids` and fill with `pad_id`."""
        assert easel.policy.tokenizer.eos_token_id in easel.policy.eos_ids
        assert 0 <= easel.policy.pad_id < len(easel.policy.tokenizer)

    def test_decode_gives_one_sample_a_row(self, easel: Easel) -> None:
        """Rewards look at text without special tokens; ids, prompt, length and truncation come along."""
        prompts = [Prompt(index=i, text=str(i), answer=i) for i in range(3)]
        tokens = easel.policy.tokenizer("42", add_special_tokens=False).input_ids
        rollouts = text_rollouts(easel.policy, (1, 1, 1), longest=len(tokens) + 1)
        rollouts.payload["response_ids"][0] = torch.tensor([*tokens, min(easel.policy.eos_ids)])
        requests = [
            GenerationRequest(prompt=p, group_id=p.index, sample_ids=(p.index,), seeds=(0,), group_seed=0)
            for p in prompts
        ]
        samples = easel.policy.decode(rollouts, requests)
        assert [s.prompt for s in samples] == prompts
        assert samples[0].text == "42"
        assert [s.sample_id for s in samples] == [0, 1, 2]
        assert [s.length for s in samples] == rollouts.mask.sum(-1).tolist()
        assert [s.truncated for s in samples] == rollouts.truncated.tolist()

    def test_lengths_are_those_of_the_rows(self, easel: Easel) -> None:
        """Token counts of the metrics."""
        lengths = easel.policy.lengths(easel.rollouts)
        assert lengths is not None, "a text policy counts tokens"
        prompts, responses = lengths
        assert prompts == [len(ids) for ids in easel.rollouts.payload["prompt_ids"]]
        assert responses == easel.rollouts.mask.sum(-1).tolist()

    def test_weights_of_another_folder_are_taken(self, easel: Easel, tmp_path: Path) -> None:
        """`model.init_from` replaces the weights of `model.path`; adapters come on top of them."""
        other = {name: tensor + 0.01 for name, tensor in easel.plain.state_dict().items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save({"model": other}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        for lora in (None, {"rank": 2, "alpha": 4.0}) if self.lora else (None,):
            policy = self.make(easel.folder, {"init_from": str(tmp_path / "dcp"), "lora": lora})
            loaded = {policy.weight_name(n): p for n, p in policy.load(torch.float32).named_parameters()}
            same = [name for name in loaded if name in other and torch.equal(loaded[name], other[name])]
            assert len(same) == len(list(easel.plain.parameters())), "weights are not those of model.init_from"

    def test_network_runs_functions(self, easel: Easel) -> None:
        """Sharding backends see every use as one forward of the root: `module(function, *args)`."""
        answer = easel.module(lambda network, *given: (isinstance(network, nn.Module), given), 1, 2)
        assert answer == (True, (1, 2))

    def test_network_is_ready_for_replay(self, easel: Easel) -> None:
        """fp32 on the CPU, dropout off."""
        assert not easel.module.training
        assert {p.dtype for p in easel.module.parameters()} == {torch.float32}
        assert {p.device.type for p in easel.module.parameters()} == {"cpu"}

    def test_replay_equals_transformers(self, easel: Easel) -> None:
        """Log-probs under every plan: ragged rows, temperature applied, fp32, [b, t]."""
        mask = easel.rollouts.mask
        for plan in {*self.plans, easel.policy.plan(easel.rollouts)}:
            with torch.no_grad():
                stats = easel.policy.replay(easel.module, easel.rollouts, plan=plan)
            assert stats.log_probs.shape == mask.shape
            assert stats.log_probs.dtype == torch.float32
            difference = (stats.log_probs - easel.expected.log_probs)[mask].abs().max().item()
            assert difference <= self.log_prob_tolerance, f"plan {plan}: off by {difference:.2e}"

    def test_replay_of_rows_that_do_not_count(self, easel: Easel) -> None:
        """A masked minibatch still runs and connects the network: sharded ranks move in lockstep."""
        rollouts = text_rollouts(easel.policy, (2,))
        rollouts.mask = torch.zeros_like(rollouts.mask)
        for plan in self.plans:
            stats = easel.policy.replay(easel.module, rollouts, plan=plan)
            assert stats.log_probs.requires_grad
            gradients = torch.autograd.grad(
                (stats.log_probs * 0.0).sum(), list(easel.module.parameters()), allow_unused=True
            )
            assert not [n for (n, _), g in zip(easel.module.named_parameters(), gradients, strict=True) if g is None]

    def test_replay_runs_the_same_forwards_whatever_the_rows(self, easel: Easel) -> None:
        """With one plan every rank runs the same forwards of the shard units, for any number and shape of rows."""
        for plan in self.plans:
            counts = set()
            for rollouts in (easel.rollouts, text_rollouts(easel.policy, (1,), longest=1), text_rollouts(easel.policy)):
                counts.add(tuple(self._unit_calls(easel, rollouts, plan)))
            assert len(counts) == 1, f"plan {plan}: other rows, other forwards"

    def test_entropy_gradient_only_when_asked(self, easel: Easel) -> None:
        """`entropy_gradient` False: the entropy is for the metrics and costs no memory in the backward pass."""
        for wanted in (False, True):
            stats = easel.policy.replay(easel.module, easel.rollouts, entropy_gradient=wanted)
            assert stats.log_probs.requires_grad
            if stats.entropy is not None:
                assert stats.entropy.requires_grad is wanted
                assert easel.expected.entropy is not None
                difference = (stats.entropy - easel.expected.entropy)[easel.rollouts.mask].abs().max().item()
                assert difference <= 10 * self.log_prob_tolerance, f"entropy is off by {difference:.2e}"

    def test_reference_record_is_by_row(self, easel: Easel) -> None:
        """A record is selected and moved with its rows."""
        with torch.no_grad():
            record = easel.policy.reference_record(easel.module, easel.rollouts)
        assert record
        assert all(len(rows) == len(easel.rollouts) for rows in record.values())
        assert all(not t.requires_grad and t.device.type == "cpu" for rows in record.values() for t in rows)

    def test_action_slices_cover_all_actions_once(self, easel: Easel) -> None:
        """Backends replay slice by slice; together the slices are every action, in order."""
        assert easel.policy.max_actions >= 1
        for count in (1, 7, easel.policy.max_actions):
            slices = easel.policy.action_slices(count)
            covered = [action for part in slices for action in range(count)[part]]
            assert covered == list(range(count))

    def test_shard_units_are_in_forward_order(self, easel: Easel) -> None:
        """Backends gather the next block while one computes: each unit once, inside the module, in forward order."""
        units = easel.policy.shard_units(easel.module)
        inside = {id(module) for module in easel.module.modules()}
        assert units
        assert all(id(unit) in inside for unit in units)
        assert len({id(unit) for unit in units}) == len(units)
        calls = self._unit_calls(easel, easel.rollouts, 0)
        assert calls == sorted(calls), f"forward order of the units is {calls}"
        assert set(calls) == set(range(len(units))), "a unit that replay never runs"

    def test_weight_names_are_those_of_the_folder(self, easel: Easel) -> None:
        """Weights travel under the folder's own names, one to one."""
        names = [easel.policy.weight_name(name) for name, _ in easel.module.named_parameters()]
        assert sorted(names) == stored_names(easel.folder)

    def test_saved_folder_is_the_model(self, easel: Easel, tmp_path: Path) -> None:
        """The export is an ordinary folder: same files' names and bits, loads in transformers and in the policy."""
        bucket = [(easel.policy.weight_name(n), p.detach()) for n, p in easel.module.named_parameters()]
        easel.policy.save_weights(tmp_path / "export", iter([bucket[:2], bucket[2:]]))
        assert stored_names(tmp_path / "export") == stored_names(easel.folder)
        with torch.no_grad():
            again = plain_stats(plain_model(tmp_path / "export"), easel.rollouts, self.sampling["temperature"])
        assert torch.equal(again.log_probs, easel.expected.log_probs)
        reopened = self.make(tmp_path / "export")
        prompt = Prompt(index=0, messages=CHAT)
        assert torch.equal(reopened.encode(prompt)["prompt_ids"], easel.policy.encode(prompt)["prompt_ids"])
        assert reopened.eos_ids == easel.policy.eos_ids

    def test_adapters_switch_off_and_on(self, easel: Easel) -> None:
        """With LoRA the reference is the same module with its adapters switched off, within a block."""
        if not self.lora:
            pytest.skip("the class says that this policy loads no adapters")
        policy = self.make(easel.folder, {"lora": {"rank": 2}})
        module = policy.load(torch.float32)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert 0 < len(trained) < len(list(module.parameters()))
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.1)
            adapted = policy.replay(module, easel.rollouts).log_probs
            with policy.reference_network(module):
                base = policy.replay(module, easel.rollouts).log_probs
            again = policy.replay(module, easel.rollouts).log_probs
        assert (base - easel.expected.log_probs).abs().max() <= self.log_prob_tolerance
        assert (adapted - base).abs().max() > 1e-3, "adapters have no effect"
        assert torch.equal(adapted, again), "the adapters were left switched off"
        without = policy.load(torch.float32, adapters=False)
        assert len(list(without.parameters())) == len(list(module.parameters())) - len(trained)

    def test_flops_are_positive_or_unknown(self, easel: Easel) -> None:
        """Unknown is unknown; a made-up number would end in the performance tables."""
        flops = easel.policy.flops(easel.rollouts)
        assert flops is None or flops > 0

    def test_missing_model_is_a_model_error(self, tmp_path: Path) -> None:
        """A wrong path is the user's mistake, and the message names it."""
        self.require_available()
        with pytest.raises(ModelError, match="nowhere"):
            self.make(tmp_path / "nowhere")

    def test_chat_without_a_template_is_a_data_error(self, easel: Easel, tmp_path: Path) -> None:
        """The message names the prompt's row."""
        policy = self.make(easel.folder)
        policy.tokenizer.chat_template = None
        with pytest.raises(DataError, match=r"rows\.jsonl:17"):
            policy.encode(Prompt(index=0, messages=CHAT, origin="rows.jsonl:17"))

    def _unit_calls(self, easel: Easel, rollouts: Rollouts, plan: int) -> list[int]:
        """Which units ran in one replay, in order; a second pass over all units counts as well."""
        calls: list[int] = []

        def note(number: int) -> Any:
            return lambda *_: calls.append(number)

        units = easel.policy.shard_units(easel.module)
        hooks = [unit.register_forward_pre_hook(note(i)) for i, unit in enumerate(units)]
        try:
            with torch.no_grad():
                easel.policy.replay(easel.module, rollouts, plan=plan)
        finally:
            for hook in hooks:
                hook.remove()
        return calls
