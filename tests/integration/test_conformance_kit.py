"""The conformance kit itself: every planted fault must be caught by the check that is about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mmrl_core.backends import fsdp2, weight_stream
from mmrl_core.backends.optimizer import AdamW, UpdateGuard
from mmrl_core.contracts import Prompt, PromptSource, Reward, RewardResult, Sample
from mmrl_core.devices.cpu import CpuDevice
from mmrl_core.errors import BackendError
from mmrl_core.hookspecs import Component, hookimpl
from mmrl_core.plugins import load_plugins
from mmrl_core.policies import causal_lm
from mmrl_core.rewards.checks import BatchFailedError
from mmrl_core.rollouts import decoding, hf
from mmrl_core.testing.backend_replicas import ReplicaChecks, Seen
from mmrl_core.testing.backend_stage import BackendStage, Bench
from mmrl_core.testing.backends import BackendConformance
from mmrl_core.testing.components import ComponentConformance
from mmrl_core.testing.devices import DeviceConformance
from mmrl_core.testing.engine_stage import EngineStage, Studio
from mmrl_core.testing.engines import RolloutEngineConformance
from mmrl_core.testing.prompt_sources import PromptSourceConformance
from mmrl_core.testing.rewards import RewardConformance
from mmrl_core.testing.texts import text_rollouts
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe
from mmrl_core.testing.writers import WriterConformance

# -------------------------------------------------------------------------------------------------------------- devices


class NewParameters(CpuDevice):
    """PyTorch may not replace a host tensor's data by this device's, as with one that does not say that it may."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("meta")


class FaultyDevice(DeviceConformance):
    component = "cpu"


def test_faulty_device() -> None:
    with pytest.raises(AssertionError, match="moving a module to meta separates tied weights"):
        FaultyDevice().test_tied_weights_stay_tied(NewParameters())


# ------------------------------------------------------------------------------------------------------------- backends


class TestFaultyBackend(BackendStage):
    kind = "backend"
    component = "fsdp2"
    options: ClassVar[Mapping[str, Any]] = {}
    checks = BackendConformance()

    def test_forgotten_temperature(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        right = causal_lm.token_stats
        monkeypatch.setattr(causal_lm, "token_stats", lambda *a, **k: right(*a, **{**k, "temperature": 1.0}))
        with pytest.raises(AssertionError, match="replay is off"):
            self.checks.test_replay_equals_transformers(bench)

    def test_mean_over_micro_batches(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        right = fsdp2.accumulate

        def halved(replay: Any, part: Any, loss: Any, slices: Any, device: Any) -> Any:
            def half(stats: Any, batch: Any) -> Any:
                output = loss(stats, batch)
                output.loss = output.loss / 3
                return output

            half.scope, half.entropy_gradient = loss.scope, loss.entropy_gradient  # type: ignore[attr-defined]
            return right(replay, part, half, slices, device)

        monkeypatch.setattr(fsdp2, "accumulate", halved)
        with pytest.raises(AssertionError, match="gradients are off"):
            self.checks.test_gradients_equal_autograd(bench)

    def test_no_guard(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(UpdateGuard, "admits", lambda self, norm: True)
        with pytest.raises(AssertionError):
            self.checks.test_non_finite_update_is_skipped(bench)
        with pytest.raises(pytest.fail.Exception):
            self.checks.test_too_many_skips_stop_the_run(bench)

    def test_guard_that_gives_up_at_once(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(self: AdamW, norm: torch.Tensor) -> bool:
            raise BackendError("not finite")

        monkeypatch.setattr(AdamW, "step", stop)
        with pytest.raises(BackendError):
            self.checks.test_non_finite_update_is_skipped(bench)

    def test_biases_decay(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        right = AdamW.__init__

        def decaying(self: AdamW, *arguments: Any, **named: Any) -> None:
            right(self, *arguments, **named)
            for group in self.torch_optimizer.param_groups:
                group["weight_decay"] = self.spec.weight_decay

        monkeypatch.setattr(AdamW, "__init__", decaying)
        with pytest.raises(AssertionError, match="differs from AdamW"):
            self.checks.test_first_step_is_adamw(bench)

    def test_export_leaves_one_out(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        right = weight_stream.export
        monkeypatch.setattr(weight_stream, "export", lambda *a: ([*bucket][1:] for bucket in right(*a)))
        with pytest.raises(AssertionError):
            self.checks.test_export_is_the_model_that_was_loaded(bench)

    def test_adapters_not_merged(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(weight_stream, "_delta", lambda layer: torch.zeros(()))
        with pytest.raises(AssertionError):
            self.checks.test_lora_merged_export_equals_adapters_on(bench, tmp_path)

    def test_schedule_forgotten_on_load(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        right = fsdp2.Fsdp2Backend.load

        def forgetful(self: Any, directory: Path, *, optimizer: bool) -> None:
            right(self, directory, optimizer=optimizer)
            self.optimizer.updates = 0

        monkeypatch.setattr(fsdp2.Fsdp2Backend, "load", forgetful)
        with pytest.raises(AssertionError):
            self.checks.test_resumed_training_is_bit_equal(bench, tmp_path, False)

    def test_reference_that_is_trained(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        right = fsdp2.Fsdp2Backend.reference

        def live(self: Any, rollouts: Any) -> Any:
            self._reference = self.module
            return right(self, rollouts)

        monkeypatch.setattr(fsdp2.Fsdp2Backend, "reference", live)
        with pytest.raises(AssertionError, match="the reference moved"):
            self.checks.test_reference_stays_what_it_was(bench)


AVERAGING = """
from mmrl_core import Component, hookimpl
mmrl_api = 1

@hookimpl
def mmrl_training_backends():
    return [Component(name="averaging", summary="Averages over ranks", target="averaging_backend:AveragingBackend",
                      options="mmrl_core.backends.options:Fsdp2Options")]
"""
AVERAGING_BACKEND = """
import torch
from torch.distributed.fsdp import FSDPModule
from mmrl_core.backends.fsdp2 import Fsdp2Backend

class AveragingBackend(Fsdp2Backend):
    def setup(self, context, policy, training):
        super().setup(context, policy, training)
        for part in (m for m in self.module.modules() if isinstance(m, FSDPModule)):
            part.set_gradient_divide_factor(float(context.world.size))

    def update(self, minibatch, loss):
        return {**super().update(minibatch, loss), "check/log_prob": float(self.context.world.rank)}
"""


@pytest.fixture(scope="class")
def averaging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An installed distribution whose backend averages over ranks, and whose metrics differ between them."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "averaging_plugin.py").write_text(AVERAGING)
    (folder / "averaging_backend.py").write_text(AVERAGING_BACKEND)
    info = folder / "averaging-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: averaging\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmrl]\naveraging = averaging_plugin\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        load_plugins.cache_clear()
        yield
    load_plugins.cache_clear()


@pytest.mark.usefixtures("averaging")
class TestFaultAcrossRanks(ReplicaChecks):
    """A backend of another distribution, right on one rank and wrong on two: some checks must fail, the others hold."""

    kind = "backend"
    component = "averaging"
    options: ClassVar[Mapping[str, Any]] = {}
    lora = False

    @pytest.mark.parametrize("kind", ["gradients", "lopsided_gradients"])
    def test_gradients_are_the_sum_over_replicas(self, bench: Bench, seen: Seen, kind: str) -> None:
        with pytest.raises(AssertionError, match="off by 5"):
            super().test_gradients_are_the_sum_over_replicas(bench, seen, kind)

    def test_updates_are_the_same_as_on_one_rank(self, bench: Bench, seen: Seen) -> None:
        """AdamW hides a constant factor of the gradient unless clipping or epsilon sees it: no claim here."""

    def test_metrics_are_the_same_on_every_rank(self, bench: Bench, seen: Seen) -> None:
        with pytest.raises(AssertionError, match="metrics"):
            super().test_metrics_are_the_same_on_every_rank(bench, seen)


# -------------------------------------------------------------------------------------------------------------- engines


class TestFaultyEngine(EngineStage):
    kind = "rollout"
    component = "hf"
    options: ClassVar[Mapping[str, Any]] = {"weights": "own"}
    checks = RolloutEngineConformance()

    @pytest.mark.parametrize(
        "check",
        ["test_top_k_keeps_to_the_likeliest", "test_top_p_keeps_to_the_nucleus", "test_min_p_leaves_out_the_unlikely"],
    )
    def test_no_truncation(self, studio: Studio, monkeypatch: pytest.MonkeyPatch, check: str) -> None:
        monkeypatch.setattr(decoding, "truncate", lambda p, sampling: p)
        with pytest.raises(AssertionError):
            getattr(self.checks, check)(studio)

    def test_temperature_only_in_the_log_probs(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        right = decoding.truncate
        monkeypatch.setattr(decoding, "truncate", lambda p, sampling: right(p**1.3, sampling))
        with pytest.raises(AssertionError, match="chi-square"):
            self.checks.test_tokens_follow_the_distribution(studio, 0.7)

    def test_seeds_by_position(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        right = hf.decode_tokens

        def positional(model: Any, prompts: Any, sizes: Any, seeds: Any, *rest: Any) -> Any:
            return right(model, prompts, sizes, list(range(len(seeds))), *rest)

        monkeypatch.setattr(hf, "decode_tokens", positional)
        with pytest.raises(AssertionError, match="changed with its batch"):
            self.checks.test_samples_do_not_depend_on_their_batch(studio)

    def test_old_weights(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        def keep(self: Any, weights: Any, version: int) -> None:
            self._version = version

        monkeypatch.setattr(hf.HfEngine, "update_weights", keep)
        with pytest.raises(AssertionError, match="log-probs of other weights"):
            self.checks.test_new_weights_are_used(studio)

    def test_end_token_not_counted(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        right = hf.token_rollouts

        def cut(*arguments: Any) -> Any:
            rollouts = right(*arguments)
            rollouts.mask = rollouts.mask & ~rollouts.mask.roll(-1, 1).logical_not()
            return rollouts

        monkeypatch.setattr(hf, "token_rollouts", cut)
        with pytest.raises(AssertionError):
            self.checks.test_mask_covers_the_response_and_its_end_token(studio)


# -------------------------------------------------------------------------------------------- rewards, sources, writers


class Odd(Reward):
    """Faulty in the way that `mode` says."""

    mode = ""

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        if self.mode == "count":
            return [RewardResult(value=1.0)]
        if self.mode == "nan":
            return [RewardResult(value=float("nan")) for _ in samples]
        if self.mode == "both":
            return [RewardResult(value=0.0, failure="no") for _ in samples]
        return [RewardResult(value=float(len(samples))) for _ in samples]


@pytest.mark.parametrize(
    ("mode", "check"),
    [
        ("count", "test_one_result_a_sample"),
        ("count", "test_no_samples_no_results"),
        ("nan", "test_one_result_a_sample"),
        ("both", "test_one_result_a_sample"),
        ("batch", "test_order_and_batches_do_not_matter"),
    ],
)
def test_faulty_reward(mode: str, check: str) -> None:
    reward = Odd()
    reward.mode = mode
    with pytest.raises((AssertionError, BatchFailedError)):
        getattr(RewardConformance(), check)(reward)


class Walk(PromptSource):
    """Counts its calls instead of looking at the index."""

    calls = 0

    def prepare(self) -> None:
        """Nothing."""

    def __len__(self) -> int:
        return 10

    def prompt(self, index: int) -> Prompt:
        self.calls += 1
        return Prompt(index=index, text=f"question {self.calls % 10}", origin=f"row {self.calls % 10}")

    def digest(self) -> str:
        return "0" * 16


class FixedSource(PromptSourceConformance):
    """Opens a Walk."""

    @classmethod
    def open(cls, selected: Any, seed: int = 0) -> PromptSource:
        return Walk(None, seed)


def test_faulty_source() -> None:
    checks, selected = FixedSource(), None
    with pytest.raises(AssertionError):
        checks.test_prompt_is_a_function_of_its_index(Walk(None, 0), selected)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        checks.test_digest_names_data_and_order(Walk(None, 0), selected)  # type: ignore[arg-type]


class Appending:
    """Never looks at `first_step`, and does not know null."""

    @hookimpl
    def mmrl_run_start(self, run_dir: str) -> None:
        self.path = Path(run_dir) / "steps"

    @hookimpl
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(f"{step}\n")


class AppendingChecks(WriterConformance):
    """Its checks."""

    @classmethod
    def create(cls) -> Any:
        return Appending()

    @classmethod
    def steps_written(cls, run_dir: Path) -> Sequence[int]:
        return [int(line) for line in (run_dir / "steps").read_text().split()]


def test_faulty_writer(tmp_path: Path) -> None:
    AppendingChecks().test_whole_run(tmp_path / "whole")
    with pytest.raises(AssertionError):
        AppendingChecks().test_resumed_run(tmp_path / "resumed")


# --------------------------------------------------------------------------------------------------------- declarations


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ComponentConformance]:
    """Checks of a component whose module is written here."""
    (tmp_path / "heavy_plugin.py").write_text(
        "import torch\nfrom mmrl_core.recipe import Spec\nclass Options(Spec):\n    '''Doc.'''\n    bare: int = 1\n"
    )
    (tmp_path / "slow_plugin.py").write_text(
        "import time\nfrom mmrl_core import Probe\ndef probe():\n    time.sleep(0.6)\n"
        "    return Probe(available=True)\n"
        "def no():\n    return Probe(available=False)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**fields: str) -> ComponentConformance:
        class Checks(ComponentConformance):
            kind = "reward"
            component = Component(**{"name": "x", "summary": "One line", "target": "slow_plugin:probe", **fields})

        return Checks()

    return make


def test_faulty_declarations(heavy: Callable[..., ComponentConformance]) -> None:
    with pytest.raises(AssertionError, match="torch is not importable"):
        heavy(options="heavy_plugin:Options").test_declaration_options_need_no_torch()
    with pytest.raises(AssertionError, match="bare"):
        heavy(options="heavy_plugin:Options").test_declaration_every_option_is_documented()
    with pytest.raises(AssertionError, match=r"at most 0\.5 s"):
        heavy(probe="slow_plugin:probe").test_declaration_probe_is_quick_and_light()
    with pytest.raises(AssertionError, match="says why"):
        heavy(probe="slow_plugin:no").test_declaration_probe_is_quick_and_light()
    with pytest.raises(AssertionError, match="more than one line"):
        heavy(summary="a\nb").test_declaration_summary_is_one_line()
    heavy().test_declaration_target_imports_or_the_probe_says_why_not()


# ---------------------------------------------------------------------------------------------------- the tiny material


def test_tiny_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_language_model(tmp_path / "m", end_tokens=["."], extra_vocabulary=3, seed=1)
    again = tiny_language_model(tmp_path / "n", end_tokens=["."], extra_vocabulary=3, seed=1)
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("12 ab é", add_special_tokens=False).input_ids
    assert len(ids) == 8, "one token a byte"
    assert tokenizer.decode(ids) == "12 ab é"
    assert model.config.vocab_size == len(tokenizer) + 3
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(".")]
    assert sum(p.numel() for p in model.parameters()) < 200_000


def test_tiny_recipe_merges_sections() -> None:
    recipe = tiny_recipe(
        "m", "r", algorithm={"steps": 9}, backend="mine", rollout={"weights": "own"}, data={"name": "x"}
    )
    assert recipe["algorithm"] == {"steps": 9, "prompts_per_step": 2, "samples_per_prompt": 4}
    assert recipe["backend"] == "mine"
    assert recipe["rollout"] == {"name": "hf", "weights": "own"}
    assert recipe["data"] == {"name": "x"}
    json.dumps(recipe)


class TestTextRollouts(BackendStage):
    kind = "backend"
    component = "fsdp2"
    options: ClassVar[Mapping[str, Any]] = {}

    def test_are_ragged_groups(self, bench: Bench) -> None:
        policy = bench.default()[1].policy
        rollouts = text_rollouts(policy, (1, 3), longest=5, seed=4)
        assert rollouts.group_id.tolist() == [0, 1, 1, 1]
        assert rollouts.mask.shape == (4, 5)
        assert len({int(n) for n in rollouts.mask.sum(-1)}) > 1
        prompts = rollouts.payload["prompt_ids"]
        assert prompts[1] is prompts[3]
        same = text_rollouts(policy, (1, 3), longest=5, seed=4)
        assert all(
            torch.equal(a, b)
            for a, b in zip(rollouts.payload["response_ids"], same.payload["response_ids"], strict=True)
        )
