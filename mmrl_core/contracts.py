"""The contracts between the GRPO core and its components, and the types that pass between them.

Shapes: B samples (rows) of one replica, T actions. An *action* is one stochastic choice: a token, or one denoising
step. Rows of a group (the G samples of one prompt) are adjacent and on one replica. `Rollouts` live in host memory;
policies move what they need to the device inside `replay`.

This module imports no torch at run time, so that reward packages can import it anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmrl_core.recipe import AdvantageSpec, LossSpec, ModelSpec, OptimizerSpec, Recipe
    from mmrl_core.world import World

Record = dict[str, "list[Tensor]"]
"""Per-row tensors of a policy's own: names to a list with one tensor a row. Rows of a group may share a tensor."""

Bucket = Sequence[tuple[str, "Tensor"]]
"""Some weights: (Hugging Face name, full tensor). A weight stream is an iterator of buckets."""

TRAINING = "mmrl_core.launch.worker"
"""The module whose `main` trains: what launchers run unless they are told otherwise."""


# ---------------------------------------------------------------------------------------------- what is passed around


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question. Exactly one of `messages` (a chat, rendered by the policy) and `text` (used as it is) is set."""

    index: int
    """Position in the run's order of prompts; names the prompt's row in errors together with `origin`."""
    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None
    answer: Any = None
    """The reference answer that rewards compare with, or None."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the data row, for rewards."""
    origin: str = ""
    """Where the row came from: `file:line`, or the generator's words."""

    def question(self) -> str:
        """The text a person reads: the raw text, or the last user message."""
        if self.text is not None:
            return self.text
        return next((m["content"] for m in reversed(self.messages or ()) if m["role"] == "user"), "")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The decoded result that a reward looks at."""

    sample_id: int
    """Global id of the sample in its step."""
    group_id: int
    """Index of its prompt in the step's global batch."""
    prompt: Prompt
    """What was asked."""
    text: str | None = None
    """The response as text, special tokens left out, or None."""
    image: Any = None
    """uint8 array [H, W, 3], or None."""
    video: Any = None
    """uint8 array [frames, H, W, 3], or None."""
    length: int = 0
    """Number of actions taken."""
    truncated: bool = False
    """Stopped by the length limit."""
    score: float | None = None
    """The weighted sum of the recipe's rewards, for writers. Rewards see None, and it stays None where one failed."""

    @property
    def answer(self) -> Any:
        """The prompt's reference answer."""
        return self.prompt.answer

    def shown_score(self) -> str:
        """What a person reads of the score: four digits, or nothing when there is none."""
        return "" if self.score is None else f"{self.score:.4g}"


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """A value or a failure, never both. `scores` are named sub-scores for the metrics."""

    value: float | None = None
    """The reward, finite; None when it failed."""
    failure: str | None = None
    """Why there is no value, in one line; None when there is one."""
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt to sample a group from."""

    prompt: Prompt
    """What to answer."""
    group_id: int
    """Index of the prompt in the step's global batch."""
    sample_ids: tuple[int, ...]
    """Global ids of the samples to draw; the group size is their number."""
    seeds: tuple[int, ...]
    """One seed a sample, derived from (run seed, step, sample id): independent of ranks and batching."""
    group_seed: int
    """For what the samples of the group share, derived from (run seed, step, group id)."""


@dataclass(kw_only=True)
class Rollouts:
    """One replica's samples. Every rank of a replica holds the same."""

    group_id: Tensor
    """[B] int64."""
    sample_id: Tensor
    """[B] int64."""
    mask: Tensor
    """[B, T] bool: actions that count (response tokens up to and including EOS; the trained denoising steps)."""
    behaviour_log_probs: Tensor
    """[B, T] fp32: at sampling time, under the engine's declared semantics; 0 where not `mask`."""
    truncated: Tensor
    """[B] bool: stopped by the length limit."""
    policy_version: int
    """How many updates the sampling weights had seen."""
    payload: Record
    """What replay needs, by row: token ids; latents and embeddings."""
    samples: list[Sample] = field(default_factory=list)
    """Decoded, for rewards; one a row, or empty once scored."""

    def __len__(self) -> int:
        return int(self.group_id.shape[0])


@dataclass(kw_only=True)
class ActionStats:
    """What a policy returns for a slice of actions of some rows."""

    log_probs: Tensor
    """[b, t] fp32, with gradient when the caller enabled it."""
    entropy: Tensor | None = None
    """[b, t] fp32, with gradient only when asked for."""
    kl: Tensor | None = None
    """[b, t]: divergence from the reference record, when the policy owns its form (Gaussians). Tokens leave it None:
    the loss estimates it from log-probs."""
    weight: Tensor | None = None
    """[b, t], without gradient: a factor on each action's policy-gradient term that the policy asks for; None: 1."""


@dataclass(kw_only=True)
class LossBatch:
    """What a loss reads beside the ActionStats, for the same rows and actions."""

    advantages: Tensor
    """[b] fp32."""
    mask: Tensor
    """[b, t] bool."""
    weight: Tensor
    """[b, t] fp32: mask / (normaliser counted over the global minibatch). Summing weight * x over micro-batches and
    replicas gives the recipe's aggregation of x."""
    metric_weight: Tensor
    """[b, t] fp32: mask / (number of actions in the global minibatch): sums to a mean over actions."""
    behaviour_log_probs: Tensor
    """[b, t] fp32."""
    old_log_probs: Tensor | None = None
    """[b, t] fp32, or None: the current log-probs, detached (one update per rollout)."""
    reference_log_probs: Tensor | None = None
    """[b, t] fp32, or None: no KL term, or one that the policy computes."""


@dataclass(kw_only=True)
class LossOutput:
    """A loss's answer for some rows and actions."""

    loss: Tensor
    """Scalar: a *sum* over actions (already weighted), never a mean."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Metrics that add up over micro-batches and replicas (weighted by `metric_weight`)."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Metrics combined by maximum."""


class Loss(Protocol):
    """A pure function of ActionStats and the minibatch."""

    scope: Literal["action", "sequence"]
    """`action`: terms of different actions are independent, so a backend may slice along T. `sequence`: whole rows
    are needed; a backend that slices takes the row's log-probs first without gradient and feeds dL/dlogp back."""
    entropy_gradient: bool
    """Whether the entropy must carry gradient."""

    def __call__(self, stats: ActionStats, batch: LossBatch) -> LossOutput: ...


@dataclass(kw_only=True)
class Minibatch:
    """One replica's share of one optimizer step. Rows of a group are adjacent; shares may be empty or uneven."""

    rollouts: Rollouts
    """The rows of this share."""
    advantages: Tensor
    """[B] fp32."""
    weight: Tensor
    """[B, T], see LossBatch."""
    metric_weight: Tensor
    """[B, T], see LossBatch."""
    old_log_probs: Tensor | None = None
    """[B, T] or None."""
    reference: Record | None = None
    """The policy's reference record, by row, or None."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """The ranks that hold the same data (a TP x PP x SP x CP block)."""

    index: int
    """Which replica this rank belongs to, 0 <= index < count."""
    count: int
    """Number of replicas."""
    is_root: bool
    """True on exactly one rank of each replica."""


@dataclass(frozen=True, kw_only=True)
class LogProbSemantics:
    """What an engine's behaviour log-probs mean."""

    temperature_applied: bool
    """The logits were divided by the sampling temperature first."""
    truncation_renormalised: bool
    """Log-probs are of the distribution after top-p / top-k / min-p, renormalised. False: of the full softmax."""
    dtype: str
    """Precision the log-softmax was computed in."""
    tolerance: float
    """Largest |engine - replay| log-prob difference expected, same weights, at the engine's dtype."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What every component is given at set-up."""

    world: World
    """The ranks of the run, and this one's place."""
    device: DeviceOps
    """This rank's device, activated."""
    seed: int
    """The recipe's seed."""
    deterministic: bool
    """The recipe asks for bit-reproducible kernels."""
    run_dir: Path
    """The run folder; the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What a training backend is asked to do."""

    optimizer: OptimizerSpec
    """The recipe's optimizer section."""
    total_updates: int
    """Optimizer steps in the whole run, for learning-rate schedules."""
    reference: bool
    """A frozen reference is needed. With LoRA it is the adapter switched off; else a second copy."""


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """Bytes; None where the device cannot say."""

    allocated: int | None
    """In use now."""
    peak: int | None
    """Most in use since `reset_peak_memory`."""
    total: int | None
    """What the device has."""


# ----------------------------------------------------------------------------------------------------------- contracts


class DeviceOps(ABC):
    """Everything that differs between kinds of device. Constructed without arguments; where its component declares an
    options model, with the recipe's options, or without arguments for their defaults. `activate` binds this rank."""

    name: ClassVar[str]
    """The component's word; also the type of its torch device."""

    @abstractmethod
    def activate(self, local_rank: int) -> torch.device:
        """Make the rank's device current and return it. Raises DeviceError when there is no such device."""

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """The device `activate` returned."""

    @property
    @abstractmethod
    def process_group_backend(self) -> str:
        """For `torch.distributed.init_process_group`; must also serve CPU tensors, e.g. `"cpu:gloo,cuda:nccl"`."""

    @abstractmethod
    def device_count(self) -> int:
        """How many ranks this machine can hold."""

    @abstractmethod
    def supports(self, dtype: torch.dtype) -> bool:
        """Whether training in `dtype` works on this device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for queued work, so that wall-clock timings mean something."""

    @abstractmethod
    def memory(self) -> MemoryStats:
        """Memory of this rank's device (of this process, on a CPU)."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new peak measurement where the device can."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Return cached memory to the device."""

    @abstractmethod
    def rng_state(self) -> Tensor:
        """The device generator's state, a uint8 CPU tensor."""

    @abstractmethod
    def set_rng_state(self, state: Tensor) -> None:
        """Restore what `rng_state` returned."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the device generator and the CPU generator."""

    @abstractmethod
    def set_deterministic(self, enabled: bool) -> None:
        """Ask for bit-reproducible kernels; raises DeviceError where the device cannot."""

    @abstractmethod
    def elapsed(self) -> AbstractContextManager[Callable[[], float]]:
        """Time a block on the device: `with ops.elapsed() as seconds: ...; seconds()` after the block."""

    @abstractmethod
    def profiler_activities(self) -> Sequence[Any]:
        """Activities for `torch.profiler.profile`."""

    @contextmanager
    def profile(self, folder: Path, name: str) -> Iterator[None]:
        """Record what the block does, on the host and on the device, into files or folders in `folder` whose names
        begin with `name`. By default torch.profiler's trace, `NAME.json`; a block that raises leaves none."""
        import torch

        with torch.profiler.profile(activities=list(self.profiler_activities())) as profiler:
            yield
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"{name}.json"))

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Peak FLOP/s from the vendor's data sheet, or None: unknown is unknown."""
        return None

    def peak_bandwidth(self) -> float | None:
        """Peak memory bandwidth in bytes/s, or None."""
        return None

    def fused_ops(self) -> frozenset[str]:
        """Names of fused operators on offer; the core knows `adamw`."""
        return frozenset()


class Policy(ABC):
    """A model family: how prompts are encoded, how a trajectory is replayed, how weights are named and saved."""

    steady_shapes: ClassVar[bool] = False
    """Whether the network sees a handful of shapes in a whole run, so that a backend may compile it for each."""

    def __init__(self, options: Any, model: ModelSpec, sampling: Any) -> None:
        self.options = options
        self.model = model
        self.sampling = sampling

    @abstractmethod
    def prepare(self) -> None:
        """Load what is needed beside the weights (tokenizer, processor, config). Raises ModelError."""

    @abstractmethod
    def load(self, dtype: torch.dtype, *, adapters: bool = True) -> nn.Module:
        """Build the network with its weights (those of `model.init_from`, when it is set, in place of the folder's;
        with `model.lora` and `adapters` its adapters too), on the CPU.

        The module's `forward(function, *args)` must run `function(network, *args)`, so that sharding backends see
        every use as one forward of the root.
        """

    @abstractmethod
    def encode(self, prompt: Prompt) -> dict[str, Tensor]:
        """The prompt's part of the payload. Raises DataError naming `prompt.origin`."""

    def accepts(self, prompt: Prompt) -> bool:
        """False: leave this prompt out (too long, and the recipe says to skip such prompts). Raises DataError when
        the recipe says that it must not happen."""
        return True

    @abstractmethod
    def decode(self, rollouts: Rollouts, requests: Sequence[GenerationRequest]) -> list[Sample]:
        """One Sample a row."""

    @abstractmethod
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
        """Log-probs of the recorded actions under the module's weights, the sampling temperature applied, dropout
        off. Runs under the caller's grad mode. Shapes [b, t] with t the length of `actions`.

        With the same `plan`, every call on any rank runs the same forwards of the root and of the shard units, whatever
        the rows (even none that counts), and connects all of them to the result: sharded ranks move in lockstep."""

    def plan(self, batch: Rollouts) -> int:
        """How `replay` would best run over these rows, as a number. Backends agree on the largest over all ranks and
        pass it to every call of one pass. 0, the default: there is one way only."""
        return 0

    @abstractmethod
    def reference_record(self, module: nn.Module, batch: Rollouts, *, plan: int = 0) -> Record:
        """What later replays need from the frozen reference: `log_probs` for tokens, means for Gaussians."""

    def reference_network(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within the block, `module` computes as the reference (adapters off). Only called when `model.lora`."""
        return nullcontext()

    @property
    @abstractmethod
    def max_actions(self) -> int:
        """Most actions a sample can have: the length limit; the number of trained steps."""

    def action_slices(self, count: int) -> Sequence[slice]:
        """How `count` actions may be cut so that each slice is one forward. Tokens: one slice. Diffusion: one a
        step, so that memory does not grow with the number of steps."""
        return [slice(0, count)]

    @abstractmethod
    def shard_units(self, module: nn.Module) -> Sequence[nn.Module]:
        """Blocks to shard, checkpoint and offload one at a time, in forward order."""

    def network(self, module: nn.Module) -> nn.Module:
        """What functions given to the loaded `module` are called with. By default its only child."""
        (network,) = module.children()
        return network

    @abstractmethod
    def weight_name(self, parameter: str) -> str:
        """The Hugging Face name of a parameter of the loaded module."""

    @abstractmethod
    def save_weights(self, directory: Path, weights: Iterable[Bucket]) -> None:
        """Write an ordinary Hugging Face folder (safetensors, config, tokenizer) from a full stream of weights."""

    def lengths(self, rollouts: Rollouts) -> tuple[list[int], list[int]] | None:
        """(prompt lengths, response lengths) in tokens, one a row, for the metrics; None: the policy has no tokens, on
        any rank and for any rows."""
        return None

    def flops(self, rollouts: Rollouts) -> float | None:
        """Floating-point operations of one forward over these rows that the model really needs (a group's prompt
        once), or None: unknown."""
        return None


class TokenPolicy(Policy):
    """A policy whose actions are tokens; text rollout engines rely on what is here.

    Payload by row: `prompt_ids` [L] and `response_ids` [R], int64; rows of a group share one `prompt_ids` tensor.
    """

    tokenizer: Any
    """The transformers tokenizer, after `prepare`."""
    eos_ids: frozenset[int]
    """Token ids that end a response, after `prepare`."""
    pad_id: int
    """The token id that fills padding, after `prepare`."""


class DenoisingPolicy(Policy):
    """A policy whose actions are denoising steps; engines for images and video rely on what is here.

    What `encode` returns are a prompt's conditions. The payload of a row holds them, and whatever replay needs of the
    trajectory; until `decode` has run it also holds `final`, the denoised latents.
    """

    @abstractmethod
    def text_encoders(self, device: torch.device) -> AbstractContextManager[None]:
        """Within the block `encode` computes on `device`; afterwards the encoders are back on the host."""

    @abstractmethod
    def decoder(self, device: torch.device, *, tiling: bool) -> AbstractContextManager[None]:
        """Within the block `decode` computes on `device`, image by image in tiles when asked for; afterwards the
        decoder is back on the host."""

    @abstractmethod
    def trajectories(
        self,
        module: nn.Module,
        requests: Sequence[GenerationRequest],
        conditions: Sequence[Mapping[str, Tensor]],
        sampling: Any,
        device: torch.device,
    ) -> Rollouts:
        """Sample every request's group in one batch with the network `module`, which is on `device`.

        Returns Rollouts without samples and of policy version 0. A row depends on its own seeds and conditions only.
        """


class TrainingBackend(ABC):
    """Owns the network, the optimizer, its schedule and the fp32 master weights. Every method is collective over the
    world: every rank calls it, in the same order, even with an empty share."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def setup(self, context: RunContext, policy: Policy, training: TrainingSpec) -> None:
        """Build, shard and place everything. Raises BackendError or ModelError."""

    @property
    @abstractmethod
    def replica(self) -> Replica:
        """This rank's replica."""

    @abstractmethod
    def replay(self, rollouts: Rollouts) -> ActionStats:
        """Current log-probs and entropy without gradient, [B, T] on the CPU."""

    @abstractmethod
    def reference(self, rollouts: Rollouts) -> Record:
        """The frozen reference's record, by row, on the CPU."""

    @abstractmethod
    def update(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        """One optimizer step on the *sum* of the loss over micro-batches and replicas (never an average).

        Returns metrics as floats, the same on every rank: the loss's sums and maxima by name, `loss`, `grad_norm`
        (before clipping), `actor/lr` and `actor/skipped_updates` (1.0 when a non-finite gradient made all ranks skip
        the step together)."""

    @abstractmethod
    def gradients(self, minibatch: Minibatch, loss: Loss) -> Iterator[Bucket]:
        """The gradient `update` would step on, by Hugging Face name, full tensors; nothing is changed. For proofs."""

    @abstractmethod
    def export_weights(self, form: Literal["merged", "adapter"] = "merged") -> Iterator[Bucket]:
        """Stream the current weights in buckets; every rank must exhaust the iterator."""

    @property
    def shares_module(self) -> bool:
        """Whether `inference_module` is on offer, asked after `setup`. False, say, for a network divided over ranks:
        rollout engines then hold weights of their own."""
        return True

    @abstractmethod
    def inference_module(self) -> AbstractContextManager[nn.Module]:
        """Within the block, the live module runs forward without collectives, so that ranks may generate at
        different speeds. Raises BackendError when not `shares_module`."""

    @abstractmethod
    def save(self, directory: Path, *, optimizer: bool) -> None:
        """Write weights and, when asked, optimizer and schedule, resharding-safe, into an empty directory."""

    @abstractmethod
    def load(self, directory: Path, *, optimizer: bool) -> None:
        """Restore what `save` wrote. Raises BackendError when asked for an optimizer that was not saved."""

    @abstractmethod
    def offload(self) -> None:
        """Free device memory between phases; a no-op where host and device are one."""

    @abstractmethod
    def onload(self) -> None:
        """Undo `offload`."""


class RolloutEngine(ABC):
    """Samples groups of trajectories."""

    weights: Literal["own", "shared"] = "own"
    """`shared`: generates with the backend's live module (see TrainingBackend.inference_module). Known once `setup` has
    seen the backend."""
    deterministic: bool = False
    """Same weights, requests and batching give bit-equal rollouts."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def setup(self, context: RunContext, policy: Policy, backend: TrainingBackend | None) -> None:
        """Prepare. `backend` is None outside training (evaluation of a model folder): own weights are needed."""

    @property
    @abstractmethod
    def replica(self) -> Replica:
        """This rank's engine replica."""

    @property
    @abstractmethod
    def semantics(self) -> LogProbSemantics:
        """What the behaviour log-probs mean."""

    @abstractmethod
    def generate(self, requests: Sequence[GenerationRequest], sampling: Any) -> Rollouts:
        """Sample every request's group, in the order of the requests, which may be none. Collective over the engine
        replica."""

    @abstractmethod
    def update_weights(self, weights: Iterator[Bucket] | None, version: int) -> None:
        """Take the new weights. `weights` is None for shared weights; else it must be exhausted."""

    def sleep(self) -> None:
        """Free device memory until `wake`."""

    def wake(self) -> None:
        """Undo `sleep`."""

    def close(self) -> None:
        """Free everything."""


class Reward(ABC):
    """Scores samples. Lives in one process, scored once per replica."""

    batch_size: int = 64
    """Samples a call of `score`, unless the recipe says otherwise."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def setup(self, device: str) -> None:
        """Load what scoring needs, once, on `device` (a torch device string)."""

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Sequence[RewardResult]:
        """One result a sample, in order. Raising fails the whole batch."""

    def onload(self) -> None:
        """Bring weights to the device before scoring."""

    def offload(self) -> None:
        """Release device memory after scoring."""


class AdvantageEstimator(ABC):
    """From the rewards of a step to one advantage a sample, in place of the built-in formulas. Constructed on every
    rank, which all hold the same table; there is nothing to communicate."""

    def __init__(self, options: Any, spec: AdvantageSpec) -> None:
        self.options = options
        self.spec = spec

    @abstractmethod
    def advantages(self, rewards: Tensor, group_id: Tensor, lengths: Tensor) -> Tensor:
        """Advantages [N] of samples with `rewards` [N] float64 in groups `group_id` [N] int64 that take `lengths` [N]
        int64 actions each.

        Every group has two samples or more; none has failed. Called for each reward by itself when the recipe combines
        advantages. `advantage.clamp` is applied to what it returns. Raises RewardError when there is no advantage.
        """


class PolicyGradient(ABC):
    """The policy-gradient term of the loss, in place of the built-in ones. What surrounds it (aggregation, importance
    correction, divergence, entropy, metrics) stays the core's."""

    scope: Literal["action", "sequence"] = "action"
    """See `Loss.scope`."""

    def __init__(self, options: Any, spec: LossSpec) -> None:
        self.options = options
        self.spec = spec

    @abstractmethod
    def term(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, fractions) of some rows and actions, all [b, t] fp32; 0 where not `mask`.

        `loss`, a scalar, is the *sum* of `weight` times each action's term; with gradient through `log_probs` only.
        An action's term depends on its own row at most, so that the result does not depend on how work is cut.
        `fractions`: of the actions in `mask`, scalars without gradient, named `actor/pg_clipfrac` or
        `actor/pg_clipfrac_lower`; they may be left out."""


class PromptSource(ABC):
    """An ordered, seekable stream of prompts, the same on every rank."""

    def __init__(self, options: Any, seed: int) -> None:
        self.options = options
        self.seed = seed

    @abstractmethod
    def prepare(self) -> None:
        """Open and check the data. Raises DataError naming the file and the row."""

    @abstractmethod
    def __len__(self) -> int:
        """Prompts in one epoch."""

    @abstractmethod
    def prompt(self, index: int) -> Prompt:
        """The `index`-th prompt of the run, index >= 0 and unbounded: epochs follow each other, each in its own
        order. A pure function of (data, options, seed, index), which makes resuming exact."""

    @abstractmethod
    def digest(self) -> str:
        """Changes when the data or its order changes; compared between ranks and across resumes."""


class Launcher(ABC):
    """Runs the same program on every rank."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def launch(self, recipe: Recipe, worker: str = TRAINING) -> int:
        """Write the recipe into its run folder and run `main(path of that file)` of the module `worker` on every rank.

        `main` returns an exit status. Returns 0 when all ranks ended well, else another status."""


# --------------------------------------------------------------------------------------------------- weights in folders


class WeightSource(ABC):
    """A model's weights in a folder, read one tensor at a time under their Hugging Face names.

    All names may stand behind one prefix, and other tensors (of an optimizer) beside them: readers that know the names
    they want find them with `mmrl_core.checkpoint.matching`.
    """

    where: str = "weights"
    """What named the folder, for errors: `model.init_from '/ckpt'`."""
    model_folder: Path | None = None
    """The folder with the model's config and tokenizer, when the weights came with one."""
    complete: bool = False
    """Opening it has shown that it holds the weights of the model in `model_folder`, all of them and nothing else."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Every tensor's name, in the order in which reading is cheap."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU. It may be mapped from the file: do not write to it.

        Raises ModelError when the file cannot be read.
        """


class WeightFormat(ABC):
    """A way in which a folder holds a model's weights. Constructed with its options, which are about writing."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    @abstractmethod
    def detect(cls, folder: Path) -> bool:
        """Whether `folder` looks like this format, damaged or not. Cheap; reads no weights; never raises."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, *, where: str, model: Path | None) -> WeightSource:
        """Open the folder's weights and check that every file is there and whole, without reading tensors.

        Args:
            where: what named the folder, for errors.
            model: a folder with the model's config.json, for formats that need it and find none in `folder`.

        Raises:
            ModelError: the folder is damaged, incomplete, or of another model than `model`.
        """

    @abstractmethod
    def write(
        self, source: WeightSource, folder: Path, *, model: Path | None, progress: Callable[[int, int], None]
    ) -> None:
        """Write all of `source` into `folder`, which exists and is empty, holding few tensors at a time.

        Args:
            model: the folder with the model's config and tokenizer, which are stored beside the weights.
            progress: called with (bytes done, bytes in all).

        Raises:
            ModelError: before anything is written, when the format or its options cannot express these weights.
        """
