"""The rollout engine `vllm`: vLLM in the training process, one engine a rank or a few ranks to an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmrl_core.contracts import (
    Bucket,
    GenerationRequest,
    LogProbSemantics,
    Policy,
    Replica,
    RolloutEngine,
    Rollouts,
    RunContext,
    TokenPolicy,
    TrainingBackend,
)
from mmrl_core.errors import RolloutError
from mmrl_core.text.token_rollouts import token_rollouts
from mmrl_vllm.options import VllmOptions
from mmrl_vllm.probe import CURE, VERSIONS, installed, supported
from mmrl_vllm.starting import process_kept, sleep_is_possible, start, stop
from mmrl_vllm.tokens import responses, sampling_params
from mmrl_vllm.weights import CheckedStream, Names, names_of, release_packed

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
"""Largest log-prob difference between vLLM and replay, by dtype. Measured with 30 layers and 135M parameters on a CPU:
5.7e-5 in fp32; 0.41 in bf16, where two sets of kernels round differently in every layer. fp16 is not measured."""
CPU_KV_CACHE_MB = 1024


class VllmEngine(RolloutEngine):
    """Text generation with vLLM and its own copy of the weights. Neighbouring ranks may share an engine."""

    options: VllmOptions
    policy: TokenPolicy
    weights: Literal["own", "shared"] = "own"

    def __init__(self, options: VllmOptions) -> None:
        super().__init__(options)
        self._llm: Any = None
        self._version = 0
        self._asleep: set[str] = set()

    # ---------------------------------------------------------------------------------------------------------- set-up

    def setup(self, context: RunContext, policy: Policy, backend: TrainingBackend | None) -> None:
        if not isinstance(policy, TokenPolicy):
            raise RolloutError(f"rollout: vllm samples tokens; the policy {type(policy).__name__} has other actions")
        self.context, self.policy = context, policy
        self._check_versions()
        self._check_layout()
        self.deterministic = context.device.name == "cpu"
        self._names: Names = names_of(policy.model)
        self._llm = start(self._arguments(), context.device, what=policy.model.path)
        self._longest = int(self._llm.model_config.max_model_len)
        self._can_sleep = self.options.sleep and sleep_is_possible()
        if policy.model.init_from is not None:
            # vLLM has read the folder `path`, whose weights init_from replaces
            module = policy.load(getattr(torch, self.dtype), adapters=False)
            own = [(policy.weight_name(name), parameter) for name, parameter in module.named_parameters()]
            self._load(iter([own]))

    @property
    def dtype(self) -> str:
        """Precision in which the engine computes."""
        return self.options.dtype or self.policy.model.dtype

    @property
    def replica(self) -> Replica:
        world, size = self.context.world, self.options.tensor_parallel
        return Replica(index=world.rank // size, count=world.size // size, is_root=world.rank % size == 0)

    @property
    def semantics(self) -> LogProbSemantics:
        return LogProbSemantics(
            temperature_applied=True, truncation_renormalised=True, dtype="float32", tolerance=TOLERANCE[self.dtype]
        )

    def _check_versions(self) -> None:
        """A probe answers before this; a run that skipped it must not go on with wrong numbers."""
        found = installed()
        for name, version in found.items():
            if not supported(version):
                raise RolloutError(f"rollout: vllm works with vLLM {VERSIONS}; {name} {version} is installed. {CURE}")
        if not found:
            raise RolloutError(f"rollout: vllm: vLLM is not installed. {CURE}")

    def _check_layout(self) -> None:
        size, world, device = self.options.tensor_parallel, self.context.world, self.context.device.name
        if world.size % size:
            raise RolloutError(
                f"rollout.tensor_parallel {size} does not divide the run's {world.size} ranks. Change it, or "
                "launcher.processes"
            )
        if size > 1 and device != "cpu" and not self.options.untested:
            raise RolloutError(
                f"rollout.tensor_parallel {size} on {device}: it has been run on the CPU only. Set "
                "rollout.untested: true to try it, and compare with `mmrl verify`"
            )

    def _arguments(self) -> dict[str, Any]:
        options, model, device = self.options, self.policy.model, self.context.device.name
        on_cpu = device == "cpu"
        cache = options.kv_cache_mb or (CPU_KV_CACHE_MB if on_cpu else None)
        eager = on_cpu if options.enforce_eager is None else options.enforce_eager
        arguments: dict[str, Any] = {
            "model": model.path,
            "trust_remote_code": model.trust_remote_code,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # nothing of the folder's: the recipe says how to sample
            "dtype": self.dtype,
            "seed": self.context.seed % (1 << 31),
            "tensor_parallel_size": options.tensor_parallel,
            "max_num_seqs": options.max_num_seqs,
            "enforce_eager": eager,
            "enable_prefix_caching": options.prefix_caching,
            "logprobs_mode": "processed_logprobs",
            "use_tqdm_on_load": False,
            **options.engine_args,
        }
        if options.max_model_len is not None:
            arguments["max_model_len"] = options.max_model_len
        if cache is not None:
            arguments["kv_cache_memory_bytes"] = cache << 20
        else:
            arguments["gpu_memory_utilization"] = options.memory_fraction
        if not on_cpu and options.sleep:
            arguments["enable_sleep_mode"] = True
        if self.context.world.size > 1:
            # every rank is in the run's process group already and builds its own part of the engine
            arguments["distributed_executor_backend"] = "external_launcher"
            os.environ.setdefault("RANK", str(self.context.world.rank))
            os.environ.setdefault("LOCAL_RANK", str(self.context.world.local_rank))
        return arguments

    # ------------------------------------------------------------------------------------------------------ generation

    def generate(self, requests: Sequence[GenerationRequest], sampling: Any) -> Rollouts:
        prompts = [self._prompt(request, sampling) for request in requests]
        jobs: list[dict[str, list[int]]] = []
        params: list[Any] = []
        for request, ids in zip(requests, prompts, strict=True):
            jobs += [{"prompt_token_ids": ids.tolist()}] * len(request.seeds)
            params += [sampling_params(sampling, self.policy.eos_ids, seed) for seed in request.seeds]
        tokens: list[Tensor] = []
        log_probs: list[Tensor] = []
        if jobs:
            self._forget_prefixes()  # what is cached shapes the rounding: the same requests give the same samples
            with process_kept(self.context.device):
                outputs = self._llm.generate(jobs, params, use_tqdm=False)
            tokens, log_probs = responses(outputs)
        return token_rollouts(self.policy, requests, prompts, tokens, log_probs, self._version)

    def _prompt(self, request: GenerationRequest, sampling: Any) -> Tensor:
        encoded = self.policy.encode(request.prompt)
        if set(encoded) != {"prompt_ids"}:
            raise RolloutError(
                f"rollout: vllm takes prompts of tokens only; {request.prompt.origin} also has "
                f"{', '.join(sorted(set(encoded) - {'prompt_ids'}))}. Use rollout: hf"
            )
        ids = encoded["prompt_ids"]
        if len(ids) + sampling.max_new_tokens > self._longest:
            raise RolloutError(
                f"{request.prompt.origin}: a prompt of {len(ids)} tokens and sampling.max_new_tokens "
                f"{sampling.max_new_tokens} exceed the engine's {self._longest}. Raise rollout.max_model_len (the "
                "model's own limit is the largest), or set model.policy.max_prompt_tokens"
            )
        return ids

    def _forget_prefixes(self) -> None:
        if self.options.prefix_caching and self._llm.reset_prefix_cache() is False:
            raise RolloutError("vLLM did not reset its prefix cache: it would go on with keys of the old weights")

    # --------------------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def update_weights(self, weights: Iterator[Bucket] | None, version: int) -> None:
        assert weights is not None, "this engine has weights of its own"
        if "weights" in self._asleep:
            self._llm.wake_up(tags=["weights"])
            self._asleep.discard("weights")
        self._load(weights)
        self._version = version

    def _load(self, weights: Iterator[Bucket]) -> None:
        stream = CheckedStream(weights, self._names)
        if self.context.device.name == "cpu":
            self._llm.apply_model(release_packed)
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(stream)})
        except (ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
            raise RolloutError(
                f"vLLM cannot take the new weights of {self.policy.model.path}: {type(error).__name__}: {error}"
            ) from error
        stream.finish()
        self._forget_prefixes()

    # ---------------------------------------------------------------------------------------------------------- memory

    def sleep(self) -> None:
        if self._can_sleep and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        if self._asleep:
            self._llm.wake_up(tags=sorted(self._asleep))
            self._asleep = set()

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            stop(llm)
            del llm
            self.context.device.empty_cache()
