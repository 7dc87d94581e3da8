"""LARS as the reference trains its linear probes (arXiv 1708.03888; facebookresearch/mae util/lars.py)."""

from collections.abc import Callable
from typing import Any

import torch

TRUST = 0.001
MOST = 1e6  # norm of a matrix beyond which its head has diverged; it then stands still, and its weights stay finite


class Lars(torch.optim.Optimizer):
    """Momentum SGD whose step for a matrix p is scaled by TRUST |p| / |gradient + weight_decay p|.

    Vectors (biases) have neither trust scaling nor weight decay. Each group's `lr` may be its own.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, update: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        if parameter.ndim <= 1:
            momentum.mul_(group["momentum"]).add_(update)
        else:
            if group["weight_decay"]:
                update = update.add(parameter, alpha=group["weight_decay"])
            size, of_update = parameter.norm(), update.norm()
            trust = torch.where((size > 0) & (of_update > 0), TRUST * size / of_update, 1.0)
            alive = (size < MOST) & of_update.isfinite()
            momentum.mul_(group["momentum"]).addcmul_(update, trust)
            momentum.copy_(torch.where(alive, momentum, 0.0))
        parameter.add_(momentum, alpha=-group["lr"])
