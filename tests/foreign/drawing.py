"""Weights and images drawn by numpy from a seed, so that a file can be rebuilt without the code that defined
it.

Only the raw stream of PCG64 is used, which numpy guarantees across versions and machines. Every number is a
small multiple of a
power of two: it is exact in float16 and bfloat16 too, so a file stored in half precision has the same
features.

Legend: N batch, L tokens, D width, C channels, H W image, h w grid of patches.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Shape = Sequence[int]
BIAS_TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"
NUMBERED = re.compile(r"(.*?blocks\.)(\d+)(\..*)")
FOLDED = re.compile(r"(.*?blocks\.)\{(\d+)\}(\..*)")
NUM_VALUES = 24  # features that a golden file keeps of each model


def draw_integers(seed: int, name: str, num: int) -> np.ndarray:
    """Return `num` integers of [-128, 127], determined by the seed and the name."""
    stream = np.random.PCG64([seed, zlib.crc32(name.encode())])
    raw = np.asarray(stream.random_raw((num + 7) // 8), dtype="<u8")
    return raw.view(np.uint8)[:num].astype(np.float32) - 128


def draw_tensor(seed: int, name: str, shape: Shape) -> torch.Tensor:
    """Return the float32 tensor of a parameter.

    Weights of norms and layer scales lie in [0.5, 1.5); matrices and filters have a gain of about 1; tokens,
    position tables and biases are large enough to show in the features if they are forgotten or misplaced.
    """
    drawn = draw_integers(seed, name, int(np.prod(shape, dtype=np.int64))).reshape(tuple(shape))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(9)
    if name.endswith("running_mean"):
        return torch.zeros(tuple(shape))
    if len(shape) == 1 and not name.endswith("bias"):
        return torch.from_numpy(1 + np.floor(drawn / 2) / 128)
    return torch.from_numpy(drawn / 128 * _get_reach(name, shape)).float()


def _get_reach(name: str, shape: Shape) -> float:
    """Return the largest magnitude of a tensor's values, a power of two."""
    if name.endswith(BIAS_TABLE):
        return 1.0
    if len(shape) in (2, 4) and "mask" not in name:
        fan_in = int(np.prod(shape[1:], dtype=np.int64))
        return float(2.0 ** np.round(np.log2(2 / np.sqrt(fan_in))))
    return 0.5 if len(shape) == 3 else 0.25


def draw_state(
    shapes: Mapping[str, Shape], seed: int, tables: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, torch.Tensor]:
    """Return a state dict of these names and shapes.

    tables: the fixed tables among them, by name: {"kind": "mae" | "moco" | "index", "grid": [h, w], "prefix":
    tokens}.
    """
    tables = tables or {}
    return {
        name: build_table(shape, **tables[name]) if name in tables else draw_tensor(seed, name, shape)
        for name, shape in shapes.items()
    }


def build_table(shape: Shape, kind: str, grid: Shape, prefix: int = 0) -> torch.Tensor:
    """Return a fixed table: sines and cosines (1, prefix + L, D), or the index of BEiT's bias table."""
    if kind == "index":
        return build_index(grid)
    if kind == "moco":  # vits.py runs down first: of an oblong grid it makes the table of the transposed one
        return build_sine_table(shape[-1], grid[::-1], prefix, down_first=True)
    return build_sine_table(shape[-1], grid, prefix, down_first=False)


def build_sine_table(width: int, grid: Shape, prefix: int, *, down_first: bool) -> torch.Tensor:
    """Return sines then cosines of one coordinate of each patch, then of the other, computed in float64.

    MAE and I-JEPA begin with the coordinate across, MoCo v3 with the one down.
    """
    down = np.repeat(np.arange(grid[0], dtype=np.float64), grid[1])
    across = np.tile(np.arange(grid[1], dtype=np.float64), grid[0])
    frequency = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))
    waves: list[np.ndarray] = []
    for place in (down, across) if down_first else (across, down):
        angle = place[:, None] * frequency
        waves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate([np.zeros((prefix, width)), np.concatenate(waves, axis=1)])
    return torch.from_numpy(table[None]).float()


def build_index(grid: Shape) -> torch.Tensor:
    """Return the row of the bias table for each pair of tokens (1 + L, 1 + L).

    The first rows are the offsets of two patches in raster order; the last three are class to patch, patch to
    class and class to class (microsoft/unilm beit/modeling_finetune.py).
    """
    h, w = grid
    down, across = (axis.reshape(-1) for axis in np.indices((h, w)))
    offsets = (down[:, None] - down + h - 1) * (2 * w - 1) + across[:, None] - across + w - 1
    rows = (2 * h - 1) * (2 * w - 1)
    index = np.full((h * w + 1, h * w + 1), rows, dtype=np.int64)
    index[1:, 1:] = offsets
    index[1:, 0] = rows + 1
    index[0, 0] = rows + 2
    return torch.from_numpy(index)


def draw_images(seed: int, shape: Shape) -> torch.Tensor:
    """Return float64 images (N, C, H, W) in [-2, 2)."""
    drawn = draw_integers(seed, "images", int(np.prod(shape))).reshape(tuple(shape))
    return torch.from_numpy(drawn.astype(np.float64) / 64)


def draw_noise(seed: int, num_imgs: int, num_patches: int) -> torch.Tensor:
    """Return float64 noise (N, L) without ties, by which MAE chooses the patches to keep."""
    stream = np.random.PCG64([seed, zlib.crc32(b"noise")])
    raw = np.asarray(stream.random_raw(num_imgs * num_patches), dtype=np.float64).reshape(
        num_imgs, num_patches
    )
    ranks = raw.argsort(axis=1).argsort(axis=1)
    return torch.from_numpy((ranks + 0.5) / num_patches)


def fold_blocks(shapes: Mapping[str, Shape]) -> dict[str, list[int]]:
    """Return the shapes with one entry for equal blocks: blocks.{2}.norm1.weight is of blocks 0 and 1."""
    grouped: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, shape in shapes.items():
        if match := NUMBERED.fullmatch(name):
            grouped.setdefault((match[1], match[3], tuple(shape)), []).append(int(match[2]))
    folded: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        match = NUMBERED.fullmatch(name)
        numbers = grouped[match[1], match[3], tuple(shape)] if match else []
        if match and numbers == list(range(len(numbers))):
            folded[f"{match[1]}{{{len(numbers)}}}{match[3]}"] = list(shape)
        else:
            folded[name] = list(shape)
    return folded


def unfold_blocks(folded: Mapping[str, Shape]) -> dict[str, Shape]:
    """Reverse `fold_blocks`."""
    shapes: dict[str, Shape] = {}
    for name, shape in folded.items():
        match = FOLDED.fullmatch(name)
        if match is None:
            shapes[name] = shape
            continue
        for number in range(int(match[2])):
            shapes[f"{match[1]}{number}{match[3]}"] = shape
    return shapes


def pick_values(features: torch.Tensor) -> list[float]:
    """Return NUM_VALUES numbers spread evenly over all images, tokens and channels."""
    flat = features.detach().reshape(-1)
    last = flat.numel() - 1
    return [flat[i * last // (NUM_VALUES - 1)].item() for i in range(NUM_VALUES)]
