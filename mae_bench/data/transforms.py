"""Augmentation and evaluation transforms: PIL image in, uint8 (C, H, W) tensor out; normalisation happens on the device."""

from typing import Any

import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode


def train_transform(
    img_size: tuple[int, int],
    scale: tuple[float, float],
    interpolation: str = "bicubic",
    hflip: float = 0.5,
    auto_augment: str | None = None,
) -> T.Compose:
    """RandomResizedCrop and flip, then RandAugment if named (MAE: scale (0.2, 1) in pretraining; fine-tuning (0.08, 1) and
    rand-m9-mstd0.5-inc1)."""
    steps: list[Any] = [RandomResizedCropAndInterpolation(img_size, scale, interpolation=interpolation)]
    if hflip:
        steps.append(T.RandomHorizontalFlip(hflip))
    if auto_augment:
        fill = tuple(round(255 * mean) for mean in (0.485, 0.456, 0.406))  # the grey that timm's create_transform fills with
        steps.append(rand_augment_transform(auto_augment, {"translate_const": int(min(img_size) * 0.45), "img_mean": fill}))
    return T.Compose([*steps, T.PILToTensor()])


def eval_transform(img_size: tuple[int, int], crop_pct: float = 0.875, interpolation: str = "bicubic") -> T.Compose:
    """Resize the short side to img_size / crop_pct and crop the centre (MAE: 256 then 224)."""
    mode = InterpolationMode(interpolation)
    if img_size[0] == img_size[1]:
        return T.Compose([T.Resize(round(img_size[0] / crop_pct), mode, antialias=True), T.CenterCrop(img_size), T.PILToTensor()])
    return T.Compose(
        [T.Resize([round(side / crop_pct) for side in img_size], mode, antialias=True), T.CenterCrop(img_size), T.PILToTensor()]
    )


def normalize(imgs: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (N, C, H, W) -> float32, (x / 255 - mean) / std a channel."""
    scale = torch.tensor(std, device=imgs.device).mul(255).reciprocal().view(1, -1, 1, 1)
    shift = (torch.tensor(mean, device=imgs.device) / torch.tensor(std, device=imgs.device)).view(1, -1, 1, 1)
    return torch.addcmul(-shift, imgs.float(), scale)
