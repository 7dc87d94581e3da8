"""What the tests of formats share: random weights that show every mistake, and published sizes without their gigabytes."""

from collections.abc import Iterable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn

from backbones.load import check_fit, translate
from backbones.reading.source import Checkpoint
from backbones.reading.unwrap import unwrap
from backbones.translating.structure import infer_global_pool
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec

FEW = 64  # values of a tensor that a real-size check keeps


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, norms' and layer scales' around 1: what is forgotten, swapped or misplaced shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.1
        centre = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
        parameter.copy_(drawn + centre)
    return module.eval()


def fill(shapes: Mapping[str, Iterable[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of those shapes; vectors that are no bias (norms, layer scales) around 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(tuple(shape), generator=generator) * 0.1 for name, shape in shapes.items()}
    return {
        name: tensor + 1 if tensor.ndim == 1 and not name.endswith("bias") else tensor
        for name, tensor in drawn.items()
    }


def check_real_size(
    format: str, content: Any, beside: dict[str, dict[str, Any]] | None = None, *, said: bool = False
) -> BackboneSpec:
    """Reads a checkpoint's content (shapes or hollow tensors for leaves) as `load_backbone` does, and checks that every tensor
    finds its place in a model on the meta device; returns the spec. said: by the user, for layouts that several families share.
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
    with mock.patch(
        "backbones.load.check_values"
    ):  # a thousand million zeros are finite: looking at each takes longest
        name, translation, spec = translate(checkpoint, format if said else None)
    assert name == format
    with torch.device("meta"):
        check_fit(
            build_vit(spec, global_pool=infer_global_pool(translation.weights)),
            translation.weights,
            "real size",
            name,
        )
    return spec


def hollow(content: Any) -> Any:
    """Dictionaries as they are, and tensors of few values, which may matter; a shape or a larger tensor becomes a tensor of that
    shape over one stored zero."""
    if isinstance(content, Mapping):
        return {key: hollow(value) for key, value in content.items()}
    if isinstance(content, torch.Tensor):
        if not content.is_meta and content.numel() <= FEW:
            return content
        return torch.zeros((), dtype=content.dtype).expand(content.shape)
    if isinstance(content, tuple) and all(isinstance(side, int) for side in content):
        return torch.zeros(()).expand(content)
    return content
