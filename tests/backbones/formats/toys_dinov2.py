"""Toy files in the layouts of facebookresearch/dinov2: hub backbones, a teacher's checkpoint, a training's state."""

from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.reference import fill

Shapes = dict[str, tuple[int, ...]]


def shapes(
    width: int = 192,
    depth: int = 2,
    hidden: int = 768,
    patch: int = 14,
    side: int = 4,
    registers: int = 0,
    gated: bool = False,
) -> Shapes:
    """Of a backbone for side x side patches. gated: a SwiGLU of `hidden` channels stands in the MLP's place."""
    result: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, side * side + 1, width),
        "mask_token": (1, width),
    }
    if registers:
        result["register_tokens"] = (1, registers, width)
    result |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        result |= {f"blocks.{i}.{name}": shape for name, shape in block(width, hidden, gated).items()}
    return result | {"norm.weight": (width,), "norm.bias": (width,)}


def block(width: int, hidden: int, gated: bool) -> Shapes:
    up, down, rows = ("w12", "w3", 2 * hidden) if gated else ("fc1", "fc2", hidden)
    return {
        "norm1.weight": (width,), "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "ls1.gamma": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,),
        f"mlp.{up}.weight": (rows, width), f"mlp.{up}.bias": (rows,),
        f"mlp.{down}.weight": (width, hidden), f"mlp.{down}.bias": (width,),
        "ls2.gamma": (width,),
    }  # fmt: skip


def projection(name: str, width: int = 192) -> Shapes:
    """A DINO head with its weight-normalised last layer."""
    return {
        f"{name}.mlp.0.weight": (16, width), f"{name}.mlp.0.bias": (16,),
        f"{name}.mlp.2.weight": (8, 16), f"{name}.mlp.2.bias": (8,),
        f"{name}.last_layer.weight_g": (32, 1), f"{name}.last_layer.weight_v": (32, 8),
    }  # fmt: skip


def chunked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One block a chunk, as block_chunks saves them: the place of the blocks of earlier chunks stays empty."""
    return {
        name.replace(f"blocks.{i}.", f"blocks.{i}.{i}."): tensor
        for name, tensor in weights.items()
        for i in [number(name)]
    }


def number(name: str) -> str:
    return name.split(".")[1] if name.startswith("blocks.") else "-"


def prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def backbones() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "base": fill(shapes()),
        "registers": fill(shapes(registers=4)),
        "giant": fill(shapes(hidden=512, gated=True)),
        "giant-registers": fill(shapes(hidden=512, gated=True, registers=4)),
    }


def write(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The teachers of "teacher" and "training" are the backbone of "base"."""
    bare, heads = backbones(), fill(projection("dino_head") | projection("ibot_head"))
    plain = bare["base"]
    teacher = prefixed("backbone.", chunked(plain)) | heads
    state = prefixed("student.", prefixed("backbone.", fill(shapes(), seed=1)) | heads) | prefixed(
        "teacher.", teacher
    )
    contents: dict[str, tuple[Any, dict[str, Any]]] = {
        **{name: (weights, {}) for name, weights in bare.items()},
        "teacher": ({"teacher": teacher}, {}),
        "training": ({"model": state, "optimizer": {"state": {}}, "iteration": 9}, {"weights": "teacher"}),
    }
    for name, (content, _) in contents.items():
        torch.save(content, folder / f"{name}.pth")
    return {name: (folder / f"{name}.pth", options) for name, (_, options) in contents.items()}
