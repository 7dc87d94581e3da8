"""Parameter groups with weight decay and learning-rate scales, AdamW, and optimizer states by name."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mae_bench.config import TrainConfig

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def build_param_groups(
    parameters: NamedParameters,
    weight_decay: float,
    no_decay: Callable[[str, nn.Parameter], bool],
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Build one group per (lr_scale, weight decay) pair, without frozen parameters.

    The trainer multiplies the lr of every step by the group's `lr_scale`.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        key = (lr_scale(name), 0.0 if no_decay(name, parameter) else weight_decay)
        group = groups.setdefault(key, {"params": [], "lr_scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
    return list(groups.values())


def pretrain_no_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return True for 1-D parameters and biases.

    cls_token and mask_token ARE decayed, as in the reference (timm 0.3 `add_weight_decay`).
    """
    return parameter.ndim <= 1 or name.endswith(".bias")


def finetune_no_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return True for 1-D parameters, the position table and the class token (util/lr_decay.py)."""
    return parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in ("pos_embed", "cls_token", "reg_token")


def build_adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Build a fused AdamW: one kernel per step, on the CPU too."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def adamw_builder(
    config: TrainConfig,
    no_decay: Callable[[str, nn.Parameter], bool],
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> Callable[[nn.Module], torch.optim.AdamW]:
    """Return a function that builds the optimizer of a model, to be called once its weights are placed."""
    return lambda model: build_adamw(
        build_param_groups(model.named_parameters(), config.weight_decay, no_decay, lr_scale),
        config.base_lr,
        config.betas,
    )


def collect_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state by name, `PARAMETER.KEY`.

    Names, unlike indices, do not depend on how the run is split over processes.
    """
    state = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    tensors = {}
    for name, entries in state.items():
        for key, tensor in entries.items():
            tensors[f"{name}.{key}"] = tensor
    return tensors


def allocate_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> None:
    """Allocate zeros for the state named by `collect_optimizer_tensors`, sharded like its parameters."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for place, (shape, dtype) in shapes.items():
        name, _, key = place.rpartition(".")
        parameter = parameters[name]
        like = parameter.detach() if shape == parameter.shape else torch.empty(shape, device=parameter.device)
        optimizer.state[parameter][key] = torch.zeros_like(like, dtype=dtype)
