"""Toy files of facebookresearch/dinov2: hub backbones, a teacher's checkpoint, a training state."""

import re
from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.reference import Files, Shapes, fill, pair, prefixed


def shapes(
    width: int = 192,
    depth: int = 2,
    hidden: int = 768,
    patch: int = 14,
    side: int = 4,
    registers: int = 0,
    gated: bool = False,
) -> Shapes:
    """Return the shapes of a backbone with side x side patches. gated: a SwiGLU of `hidden` channels."""
    result: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, side * side + 1, width),
        "mask_token": (1, width),
    }
    if registers:
        result["register_tokens"] = (1, registers, width)
    result |= pair("patch_embed.proj", width, 3, patch, patch)
    for i in range(depth):
        result |= prefixed(f"blocks.{i}.", block(width, hidden, gated))
    return result | pair("norm", width)


def block(width: int, hidden: int, gated: bool) -> Shapes:
    up, down, rows = ("w12", "w3", 2 * hidden) if gated else ("fc1", "fc2", hidden)
    return {
        **pair("norm1", width),
        **pair("attn.qkv", 3 * width, width),
        **pair("attn.proj", width, width),
        "ls1.gamma": (width,),
        **pair("norm2", width),
        **pair(f"mlp.{up}", rows, width),
        **pair(f"mlp.{down}", width, hidden),
        "ls2.gamma": (width,),
    }


def projection(name: str, width: int = 192) -> Shapes:
    """Return the shapes of a DINO head with its weight-normalised last layer."""
    return {
        **pair(f"{name}.mlp.0", 16, width),
        **pair(f"{name}.mlp.2", 8, 16),
        f"{name}.last_layer.weight_g": (32, 1),
        f"{name}.last_layer.weight_v": (32, 8),
    }


def chunked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename to one block per chunk, as block_chunks saves them: chunk i holds block i at index i."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): tensor for name, tensor in weights.items()}


def number(name: str) -> str:
    return name.split(".")[1] if name.startswith("blocks.") else "-"


def backbones() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "base": fill(shapes()),
        "registers": fill(shapes(registers=4)),
        "giant": fill(shapes(hidden=512, gated=True)),
        "giant-registers": fill(shapes(hidden=512, gated=True, registers=4)),
    }


def write(folder: Path) -> Files:
    """The teachers of "teacher" and "training" are the backbone of "base"."""
    bare, heads = backbones(), fill(projection("dino_head") | projection("ibot_head"))
    plain = bare["base"]
    teacher = prefixed("backbone.", chunked(plain)) | heads
    student = prefixed("backbone.", fill(shapes(), seed=1)) | heads
    state = prefixed("student.", student) | prefixed("teacher.", teacher)
    contents: dict[str, tuple[Any, dict[str, Any]]] = {
        **{name: (weights, {}) for name, weights in bare.items()},
        "teacher": ({"teacher": teacher}, {}),
        "training": ({"model": state, "optimizer": {"state": {}}, "iteration": 9}, {"weights": "teacher"}),
    }
    for name, (content, _) in contents.items():
        torch.save(content, folder / f"{name}.pth")
    return {name: (folder / f"{name}.pth", options) for name, (_, options) in contents.items()}
