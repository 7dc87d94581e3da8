"""The ViT that many families share: tensor shapes, published equations, fixed position tables."""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F

from tests.backbones.formats.reference import Shapes, apply_linear, apply_norm, fill, pair
from tests.parity import weights_in_float64

WIDTH, DEPTH, SIZE, PATCH = 192, 2, 32, 8  # of the toys; 192 is a standard width: 3 heads
REAL = {  # width, depth, heads, patch
    "S": (384, 12, 6, 16),
    "B": (768, 12, 12, 16),
    "L": (1024, 24, 16, 16),
    "H": (1280, 32, 16, 14),
}


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return pair(name, outputs, inputs)


def norm(name: str, width: int) -> Shapes:
    return pair(name, width)


def block_shapes(width: int, hidden: int | None = None) -> Shapes:
    """Return the shapes of one block, as in timm, facebookresearch/mae and their descendants."""
    hidden = hidden or 4 * width
    return {
        **norm("norm1", width),
        **linear("attn.qkv", width, 3 * width),
        **linear("attn.proj", width, width),
        **norm("norm2", width),
        **linear("mlp.fc1", width, hidden),
        **linear("mlp.fc2", hidden, width),
    }


def encoder_shapes(
    width: int = WIDTH,
    depth: int = DEPTH,
    size: int = SIZE,
    patch: int = PATCH,
    *,
    tokens: tuple[str, ...] = ("cls_token",),
    rows: int | None = None,
    hidden: int | None = None,
    scales: tuple[str, ...] = (),
) -> Shapes:
    """Return the shapes of an encoder.

    tokens: the prefix tokens. rows: how many of them have one in the table (default all). scales: names of
    the layer scales in a block.
    """
    shapes: Shapes = dict.fromkeys(tokens, (1, 1, width))
    shapes["pos_embed"] = (1, (size // patch) ** 2 + (len(tokens) if rows is None else rows), width)
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        inside = block_shapes(width, hidden) | dict.fromkeys(scales, (width,))
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in inside.items()}
    return shapes | norm("norm", width)


def mlp_head(*parts: str, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Return DINO's projection head: an MLP without norms, and each last layer with torch's weight norm."""
    shapes: Shapes = linear("mlp.0", width, 16) | linear("mlp.2", 16, 16) | linear("mlp.4", 16, 8)
    for part in parts:
        shapes |= {f"{part}.weight_g": (24, 1), f"{part}.weight_v": (24, 8)}
    return fill(shapes, 5)


def published_vit(
    weights: Mapping[str, torch.Tensor], imgs: torch.Tensor, num_heads: int, eps: float = 1e-6
) -> torch.Tensor:
    """Compute the tokens of the ViT of arXiv 2010.11929, after the final norm if there is one.

    imgs (N, C, H, W) -> (N, prefix + L, D). Prefix tokens are cls_token and dist_token (arXiv 2012.12877);
    without rows in the table they are prepended after the positions are added (DeiT III). gamma_1, gamma_2:
    layer scale (arXiv 2103.17239).
    """
    weights = weights_in_float64(weights)
    n, (width, _, patch, _) = len(imgs), weights["patch_embed.proj.weight"].shape
    x = F.unfold(imgs, patch, stride=patch).transpose(1, 2)
    x = x @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    tokens = [weights[name].expand(n, -1, -1) for name in ("cls_token", "dist_token") if name in weights]
    if weights["pos_embed"].shape[1] == x.shape[1]:
        x = torch.cat([*tokens, x + weights["pos_embed"]], dim=1)
    else:
        x = torch.cat([*tokens, x], dim=1) + weights["pos_embed"]
    normed, affine = partial(apply_norm, weights, eps=eps), partial(apply_linear, weights)
    for i in range(len({name.split(".")[1] for name in weights if name.startswith("blocks.")})):
        block = f"blocks.{i}"
        qkv = affine(normed(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(n, -1, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(width // num_heads)).softmax(-1)
        attended = affine((attention @ v).transpose(1, 2).reshape(n, -1, width), f"{block}.attn.proj")
        x = x + weights.get(f"{block}.gamma_1", torch.ones(())) * attended
        hidden = affine(normed(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = affine(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{block}.mlp.fc2")
        x = x + weights.get(f"{block}.gamma_2", torch.ones(())) * hidden
    return normed(x, "norm") if "norm.weight" in weights else x


def sincos(width: int, grid: int, *, down_first: bool, class_row: bool) -> torch.Tensor:
    """Return the fixed table (1, 1 + grid^2, width): sines and cosines of one coordinate, then the other.

    MAE and I-JEPA begin with the column, MoCo v3 with the row (its meshgrid is indexed "ij").
    """
    down, across = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
    frequency = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angles = [place[:, None] * frequency for place in ((down, across) if down_first else (across, down))]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(int(class_row), width), table])[None]
