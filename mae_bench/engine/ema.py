"""Exponential moving average (EMA) of a model's weights and buffers."""

import torch
from torch import nn


class Ema:
    """average <- decay x average + (1 - decay) x weights after each step, from the first step's weights on.

    `weights` is a state_dict, sharded like the model's. Integer buffers (counters) are copied, not averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after `step`, counted from 0."""
        current = model.state_dict()
        names = [name for name, tensor in self.weights.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[name] for name in names],
            [current[name] for name in names],
            1 - self.decay if step else 1.0,
        )
        for name in self.weights.keys() - names:
            self.weights[name].copy_(current[name])
