"""Position tables and patch filters at another size, each by the method that its family publishes."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed

from mae_bench.spec import PosResample

Grid = tuple[int, int]  # patches (down, across)
OFFSET = 0.1  # of DINO's scale factor (facebookresearch/dino vision_transformer.py; kept by iBOT and by DINOv2 without registers)
SMALLEST_RATIO, LARGEST_RATIO = 1.01, 1.5  # between which BEiT looks for the ratio of its positions


def resize_table(table: torch.Tensor, old: Grid, new: Grid, method: PosResample) -> torch.Tensor:
    """A table (1, prefix + h * w, D) of grid `old` at grid `new`; the rows of prefix tokens, which come first, stay.

    "bicubic": to the size, without antialiasing (facebookresearch/mae util/pos_embed.py, detectron2). "bicubic_antialias": with
    it (DINOv2 with registers). "bicubic_offset": by the scale factor (new + 0.1) / old (DINO). "bilinear": MaskFeat's (which is
    trilinear with one frame). ValueError for a table that is too short.
    """
    if old == new:
        return table
    rows = old[0] * old[1]
    if table.shape[1] < rows:
        raise ValueError(f"a table of {table.shape[1]} rows for {old[0]} x {old[1]} patches")
    prefix, patches = table[:, : table.shape[1] - rows], table[:, table.shape[1] - rows :]
    maps = patches.float().unflatten(1, old).permute(0, 3, 1, 2)
    if method == "bicubic_offset":
        scale = ((new[0] + OFFSET) / old[0], (new[1] + OFFSET) / old[1])
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
    else:
        mode = "bilinear" if method == "bilinear" else "bicubic"
        maps = F.interpolate(maps, size=new, mode=mode, antialias=method == "bicubic_antialias")
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize_bias_table(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """BEiT's relative table ((2h - 1) (2w - 1) + 3, heads) of grid `old` at grid `new`; its last three rows, those of the class
    token, stay.

    The distances of `old` are spread over those of `new` in a geometric progression, dense at 0, and a cubic spline is laid
    through them (microsoft/unilm beit/run_class_finetuning.py; timm lays straight lines). A direction that keeps its size
    keeps its distances.
    """
    if old == new:
        return table
    (height, width), (new_height, new_width) = ((2 * down - 1, 2 * across - 1) for down, across in (old, new))
    down = _spread(height, new_height, table.device, table.dtype)
    across = _spread(width, new_width, table.device, table.dtype)
    maps = table[: height * width].unflatten(0, (height, width))
    return torch.cat(
        [torch.einsum("yh,xw,hwn->yxn", down, across, maps).flatten(0, 1), table[height * width :]]
    )


def resize_distances(table: torch.Tensor, length: int) -> torch.Tensor:
    """A decomposed relative table (2n - 1, C), one of SAM's or ViTDet's, at another length: linear, as they do it
    (detectron2 modeling/backbone/utils.py)."""
    return F.interpolate(table.float().T[None], size=length, mode="linear")[0].T.to(table.dtype)


def resize_filters(filters: torch.Tensor, patch_size: tuple[int, int], method: str) -> torch.Tensor:
    """Filters (D, C, h, w) of a patch embedding for patches of another size.

    "pinv": what answers to a resized patch as the old ones to the patch (FlexiViT, arXiv 2212.08013 sec. 3.4; bicubic, as timm).
    "bicubic": the filters themselves resized, as ViTDet takes ViT-H from 14 to 16 (arXiv 2203.16527 A.2); they answer to a
    constant patch in proportion to its area.
    """
    if method == "bicubic":
        return F.interpolate(filters.float(), size=patch_size, mode="bicubic").to(filters.dtype)
    return resample_patch_embed(filters, list(patch_size))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept serves training too
def _spread(source: int, target: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(target, source) weights of BEiT's resampling in one direction; both numbers of distances are odd."""
    if source == target:
        return torch.eye(target, device=device, dtype=dtype)
    steps = _ratio(source // 2, target // 2) ** np.arange(source // 2)
    right = np.cumsum(steps)
    known = np.concatenate([-right[::-1], [0.0], right])
    wanted = np.arange(target) - target // 2
    degree = min(3, source - 1)
    inside = known[2:-2] if degree == 3 else known[:0]  # the spline of degree 3 has no knot next to its ends
    knots = np.concatenate([np.repeat(known[0], degree + 1), inside, np.repeat(known[-1], degree + 1)])
    through = np.linalg.inv(_splines(knots, degree, known))
    weights = torch.from_numpy(_splines(knots, degree, wanted.clip(known[0], known[-1])) @ through)
    return weights.to(device, dtype)


def _ratio(terms: int, reach: int) -> float:
    """q between 1.01 and 1.5 so that 1 + q + ... + q ** (terms - 1) is `reach`, by halving as BEiT does."""
    left, right = SMALLEST_RATIO, LARGEST_RATIO
    while right - left > 1e-6:
        middle = (left + right) / 2
        left, right = (left, middle) if (1 - middle**terms) / (1 - middle) > reach else (middle, right)
    return middle


def _splines(knots: np.ndarray, degree: int, points: np.ndarray) -> np.ndarray:
    """Values (points, splines) of the B-splines over the knots, by the recursion of Cox and de Boor."""
    last = len(knots) - degree - 2  # the interval that holds the right end
    interval = np.clip(np.searchsorted(knots, points, side="right") - 1, degree, last)
    values = np.eye(len(knots) - 1)[interval]
    at = points[:, None]
    for order in range(1, degree + 1):
        width = knots[order:] - knots[:-order]
        safe = np.where(width > 0, width, 1.0)
        rising = (at - knots[: -order - 1]) / safe[:-1] * (width[:-1] > 0)
        falling = (knots[order + 1 :] - at) / safe[1:] * (width[1:] > 0)
        values = rising * values[:, :-1] + falling * values[:, 1:]
    return values
