"""The crops of the ImageNet protocols, for RGB files and for arrays of any number of channels."""

from mae_bench.data.batches.loader import Transform
from mae_bench.data.batches.transforms import (
    CenterCropTransform,
    PretrainTransform,
    build_eval_transform,
    build_train_transform,
)
from mae_bench.data.sets.decode import holds_arrays
from mae_bench.data.sets.source import ImageSource
from mae_bench.spec import BackboneSpec
from tasks.imagenet.config import EvalConfig, ImageConfig
from tasks.imagenet.fit import require_no_augment


def build_train_crop(
    config: EvalConfig, spec: BackboneSpec, images: ImageSource, auto_augment: str | None
) -> Transform:
    """Return RandomResizedCrop, a flip and RandAugment at the backbone's image size.

    Raise UserError for RandAugment on arrays: its operations are defined for RGB images of 8 bits only.
    """
    size, interpolation = spec.img_size, spec.interpolation
    if is_rgb(spec, images):
        rgb: Transform = build_train_transform(
            size, config.crop_scale, interpolation, auto_augment=auto_augment
        )
        return rgb
    require_no_augment(auto_augment, spec)
    return PretrainTransform(
        size,
        crop_scale=config.crop_scale,
        interpolation=interpolation,
        decode="exact",
        in_chans=spec.in_chans,
    )


def build_eval_crop(config: ImageConfig, spec: BackboneSpec, images: ImageSource) -> Transform:
    """Return the resize and central crop at the backbone's image size."""
    size, interpolation = spec.img_size, spec.interpolation
    if is_rgb(spec, images):
        rgb: Transform = build_eval_transform(size, config.crop_pct, interpolation)
        return rgb
    return CenterCropTransform(
        size, interpolation=interpolation, in_chans=spec.in_chans, crop_pct=config.crop_pct
    )


def is_rgb(spec: BackboneSpec, images: ImageSource) -> bool:
    """Return whether Pillow reads the images, as RGB, and timm's and torchvision's transforms apply."""
    return spec.in_chans == 3 and not holds_arrays(images)
