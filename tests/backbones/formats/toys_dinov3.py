"""Toy files in the layouts of facebookresearch/dinov3: hub backbones and a teacher's checkpoint."""

from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.reference import Files, Shapes, fill, pair, prefixed
from tests.backbones.formats.toys_dinov2 import projection


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
    """Return the shapes of a backbone with patches of 16, without periods.

    gated: a SwiGLU of `hidden` channels for an MLP.
    """
    result: Shapes = {"cls_token": (1, 1, width), "mask_token": (1, width)}
    if registers:
        result["storage_tokens"] = (1, registers, width)
    result |= pair("patch_embed.proj", width, 3, 16, 16)
    biases = {"attn.qkv.bias": (3 * width,)} if qkv_bias else {}
    if qkv_bias and mask_k_bias:
        biases["attn.qkv.bias_mask"] = (3 * width,)
    for i in range(depth):
        result |= prefixed(f"blocks.{i}.", block(width, hidden, gated) | biases)
    result |= pair("norm", width)
    return result | pair("local_cls_norm", width) if local_norm else result


def block(width: int, hidden: int, gated: bool) -> Shapes:
    into, out = (("w1", "w2"), "w3") if gated else (("fc1",), "fc2")
    mlp: Shapes = {f"mlp.{name}.weight": (hidden, width) for name in into}
    mlp |= {f"mlp.{name}.bias": (hidden,) for name in into}
    return {
        **pair("norm1", width),
        "attn.qkv.weight": (3 * width, width),
        **pair("attn.proj", width, width),
        "ls1.gamma": (width,),
        **pair("norm2", width),
        **mlp,
        **pair(f"mlp.{out}", width, hidden),
        "ls2.gamma": (width,),
    }


def periods(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return periods of base 100, one per four channels of a head, computed in `dtype`, as float32."""
    number = head_dim // 4
    return (100.0 ** (torch.arange(number, dtype=dtype) / number)).to(dtype).float()


def filled(
    head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any
) -> dict[str, torch.Tensor]:
    """Return random weights; masks are 1 for query and value and 0 for the key, whose bias is not zero."""
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


def write(folder: Path) -> Files:
    small: dict[str, Any] = {"overrides": {"img_size": [64, 64]}}
    contents: dict[str, Any] = dict(toys())
    heads = fill(projection("dino_head") | projection("ibot_head"))
    contents["teacher"] = {"teacher": prefixed("backbone.", contents["own"]) | heads}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    return {name: (folder / f"{name}.pth", {} if name == "satellite" else small) for name in contents}
