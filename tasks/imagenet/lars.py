"""LARS as facebookresearch/mae trains linear probes (util/lars.py; arXiv 1708.03888)."""

from collections.abc import Callable
from typing import Any

import torch

TRUST = 0.001
MAX_NORM = 1e6  # a matrix with a larger norm has diverged; it is no longer updated, so that it stays finite


class Lars(torch.optim.Optimizer):
    """Momentum SGD whose update of a matrix p is scaled by TRUST |p| / |gradient + weight_decay p|.

    Vectors (biases) get neither the scaling nor weight decay. Each group may have its own `lr`.
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
            norm, update_norm = parameter.norm(), update.norm()
            trust = torch.where((norm > 0) & (update_norm > 0), TRUST * norm / update_norm, 1.0)
            momentum.mul_(group["momentum"]).addcmul_(update, trust)
            # do not update a diverged matrix
            finite = (norm < MAX_NORM) & update_norm.isfinite()
            momentum.copy_(torch.where(finite, momentum, 0.0))
        parameter.add_(momentum, alpha=-group["lr"])
