"""Toy files in the layouts of facebookresearch/dinov3: hub backbones and a teacher's checkpoint."""

from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.reference import fill
from tests.backbones.formats.toys_dinov2 import Shapes, prefixed, projection


def shapes(
    width: int = 192,
    depth: int = 2,
    hidden: int = 768,
    registers: int = 4,
    *,
    gated: bool = False,
    qkv_bias: bool = True,
    mask_k_bias: bool = True,
    local_norm: bool = False,
) -> Shapes:
    """Of a backbone with patches of 16. gated: a SwiGLU of `hidden` channels stands in the MLP's place. Without periods."""
    result: Shapes = {"cls_token": (1, 1, width), "mask_token": (1, width)}
    if registers:
        result["storage_tokens"] = (1, registers, width)
    result |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    biases = {"attn.qkv.bias": (3 * width,)} if qkv_bias else {}
    biases |= {"attn.qkv.bias_mask": (3 * width,)} if qkv_bias and mask_k_bias else {}
    for i in range(depth):
        result |= {
            f"blocks.{i}.{name}": shape for name, shape in (block(width, hidden, gated) | biases).items()
        }
    result |= {"norm.weight": (width,), "norm.bias": (width,)}
    return result | (
        {"local_cls_norm.weight": (width,), "local_cls_norm.bias": (width,)} if local_norm else {}
    )


def block(width: int, hidden: int, gated: bool) -> Shapes:
    into, out = (("w1", "w2"), "w3") if gated else (("fc1",), "fc2")
    mlp = {f"mlp.{name}.weight": (hidden, width) for name in into} | {
        f"mlp.{name}.bias": (hidden,) for name in into
    }
    return {
        "norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "ls1.gamma": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,), **mlp,
        f"mlp.{out}.weight": (width, hidden), f"mlp.{out}.bias": (width,), "ls2.gamma": (width,),
    }  # fmt: skip


def periods(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Base 100, one for each four channels of a head, in the precision of the training's default, stored as float32."""
    number = head_dim // 4
    return (100.0 ** (torch.arange(number, dtype=dtype) / number)).to(dtype).float()


def filled(
    head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any
) -> dict[str, torch.Tensor]:
    """Random weights; masks as the code sets them (1 for query and value, 0 for key), over a bias that the key has too."""
    weights = fill(shapes(**options), seed)
    for name in [name for name in weights if name.endswith("bias_mask")]:
        weights[name] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(len(weights[name]) // 3)
    return weights | {"rope_embed.periods": periods(head_dim, dtype)}


def toys() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "small": filled(),
        "plus": filled(gated=True, hidden=488),
        "satellite": filled(local_norm=True, dtype=torch.float32),
        "7b": filled(128, width=256, hidden=512, gated=True, qkv_bias=False, local_norm=True),
        "own": filled(mask_k_bias=False, registers=0),
    }


def write(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    small: dict[str, Any] = {"overrides": {"img_size": [64, 64]}}
    contents: dict[str, Any] = dict(toys())
    contents["teacher"] = {
        "teacher": prefixed("backbone.", contents["own"])
        | fill(projection("dino_head") | projection("ibot_head"))
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    return {name: (folder / f"{name}.pth", {} if name == "satellite" else small) for name in contents}
