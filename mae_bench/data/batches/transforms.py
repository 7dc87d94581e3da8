"""Transform images to tensors for training and evaluation; normalisation happens on the device.

Dimensions: N batch, C channels, H W image.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    pil_to_tensor,
    to_pil_image,
)

from mae_bench.data.batches.crops import (
    CROP_PCT,
    RESAMPLING,
    Crop,
    compute_center_crop,
    encode_crop,
    resample,
    resample_exact,
    sample_fixed_crop,
    sample_resized_crop,
    take_box,
)
from mae_bench.data.sets.decode import Jpeg
from mae_bench.errors import UserError

MAX_DEFERRED = 640  # pixels per side of a crop that is resampled on the device


def build_train_transform(
    img_size: tuple[int, int],
    scale: tuple[float, float],
    interpolation: str = "bicubic",
    hflip: float = 0.5,
    auto_augment: str | None = None,
) -> T.Compose:
    """Build RandomResizedCrop and a horizontal flip, then RandAugment if `auto_augment` names a policy.

    MAE pretrains with scale (0.2, 1) and fine-tunes with scale (0.08, 1) and rand-m9-mstd0.5-inc1. For RGB
    images; `PretrainTransform` crops arrays and images with another number of channels.
    """
    steps: list[Any] = [RandomResizedCropAndInterpolation(img_size, scale, interpolation=interpolation)]
    if hflip:
        steps.append(T.RandomHorizontalFlip(hflip))
    if auto_augment:
        # The fill colour of timm's create_transform.
        grey = tuple(round(255 * mean) for mean in (0.485, 0.456, 0.406))
        options = {"translate_const": int(min(img_size) * 0.45), "img_mean": grey}
        steps.append(rand_augment_transform(auto_augment, options))
    return T.Compose([*steps, T.PILToTensor()])


def build_eval_transform(
    img_size: tuple[int, int], crop_pct: float = 0.875, interpolation: str = "bicubic"
) -> T.Compose:
    """Build a resize of the short side to img_size / crop_pct and a central crop (MAE: 256, then 224).

    For an img_size that is not square, both sides are resized.
    """
    size: int | list[int] = [round(side / crop_pct) for side in img_size]
    if img_size[0] == img_size[1]:
        size = round(img_size[0] / crop_pct)
    resize = T.Resize(size, InterpolationMode(interpolation), antialias=True)
    return T.Compose([resize, T.CenterCrop(img_size), T.PILToTensor()])


@dataclass(frozen=True)
class PretrainTransform:
    """Transform pixels (H, W, C) to an input (C, *img_size) of the same dtype, deterministically for a seed.

    augment: none (central crop, no flip), crop (fixed size) or resized_crop, the latter two with a flip (MAE,
    Table 1e).
    color_jitter: strength s of brightness, contrast and saturation, with hue s / 4 (at most 0.5), in random
    order. The paper states no strengths; the ratio is that of SimCLR (arXiv 2002.05709, appendix A).
    decode: "exact" equals torchvision on Pillow's images bit for bit; "fast" differs by less than 0.05 of 255
    on average.
    crop_on: "device" leaves resampling and flip to `mae_bench.data.batches.crops.resample_batch`.
    """

    img_size: tuple[int, int]
    augment: Literal["none", "crop", "resized_crop"] = "resized_crop"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    color_jitter: float = 0.0
    interpolation: str = "bicubic"
    decode: Literal["fast", "exact"] = "fast"
    in_chans: int = 3
    crop_on: Literal["cpu", "device"] = "cpu"

    def __post_init__(self) -> None:
        if self.interpolation not in RESAMPLING:
            raise UserError(f"interpolation {self.interpolation!r}", expected=" or ".join(RESAMPLING))
        if self.color_jitter and self.in_chans not in (1, 3):
            raise UserError(
                f"color_jitter with {self.in_chans} channels",
                expected="grey or RGB images",
                fix="set color_jitter=0",
            )
        if self.color_jitter and self.crop_on == "device":
            raise UserError(
                "color_jitter with crop_on=device", expected="crops on the CPU", fix="set crop_on=cpu"
            )

    def __call__(self, pixels: np.ndarray | Jpeg, seed: int) -> torch.Tensor:
        """Return the input, (C, *img_size)."""
        draw = random.Random(seed)
        crop = self._sample_crop(pixels.shape, draw)
        return self._resample(_decode_rows(pixels, crop), crop, draw)

    def defer(self, pixels: np.ndarray | Jpeg, seed: int) -> tuple[torch.Tensor, list[int]]:
        """Return the crop's box, (C, height, width), and the numbers that `resample_batch` needs.

        A box with a side above MAX_DEFERRED pixels is resampled here, as a batch is padded to its largest
        image.
        """
        draw = random.Random(seed)
        crop = self._sample_crop(pixels.shape, draw)
        pixels = _decode_rows(pixels, crop)
        if max(crop.height, crop.width) <= MAX_DEFERRED:
            return take_box(pixels, crop)[0], encode_crop(crop)
        return self._resample(pixels, crop, draw), encode_crop(Crop(0, 0, *self.img_size, self.img_size))

    def _sample_crop(self, shape: tuple[int, ...], draw: random.Random) -> Crop:
        height, width = shape[:2]
        if self.augment == "resized_crop":
            return sample_resized_crop(height, width, self.img_size, self.crop_scale, draw)
        return sample_fixed_crop(height, width, self.img_size, draw if self.augment == "crop" else None)

    def _resample(self, pixels: np.ndarray, crop: Crop, draw: random.Random) -> torch.Tensor:
        resample_image = resample if self.decode == "fast" else resample_exact
        img = resample_image(pixels, crop, self.img_size, self.interpolation)
        return jitter_colors(img, self.color_jitter, draw) if self.color_jitter else img


@dataclass(frozen=True)
class CenterCropTransform(PretrainTransform):
    """The resize and central crop of `build_eval_transform`, for arrays and any number of channels."""

    augment: Literal["none", "crop", "resized_crop"] = "none"
    decode: Literal["fast", "exact"] = "exact"
    crop_pct: float = CROP_PCT

    def _sample_crop(self, shape: tuple[int, ...], draw: random.Random) -> Crop:
        return compute_center_crop(shape[0], shape[1], self.img_size, self.crop_pct)


def _decode_rows(pixels: np.ndarray | Jpeg, crop: Crop) -> np.ndarray:
    return pixels.rows(crop.top + crop.height) if isinstance(pixels, Jpeg) else pixels


def jitter_colors(img: torch.Tensor, strength: float, draw: random.Random) -> torch.Tensor:
    """Apply torchvision's ColorJitter(s, s, s, s / 4) to a uint8 (C, H, W) image, with factors from `draw`.

    Raises UserError for images above 8 bits.
    """
    if img.dtype != torch.uint8:
        raise UserError(
            f"color_jitter on images of {img.dtype}", expected="8-bit images", fix="set color_jitter=0"
        )
    image: Any = to_pil_image(img)
    low, high, hue = max(0.0, 1 - strength), 1 + strength, min(0.5, strength / 4)
    brightness, contrast, saturation = (low + (high - low) * draw.random() for _ in range(3))
    turn = hue * (2 * draw.random() - 1)
    steps: list[Callable[[Any], Any]] = [
        lambda x: adjust_brightness(x, brightness),
        lambda x: adjust_contrast(x, contrast),
        lambda x: adjust_saturation(x, saturation),
        lambda x: adjust_hue(x, turn),
    ]
    for step in sorted(steps, key=lambda _: draw.random()):
        image = step(image)
    jittered: torch.Tensor = pil_to_tensor(image)
    return jittered


def normalize(imgs: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Normalise (N, C, H, W) to float32 of the same memory format: (x - mean) / std per channel.

    uint8 is divided by 255 first: mean and std refer to pixels in [0, 1] for uint8, and to raw values for
    other dtypes.
    """
    scale, shift = _build_constants(
        tuple(mean), tuple(std), 255.0 if imgs.dtype == torch.uint8 else 1.0, imgs.device
    )
    return torch.addcmul(shift, imgs.float(), scale)


@cache
def _build_constants(
    mean: tuple[float, ...], std: tuple[float, ...], unit: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 / (unit * std) and -mean / std, copied to the device once: a copy per step would block."""
    with torch.inference_mode(False):
        deviation = torch.tensor(std, dtype=torch.float64)
        scale, shift = 1 / (deviation * unit), -torch.tensor(mean, dtype=torch.float64) / deviation
        scale, shift = scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)
        return scale.to(device), shift.to(device)
