"""Strides and scales of a feature pyramid over a plain ViT (imports no framework)."""

from collections.abc import Sequence

from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec

PYRAMID_SCALES = (4.0, 2.0, 1.0, 0.5)  # supported by detectron2's SimpleFeaturePyramid


def get_patch_side(spec: BackboneSpec, library: str) -> int:
    """Return the patch side, the stride of every map; `library` has one stride for both directions."""
    height, width = spec.patch_size
    if height != width:
        raise UserError(
            f"patches of {height} x {width} pixels",
            expected=f"square patches for {library}",
            fix="leave the task or the backbone out: tasks.NAME=null or backbones.NAME=null",
        )
    return height


def get_pyramid_scales(spec: BackboneSpec, strides: Sequence[int]) -> list[float]:
    """Return the scale of each pyramid level relative to the ViT's map (arXiv 2203.16527, section 3).

    Patch 8 with strides (4, 8, 16) gives 2, 1, 0.5.
    """
    patch = get_patch_side(spec, "detectron2")
    wrong = [stride for stride in strides if patch / stride not in PYRAMID_SCALES]
    if wrong:
        reachable = [int(patch / scale) for scale in PYRAMID_SCALES if patch % scale == 0]
        raise UserError(
            f"pyramid strides {wrong} over a map of stride {patch}",
            expected=f"strides among {reachable} for this backbone",
            fix=f"set pyramid_strides to some of {reachable}, with one anchor size per level",
        )
    return [patch / stride for stride in strides]
