"""Shared by the tests of formats: random weights that reveal mistakes, and published sizes at no memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from backbones.load import check_fit, translate
from backbones.reading.source import Checkpoint
from backbones.reading.unwrap import unwrap
from backbones.translating.structure import infer_global_pool
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec

FEW = 64  # values of a tensor that a real-size check keeps
Shapes = dict[str, tuple[int, ...]]
Files = dict[
    str, tuple[Path, dict[str, Any]]
]  # name -> file or folder, keywords of load_backbone that it needs
Value = TypeVar("Value")  # a tensor or its shape


def pair(name: str, *weight: int) -> Shapes:
    """Return the shapes of a layer's weight and bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def prefixed(prefix: str, tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Return the tensors with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save_pretrained(folder: Path, models: Mapping[str, Any]) -> Files:
    """Save each transformers model in a folder of its own."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: (folder / name, {}) for name in models}


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters, norms and layer scales around 1, so that missing or swapped weights show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.1
        centre = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
        parameter.copy_(drawn + centre)
    return module.eval()


def fill(shapes: Mapping[str, Iterable[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of the shapes; vectors that are no bias (norms, layer scales) are around 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(tuple(shape), generator=generator) * 0.1 for name, shape in shapes.items()}
    return {
        name: tensor + 1 if tensor.ndim == 1 and not name.endswith("bias") else tensor
        for name, tensor in drawn.items()
    }


def apply_linear(weights: Mapping[str, torch.Tensor], x: torch.Tensor, name: str) -> torch.Tensor:
    """Apply the linear layer of that name, with or without bias."""
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))


def apply_norm(
    weights: Mapping[str, torch.Tensor], x: torch.Tensor, name: str, eps: float = 1e-6
) -> torch.Tensor:
    """Apply the LayerNorm of that name."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def check_real_size(
    format: str,
    content: Any,
    beside: dict[str, dict[str, Any]] | None = None,
    *,
    said: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> BackboneSpec:
    """Read a checkpoint's content like `load_backbone`, fit it to a meta-device model, return the spec.

    content: nested dicts with shapes or hollow tensors as leaves. said: whether the user names the format,
    for layouts that several families share. overrides: fields that the user states.
    """
    part = unwrap(hollow(content), "real size")
    checkpoint = Checkpoint(
        "real size",
        "0" * 64,
        part.tensors,
        0,
        part.wrapper,
        part.prefix,
        part.outside,
        part.extras,
        beside or {},
    )
    with mock.patch("backbones.load.check_values"):  # checking a billion zeros takes the longest
        name, translation, spec = translate(checkpoint, format if said else None, overrides)
    assert name == format
    with torch.device("meta"):
        model = build_vit(spec, global_pool=infer_global_pool(translation.weights))
        check_fit(model, translation.weights, "real size", name)
    return spec


def hollow(content: Any) -> Any:
    """Replace each shape and each large tensor by a tensor of that shape over one stored zero.

    Dictionaries and tensors of few values, which may matter, stay as they are.
    """
    if isinstance(content, Mapping):
        return {key: hollow(value) for key, value in content.items()}
    if isinstance(content, torch.Tensor):
        if not content.is_meta and content.numel() <= FEW:
            return content
        return torch.zeros((), dtype=content.dtype).expand(content.shape)
    if isinstance(content, tuple) and all(isinstance(side, int) for side in content):
        return torch.zeros(()).expand(content)
    return content
