"""BEiT's ViT as microsoft/unilm saves it (modeling_pretrain.py, modeling_finetune.py), and its equations."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tests.backbones.formats.reference import Shapes, apply_linear, apply_norm, fill, pair
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
) -> Shapes:
    """Return the shapes of an encoder without head and final norm.

    side: patches per side. positions: bias tables of the blocks' "own", one "shared", or an "absolute" table.
    """
    shapes: Shapes = {"cls_token": (1, 1, width), **pair("patch_embed.proj", width, 3, patch, patch)}
    rows = ((2 * side - 1) ** 2 + 3, heads)
    if positions == "absolute":
        shapes["pos_embed"] = (1, side * side + 1, width)
    if positions == "shared":
        shapes[f"rel_pos_bias.{TABLE}"] = rows
    for i in range(depth):
        block: Shapes = {"gamma_1": (width,), "gamma_2": (width,)} if scales else {}
        block |= pair("norm1", width) | {"attn.q_bias": (width,), "attn.v_bias": (width,)}
        if positions == "own":
            block[f"attn.{TABLE}"] = rows
        block |= {"attn.qkv.weight": (3 * width, width)} | pair("attn.proj", width, width)
        block |= pair("norm2", width) | pair("mlp.fc1", 4 * width, width) | pair("mlp.fc2", width, 4 * width)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def index(side: int) -> torch.Tensor:
    """Return the row of the bias table for each pair of tokens, (1 + side^2, 1 + side^2).

    Rows are offsets of two patches in raster order; the last three are class to patch, patch to class and
    class to class (BEiT's modeling_finetune.py).
    """
    y, x = (grid.flatten() for grid in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    down, across = y[:, None] - y[None, :] + side - 1, x[:, None] - x[None, :] + side - 1
    rows = (2 * side - 1) ** 2 + 3
    result = torch.full((side * side + 1, side * side + 1), rows - 3)
    result[1:, 1:] = down * (2 * side - 1) + across
    result[1:, 0] = rows - 2
    result[0, 0] = rows - 1
    return result


def with_indices(weights: dict[str, torch.Tensor], side: int = 4) -> dict[str, torch.Tensor]:
    """Add the buffers that the code saves next to each bias table."""
    return weights | {name.replace(TABLE, INDEX): index(side) for name in weights if name.endswith(TABLE)}


def weights(extra: Shapes, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Return an encoder with its indices and tensors of `extra` shapes."""
    return with_indices(fill(encoder_shapes(**options) | extra, seed))


def published_beit(weights: dict[str, torch.Tensor], imgs: torch.Tensor, heads: int = 3) -> torch.Tensor:
    """Compute the tokens of the ViT of arXiv 2106.08254, with layer scale and relative position biases.

    imgs (N, C, H, W) -> (N, 1 + L, D), after `norm` if there is one.
    """
    weights = weights_in_float64(weights)
    patch, n = weights["patch_embed.proj.weight"], len(imgs)
    width, side = patch.shape[0], imgs.shape[2] // patch.shape[2]
    linear, norm = partial(apply_linear, weights), partial(apply_norm, weights)
    patches = F.unfold(imgs, patch.shape[2], stride=patch.shape[2]).transpose(1, 2)
    x = patches @ patch.flatten(1).T + weights["patch_embed.proj.bias"]
    x = torch.cat([weights["cls_token"].expand(n, -1, -1), x], dim=1)
    x = x + weights.get("pos_embed", torch.zeros(()))
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
