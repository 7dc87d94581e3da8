"""Resample position tables and patch filters to another size, each with the method that its family publishes.

Half precision is resampled in float32, all else in its own precision.

Legend: L patches, D width, C channels, h w grid of patches, p patch side.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed

from mae_bench.spec import PosResample

Grid = tuple[int, int]  # patches (down, across)
# Added to the size in DINO's scale factor (facebookresearch/dino vision_transformer.py; iBOT, DINOv2
# without registers)
OFFSET = 0.1
# Range in which BEiT searches the ratio of its positions
SMALLEST_RATIO, LARGEST_RATIO = 1.01, 1.5


def resize_table(table: torch.Tensor, old: Grid, new: Grid, method: PosResample) -> torch.Tensor:
    """Resample a position table (1, prefix + L, D) from grid `old` to `new`; prefix rows are kept.

    "bicubic": to the new size, without antialiasing (facebookresearch/mae util/pos_embed.py, detectron2).
    "bicubic_antialias": with antialiasing (DINOv2 with registers).
    "bicubic_offset": by the scale factor (new + 0.1) / old (DINO).
    "bilinear": as MaskFeat (trilinear with one frame).
    "bilinear_antialias": with antialiasing (NaFlex of SigLIP 2, arXiv 2502.14786).

    Raise ValueError if the table is too short.
    """
    if old == new:
        return table
    rows = old[0] * old[1]
    if table.shape[1] < rows:
        raise ValueError(f"a table of {table.shape[1]} rows for {old[0]} x {old[1]} patches")
    prefix, patches = table[:, : table.shape[1] - rows], table[:, table.shape[1] - rows :]
    maps = _widen(patches).reshape(len(patches), *old, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    if method == "bicubic_offset":
        scale = ((new[0] + OFFSET) / old[0], (new[1] + OFFSET) / old[1])
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
    else:
        mode, _, antialias = method.partition("_")
        maps = F.interpolate(maps, size=new, mode=mode, antialias=bool(antialias))
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize_bias_table(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """Resample BEiT's relative table ((2h - 1) (2w - 1) + 3, heads) from grid `old` to grid `new`.

    The last three rows, those of the class token, are kept. The distances of `old` are spread over those of
    `new` in a geometric progression, dense at 0, and interpolated by a cubic spline (microsoft/unilm
    beit/run_class_finetuning.py; timm interpolates linearly). A direction whose size is unchanged is not
    resampled.
    """
    if old == new:
        return table
    height, width = 2 * old[0] - 1, 2 * old[1] - 1
    down = _spread(height, 2 * new[0] - 1, table.device, table.dtype)
    across = _spread(width, 2 * new[1] - 1, table.device, table.dtype)
    maps = table[: height * width].reshape(height, width, -1)
    resampled = torch.einsum("yh,xw,hwn->yxn", down, across, maps).flatten(0, 1)
    return torch.cat([resampled, table[height * width :]])


def resize_distances(table: torch.Tensor, length: int) -> torch.Tensor:
    """Resample a decomposed relative table (2h - 1, D) of SAM or ViTDet to (length, D), linearly.

    Same method as detectron2 (modeling/backbone/utils.py).
    """
    return F.interpolate(_widen(table).T[None], size=length, mode="linear")[0].T.to(table.dtype)


def resize_filters(filters: torch.Tensor, patch_size: tuple[int, int], method: str) -> torch.Tensor:
    """Resample the filters (D, C, p, p) of a patch embedding to another patch size.

    "pinv": filters that respond to a resized patch as the old ones do to the original (FlexiViT, arXiv
        2212.08013 section 3.4; bicubic, as in timm).
    "bicubic": resize the filters themselves, as ViTDet does for ViT-H from 14 to 16 (arXiv 2203.16527 A.2).
        Their response to a constant patch grows with its area.
    """
    if method == "bicubic":
        return F.interpolate(_widen(filters), size=patch_size, mode="bicubic").to(filters.dtype)
    out: torch.Tensor = resample_patch_embed(filters, list(patch_size))
    return out


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # the cached tensor is used in training too
def _spread(source: int, target: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return weights (target, source) of BEiT's resampling in one direction; both sizes are odd."""
    if source == target:
        return torch.eye(target, device=device, dtype=dtype)
    steps = _ratio(source // 2, target // 2) ** np.arange(source // 2)
    right = np.cumsum(steps)
    known = np.concatenate([-right[::-1], [0.0], right])
    wanted = np.arange(target) - target // 2
    degree = min(3, source - 1)
    inside = known[2:-2] if degree == 3 else known[:0]  # a cubic spline has no knot next to its ends
    knots = np.concatenate([np.repeat(known[0], degree + 1), inside, np.repeat(known[-1], degree + 1)])
    to_coefficients = np.linalg.inv(_splines(knots, degree, known))
    values = _splines(knots, degree, wanted.clip(known[0], known[-1]))
    weights = torch.from_numpy(values @ to_coefficients)
    return weights.to(device, dtype)


def _ratio(terms: int, reach: int) -> float:
    """Return q in [1.01, 1.5] with 1 + q + ... + q ** (terms - 1) = `reach`, by bisection as in BEiT."""
    left, right = SMALLEST_RATIO, LARGEST_RATIO
    while right - left > 1e-6:
        middle = (left + right) / 2
        if (1 - middle**terms) / (1 - middle) > reach:
            right = middle
        else:
            left = middle
    return middle


def _splines(knots: np.ndarray, degree: int, points: np.ndarray) -> np.ndarray:
    """Return the values (points, splines) of the B-splines over the knots, by the Cox-de Boor recursion."""
    last = len(knots) - degree - 2  # the interval that contains the right end
    interval = np.clip(np.searchsorted(knots, points, side="right") - 1, degree, last)
    values = np.eye(len(knots) - 1)[interval]
    for order in range(1, degree + 1):
        width = knots[order:] - knots[:-order]
        safe = np.where(width > 0, width, 1.0)
        rising = (points[:, None] - knots[: -order - 1]) / safe[:-1] * (width[:-1] > 0)
        falling = (knots[order + 1 :] - points[:, None]) / safe[1:] * (width[1:] > 0)
        values = rising * values[:, :-1] + falling * values[:, 1:]
    return values
