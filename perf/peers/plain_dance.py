"""DanceGRPO (arXiv:2505.07818) in the plainest PyTorch loop, to measure against. Frozen: do not make it faster.

Nothing of mmrl is used but the network class, so that both sides run the same network with the same weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig

PROMPTS, GROUP, STEPS, UPDATES = 10, 16, 16, 2
ETA, SHIFT, FRACTION, CLIP, MAX_ADVANTAGE = 0.3, 3.0, 0.6, 1e-4, 5.0
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-4, 1e-4, 1.0


@dataclass(kw_only=True)
class PlainStep:
    """What a step came to, each the mean over it."""

    reward: float
    grad_norm: float


class PlainDance:
    """The network, its optimizer, and one step of training at a time."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        self.network = ClassConditionalDiT(DitConfig(**{k: v for k, v in config.items() if not k.startswith("_")}))
        self.network.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        sigma = torch.linspace(1, 0, STEPS + 1)
        self.sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        self.shape = (config["channels"], config["sample_size"], config["sample_size"])

    def kernel(self, velocity: Tensor, x: Tensor, sigma: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the next state, and x0. `sigma` and `following`: broadcast with x."""
        change = following - sigma
        clean = x - sigma * velocity
        score = -(x - (1 - sigma) * clean) / sigma**2
        mean = x + change * velocity - 0.5 * ETA**2 * score * change
        return mean, ETA * (sigma - following).sqrt(), clean

    @staticmethod
    def log_prob(following: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """[b], the mean over elements."""
        log_probs = -((following - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return log_probs.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def rollout(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States [b, STEPS, ...] before every step, log-probs [b, STEPS - 1] and the last step's x0."""
        x, states, log_probs = noise, [], []
        for step in range(STEPS):
            velocity = self.network(x, self.sigma[step].expand(len(x)), labels)
            mean, std, clean = self.kernel(velocity, x, self.sigma[step], self.sigma[step + 1])
            states.append(x)
            if step == STEPS - 1:
                break
            x = mean + std * torch.randn_like(mean)
            log_probs.append(self.log_prob(x, mean, std))
        return torch.stack(states, 1), torch.stack(log_probs, 1), clean

    def step(self) -> PlainStep:
        """One rollout, its rewards and advantages, and two updates."""
        labels = torch.arange(PROMPTS).remainder(10).repeat_interleave(GROUP)
        noise = torch.randn(PROMPTS, *self.shape).repeat_interleave(GROUP, 0)
        states, old, clean = self.rollout(labels, noise)

        pixels = ((clean * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        rewards = (pixels.double() / 255).mean(dim=(1, 2, 3))
        groups = rewards.view(PROMPTS, GROUP)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-8)
        advantages = advantages.flatten().clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE).float()

        count = int((STEPS - 1) * FRACTION)
        order = torch.stack([torch.randperm(STEPS - 1)[:count] for _ in labels])
        norms = [
            self.update(labels[rows], states[rows], old[rows], advantages[rows], order[rows])
            for rows in torch.arange(len(labels)).chunk(UPDATES)
        ]
        return PlainStep(reward=float(rewards.mean()), grad_norm=sum(norms) / len(norms))

    def update(self, labels: Tensor, states: Tensor, old: Tensor, advantages: Tensor, order: Tensor) -> float:
        """One optimizer step on some rows, whose steps `order` [b, t] are differentiated one after another. Returns
        the gradient norm before clipping."""
        self.optimizer.zero_grad()
        row = torch.arange(len(labels))
        for step in order.unbind(1):
            x, following = states[row, step], states[row, step + 1]
            velocity = self.network(x, self.sigma[step], labels)
            sigma, after = self.sigma[step].view(-1, 1, 1, 1), self.sigma[step + 1].view(-1, 1, 1, 1)
            mean, std, _ = self.kernel(velocity, x, sigma, after)
            ratio = (self.log_prob(following, mean, std) - old[row, step]).exp()
            surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
            (surrogate.mean() / order.shape[1]).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), MAX_NORM))
        self.optimizer.step()
        return norm
