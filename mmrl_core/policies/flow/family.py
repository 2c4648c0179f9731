"""What a model family supplies to the policy `flow`: its network, text encoders, decoder and shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmrl_core.contracts import Bucket

if TYPE_CHECKING:
    from mmrl_core.policies.flow.options import FlowOptions, FlowSampling

Conditions = dict[str, Tensor]
"""What the network is given beside latents and time: of one prompt without a batch dimension, or of b rows with one."""


class Family(ABC):
    """One model family in its diffusers folder.

    Velocities follow x_sigma = (1 - sigma) x_0 + sigma noise, v = noise - x_0: the network's output for FLUX, SD3 and
    Wan. Latents are in the network's own layout (packed tokens for FLUX), so that nothing is rearranged in a step.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """`_class_name` in model_index.json of folders that this family reads."""
    network_folder: ClassVar[str] = "transformer"
    """Where in the folder the trained network is."""

    def __init__(self, folder: Path, options: FlowOptions, dtype: torch.dtype) -> None:
        """`dtype`: the network's precision of forward and backward."""
        self.folder, self.options, self.dtype = folder, options, dtype

    @abstractmethod
    def prepare(self) -> None:
        """Read configurations (no weights). Raises ModelError naming the file."""

    @abstractmethod
    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The denoising network with its weights, on the CPU. Raises ModelError."""

    @abstractmethod
    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """Transformer blocks in forward order."""

    @abstractmethod
    def save_config(self, directory: Path) -> None:
        """Write the network's config.json into `directory`."""

    def fixed_weights(self) -> Bucket:
        """What the network's files hold beside parameters: a trained network is saved with it. Raises ModelError."""
        return ()

    @abstractmethod
    def latent_shape(self, sampling: FlowSampling) -> tuple[int, ...]:
        """Of one sample. Raises RecipeError when height, width or frames do not fit the model."""

    @abstractmethod
    def schedule(self, sampling: FlowSampling) -> Tensor:
        """[steps + 1] fp32: the sigmas of the folder's own scheduler, from its first down to 0. Raises ModelError."""

    @abstractmethod
    def velocity(
        self, network: Any, latents: Tensor, time: Tensor, conditions: Conditions, sampling: FlowSampling
    ) -> Tensor:
        """The network's velocity, without classifier-free guidance.

        Args:
            network: what `load_network` returned, perhaps sharded; computes in `self.dtype`.
            latents: [b, *latent_shape] fp32.
            time: [b] fp32 in [0, 1]: sigma, quantised when the recipe says so.
            conditions: of the rows, [b, ...] each.

        Returns [b, *latent_shape] fp32. Raises DataError when the conditions are not this model's.
        """

    @abstractmethod
    def load_encoders(self) -> nn.Module:
        """Text encoders and what they need, on the CPU; called once, when the first prompt is encoded. An empty module
        when the family has none."""

    @abstractmethod
    def encode(self, encoders: nn.Module, texts: Sequence[str]) -> list[Conditions]:
        """Conditions of each text, on the CPU, computed where `encoders` are. Raises DataError without origin."""

    @abstractmethod
    def load_decoder(self) -> nn.Module:
        """The VAE, on the CPU, in `options.vae_dtype`; an empty module when latents are pixels."""

    @abstractmethod
    def decode(self, decoder: nn.Module, latents: Tensor, sampling: FlowSampling) -> Any:
        """Pixels of latents [b, *latent_shape], computed where `decoder` is: a uint8 array [b, H, W, 3], or for video
        [b, frames, H, W, 3]. Raises RolloutError when they are not finite."""
