"""Fit an ImageNet protocol to a backbone: image size, and augmentation of other than RGB images.

Imports no framework, so that `plan` can call it.
"""

import re
from typing import TypeVar

from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec
from tasks.imagenet.config import NEAREST, ClassifyConfig, ImageConfig

C = TypeVar("C", bound=ImageConfig)


def fit(config: C, spec: BackboneSpec, *, arrays: bool = False) -> C:
    """Return the config with the image size used for this backbone; raise UserError if it cannot run.

    arrays: whether the training images are known to be arrays.
    """
    img_size = resolve_img_size(config, spec)
    if isinstance(config, ClassifyConfig) and (arrays or spec.in_chans != 3):
        require_no_augment(config.auto_augment, spec)
    return config.model_copy(update={"img_size": img_size}) if isinstance(config.img_size, str) else config


def resolve_img_size(config: ImageConfig, spec: BackboneSpec) -> tuple[int, int]:
    """Return the image size of the protocol; raise UserError if it is not a multiple of the patch size."""
    size = config.img_size or spec.img_size
    if isinstance(size, str):
        height, width = re.fullmatch(NEAREST, size).groups()  # type: ignore[union-attr]
        return find_nearest_size((int(height), int(width)), spec.patch_size)
    if any(side % patch for side, patch in zip(size, spec.patch_size, strict=True)):
        nearest = find_nearest_size(size, spec.patch_size)
        given = f"nearest-{size[0]}x{size[1]}"
        raise UserError(
            f"img_size {size} with patch_size {spec.patch_size}",
            expected="sides that are multiples of the patch's",
            fix=f"set tasks.NAME.img_size={given}, which is {nearest} for this backbone, "
            "or leave the backbone out: backbones.NAME=null",
        )
    return size


def find_nearest_size(size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return the multiple of the patch nearest to each side; of two equally near ones the larger."""
    height, width = (
        _find_nearest_multiple(side, patch) for side, patch in zip(size, patch_size, strict=True)
    )
    return height, width


def _find_nearest_multiple(side: int, patch: int) -> int:
    return max(patch, (2 * side + patch) // (2 * patch) * patch)


def require_no_augment(auto_augment: str | None, spec: BackboneSpec) -> None:
    """Raise UserError if RandAugment is asked for."""
    if auto_augment:
        raise UserError(
            f"auto_augment={auto_augment} with arrays, or images of {spec.in_chans} channels",
            expected="RGB images of 8 bits, for which RandAugment is defined",
            fix="set tasks.NAME.auto_augment=null",
        )
