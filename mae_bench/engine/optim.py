"""Parameter groups: weight decay and layer-wise learning-rate scales."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def param_groups(
    parameters: NamedParameters,
    weight_decay: float,
    no_decay: Callable[[str, nn.Parameter], bool],
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """One group a (lr_scale, decayed or not); the trainer multiplies every step's lr by the group's `lr_scale`."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        key = (lr_scale(name), 0.0 if no_decay(name, parameter) else weight_decay)
        group = groups.setdefault(key, {"params": [], "lr_scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
    return list(groups.values())


def pretrain_no_decay(name: str, parameter: nn.Parameter) -> bool:
    """1-D parameters and biases; cls_token and mask_token ARE decayed, as in the reference (timm 0.3 `add_weight_decay`)."""
    return parameter.ndim <= 1 or name.endswith(".bias")


def finetune_no_decay(name: str, parameter: nn.Parameter) -> bool:
    """1-D parameters, the position table and the class token (util/lr_decay.py)."""
    return parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in ("pos_embed", "cls_token", "reg_token")


def adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW: one kernel a step, on the CPU too."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
