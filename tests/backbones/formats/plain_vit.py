"""The ViT that many families share: shapes of its tensors, its published equations in plain tensor algebra, its fixed tables."""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F

from tests.backbones.formats.reference import fill
from tests.parity import weights_in_float64

WIDTH, DEPTH, SIZE, PATCH = 192, 2, 32, 8  # of the toys; 192 is a standard width: 3 heads
Shapes = dict[str, tuple[int, ...]]
Value = TypeVar("Value")  # a tensor or its shape
REAL = {
    "S": (384, 12, 6, 16),
    "B": (768, 12, 12, 16),
    "L": (1024, 24, 16, 16),
    "H": (1280, 32, 16, 14),
}  # width ... patch


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block_shapes(width: int, hidden: int | None = None) -> Shapes:
    """One block of timm, facebookresearch/mae and all that grew from them."""
    hidden = hidden or 4 * width
    return {
        **norm("norm1", width), **linear("attn.qkv", width, 3 * width), **linear("attn.proj", width, width),
        **norm("norm2", width), **linear("mlp.fc1", width, hidden), **linear("mlp.fc2", hidden, width),
    }  # fmt: skip


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
    """tokens: the prefix tokens. rows: how many of them have one in the table (all). scales: names of layer scales in a block."""
    shapes: Shapes = dict.fromkeys(tokens, (1, 1, width))
    shapes["pos_embed"] = (1, (size // patch) ** 2 + (len(tokens) if rows is None else rows), width)
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        inside = block_shapes(width, hidden) | dict.fromkeys(scales, (width,))
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in inside.items()}
    return shapes | norm("norm", width)


def prefixed(prefix: str, tensors: Mapping[str, Value]) -> dict[str, Value]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def mlp_head(*parts: str, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """DINO's projection head under each name: an MLP without norms, and its last layers by torch's weight norm."""
    shapes: Shapes = linear("mlp.0", width, 16) | linear("mlp.2", 16, 16) | linear("mlp.4", 16, 8)
    for part in parts:
        shapes |= {f"{part}.weight_g": (24, 1), f"{part}.weight_v": (24, 8)}
    return fill(shapes, 5)


def published_vit(
    weights: Mapping[str, torch.Tensor], imgs: torch.Tensor, num_heads: int, eps: float = 1e-6
) -> torch.Tensor:
    """Tokens of the ViT of arXiv 2010.11929 with pre-norm blocks, after the final norm where there is one.

    imgs (N, C, H, W) -> (N, prefix + L, D). Prefix tokens are cls_token and dist_token (arXiv 2012.12877); where the table has
    no rows for them, they are put in front after positions are added (DeiT III). gamma_1, gamma_2: layer scale, arXiv 2103.17239.
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
    normed = lambda z, name: F.layer_norm(
        z, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps
    )  # noqa: E731
    affine = lambda z, name: z @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
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
    """(1, 1 + grid * grid, width) in float32: sines then cosines of one coordinate of each patch, then of the other.

    MAE and I-JEPA begin with the coordinate across, MoCo v3 with the one down (its meshgrid is indexed "ij").
    """
    down, across = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
    frequency = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angles = [place[:, None] * frequency for place in ((down, across) if down_first else (across, down))]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(int(class_row), width), table])[None]
