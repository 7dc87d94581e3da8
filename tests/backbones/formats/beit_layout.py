"""Shapes of BEiT's ViT as microsoft/unilm's modeling_pretrain.py and modeling_finetune.py save it, and its forward in plain
tensor algebra."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from tests.backbones.formats.reference import fill
from tests.parity import weights_in_float64

INDEX = "relative_position_index"
TABLE = "relative_position_bias_table"


def encoder_shapes(
    width: int = 192,
    depth: int = 2,
    side: int = 4,
    patch: int = 8,
    heads: int = 3,
    *,
    positions: str = "own",
    scales: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Without head and last norm. side: patches a side. positions: "own" bias tables, one "shared", or an "absolute" table."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    rows = ((2 * side - 1) ** 2 + 3, heads)
    shapes |= {"pos_embed": (1, side * side + 1, width)} if positions == "absolute" else {}
    shapes |= {f"rel_pos_bias.{TABLE}": rows} if positions == "shared" else {}
    for i in range(depth):
        block: dict[str, tuple[int, ...]] = {"gamma_1": (width,), "gamma_2": (width,)} if scales else {}
        block |= {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
        }
        block |= {f"attn.{TABLE}": rows} if positions == "own" else {}
        block |= {
            "attn.qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
        }
        block |= {"norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (4 * width, width)}
        block |= {
            "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width),
            "mlp.fc2.bias": (width,),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def index(side: int) -> torch.Tensor:
    """Row of the bias table for each pair of tokens (1 + side^2, 1 + side^2): the offset of two patches in raster order; the last
    three are class to patch, patch to class, class to class (BEiT's modeling_finetune.py)."""
    y, x = (grid.flatten() for grid in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    down, across = y[:, None] - y[None, :] + side - 1, x[:, None] - x[None, :] + side - 1
    rows = (2 * side - 1) ** 2 + 3
    result = torch.full((side * side + 1, side * side + 1), rows - 3)
    result[1:, 1:] = down * (2 * side - 1) + across
    result[1:, 0] = rows - 2
    result[0, 0] = rows - 1
    return result


def with_indices(weights: dict[str, torch.Tensor], side: int = 4) -> dict[str, torch.Tensor]:
    """The buffers that the code saves beside each bias table."""
    return weights | {name.replace(TABLE, INDEX): index(side) for name in weights if name.endswith(TABLE)}


def weights(extra: dict[str, tuple[int, ...]], seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """An encoder with its indices, and tensors of `extra` shapes."""
    return with_indices(fill(encoder_shapes(**options) | extra, seed))


def pair(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    """A layer's weight and bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def published_beit(weights: dict[str, torch.Tensor], imgs: torch.Tensor, heads: int = 3) -> torch.Tensor:
    """Tokens (N, 1 + L, D) of the ViT of arXiv 2106.08254 with pre-norm blocks, layer scale and relative position biases, after
    `norm` where there is one; imgs (N, C, H, W)."""
    weights = weights_in_float64(weights)
    patch, n, eps = weights["patch_embed.proj.weight"], len(imgs), 1e-6
    width, side = patch.shape[0], imgs.shape[2] // patch.shape[2]
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)  # noqa: E731
    x = (
        F.unfold(imgs, patch.shape[2], stride=patch.shape[2]).transpose(1, 2) @ patch.flatten(1).T
        + weights["patch_embed.proj.bias"]
    )
    x = torch.cat([weights["cls_token"].expand(n, -1, -1), x], dim=1) + weights.get(
        "pos_embed", torch.zeros(())
    )
    for i in range(len({name.split(".")[1] for name in weights if name.startswith("blocks.")})):
        b = f"blocks.{i}"
        z = norm(x, f"{b}.norm1")
        q, k, v = (z @ part.T for part in weights[f"{b}.attn.qkv.weight"].chunk(3))
        q, v = q + weights[f"{b}.attn.q_bias"], v + weights[f"{b}.attn.v_bias"]
        q, k, v = (part.reshape(n, -1, heads, width // heads).transpose(1, 2) for part in (q, k, v))
        table = weights.get(f"{b}.attn.{TABLE}", weights.get(f"rel_pos_bias.{TABLE}"))
        bias = 0 if table is None else table[index(side)].permute(2, 0, 1)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(width // heads) + bias).softmax(-1)
        z = linear((attention @ v).transpose(1, 2).reshape(n, -1, width), f"{b}.attn.proj")
        x = x + weights.get(f"{b}.gamma_1", 1) * z
        hidden = linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + weights.get(f"{b}.gamma_2", 1) * linear(hidden, f"{b}.mlp.fc2")
    return norm(x, "norm") if "norm.weight" in weights else x
