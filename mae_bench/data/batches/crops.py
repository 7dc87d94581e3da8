"""Sample crops of images and resample them: one image on the CPU, or a whole batch on its device.

Dimensions: N batch, C channels, H W image, h w output.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image

Size = tuple[int, int]  # height, width

RATIO = (3 / 4, 4 / 3)  # width / height of RandomResizedCrop
TRIES = 10
CROP_PCT = 0.875  # 224 of 256
# Pillow 13 resamples the rows first where that is much less work.
VERTICAL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Crop:
    """A crop in pixels, each pair as (vertical, horizontal).

    The box at (top, left) with (height, width) is resized to `size`, cut at `offset` to the input size, and
    flipped.
    """

    top: int
    left: int
    height: int
    width: int
    size: Size
    offset: Size = (0, 0)
    flip: bool = False

    @property
    def vertical_first(self) -> bool:
        """Whether Pillow resamples the rows before the columns; it rounds to 8 bits between the two."""
        down, across = self.height - self.size[0], self.width - self.size[1]
        return VERTICAL_FIRST and down > 2 * max(0, across)


def sample_resized_crop(
    height: int, width: int, img_size: Size, scale: tuple[float, float], draw: random.Random
) -> Crop:
    """Sample torchvision's RandomResizedCrop and a flip.

    The crop covers a fraction in the range `scale` of the area, with a log-uniform aspect ratio. After ten
    failed attempts it is the central crop.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw.random())
        ratio = math.exp(low + (high - low) * draw.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int((height - h + 1) * draw.random()), int((width - w + 1) * draw.random())
            return Crop(top, left, h, w, img_size, flip=draw.random() < 0.5)
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return Crop((height - h) // 2, (width - w) // 2, h, w, img_size, flip=draw.random() < 0.5)


def sample_fixed_crop(height: int, width: int, img_size: Size, draw: random.Random | None = None) -> Crop:
    """Sample a crop of fixed size and a flip (MAE, Table 1e); without `draw`, return the central crop.

    The whole image is first resized to the smallest size that covers img_size / 0.875 (a short side of 256
    for 224).
    """
    cover_height, cover_width = (round(side / CROP_PCT) for side in img_size)
    if cover_height * width > cover_width * height:  # torchvision rounds the long side down
        size = cover_height, int(cover_height * width / height)
    else:
        size = int(cover_width * height / width), cover_width
    spare = size[0] - img_size[0], size[1] - img_size[1]
    if draw is None:
        return Crop(0, 0, height, width, size, (round(spare[0] / 2), round(spare[1] / 2)))
    offset = int((spare[0] + 1) * draw.random()), int((spare[1] + 1) * draw.random())
    return Crop(0, 0, height, width, size, offset, draw.random() < 0.5)


def compute_center_crop(height: int, width: int, img_size: Size, crop_pct: float) -> Crop:
    """Return the resize and central crop of evaluation: the short side becomes img_size / crop_pct.

    For an img_size that is not square, both sides are resized, as in `build_eval_transform`.
    """
    size = round(img_size[0] / crop_pct), round(img_size[1] / crop_pct)
    if img_size[0] == img_size[1]:  # torchvision rounds the long side down
        short = min(height, width)
        size = int(size[0] * height / short), int(size[1] * width / short)
    offset = round((size[0] - img_size[0]) / 2), round((size[1] - img_size[1]) / 2)
    return Crop(0, 0, height, width, size, offset)


def take_box(pixels: np.ndarray, crop: Crop) -> torch.Tensor:
    """Copy the crop's box of (H, W, C) to (1, C, height, width), channels last in memory."""
    rows = pixels.reshape(pixels.shape[0], -1)[crop.top : crop.top + crop.height]
    channels = pixels.shape[2]
    box = np.array(rows[:, crop.left * channels : (crop.left + crop.width) * channels])
    return torch.from_numpy(box).view(1, crop.height, crop.width, channels).permute(0, 3, 1, 2)


def resample(pixels: np.ndarray, crop: Crop, img_size: Size, interpolation: str = "bicubic") -> torch.Tensor:
    """Resample (H, W, C) to (C, *img_size) of the same dtype, channels last in memory, with antialiasing.

    uint8 pixels differ from Pillow's by less than 0.05 of 255 on average.
    """
    box = take_box(pixels, crop)
    imgs = box if box.dtype == torch.uint8 else box.float()
    if crop.vertical_first:
        imgs = _resize(imgs, (crop.size[0], crop.width), interpolation)
    imgs = _cut_window(_resize(imgs, crop.size, interpolation), crop, img_size)
    return _convert(imgs.flip(3) if crop.flip else imgs, box.dtype)[0]


def resample_exact(
    pixels: np.ndarray, crop: Crop, img_size: Size, interpolation: str = "bicubic"
) -> torch.Tensor:
    """Resample with Pillow, bit for bit as torchvision does; images above 8 bits are left to `resample`."""
    if pixels.dtype != np.uint8:
        return resample(pixels, crop, img_size, interpolation)
    if pixels.shape[2] not in (1, 3):
        channels = np.split(pixels, pixels.shape[2], axis=2)
        return torch.cat([resample_exact(channel, crop, img_size, interpolation) for channel in channels])
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if (crop.height, crop.width) != pixels.shape[:2]:
        image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    resized = np.array(image.resize(crop.size[::-1], RESAMPLING[interpolation])).reshape(*crop.size, -1)
    imgs = _cut_window(torch.from_numpy(resized).permute(2, 0, 1)[None], crop, img_size)
    return (imgs.flip(3) if crop.flip else imgs)[0]


def _resize(imgs: torch.Tensor, size: Size, interpolation: str) -> torch.Tensor:
    if imgs.shape[2:] == size:
        return imgs
    return F.interpolate(imgs, size, mode=interpolation, antialias=True, align_corners=False)


def _cut_window(imgs: torch.Tensor, crop: Crop, img_size: Size) -> torch.Tensor:
    top, left = crop.offset
    return imgs[:, :, top : top + img_size[0], left : left + img_size[1]]


def _convert(imgs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert float values to `dtype`; integers are rounded half up, as in Pillow, and clamped."""
    if imgs.dtype == dtype or dtype.is_floating_point:
        return imgs.to(dtype)
    return imgs.add(0.5).floor().clamp(0, torch.iinfo(dtype).max).to(dtype)


def encode_crop(crop: Crop) -> list[int]:
    """Return the numbers that describe the crop to `resample_batch`, for an image cut to the crop's box."""
    return [crop.height, crop.width, *crop.size, *crop.offset, int(crop.flip), int(crop.vertical_first)]


def resample_batch(
    imgs: torch.Tensor, crops: torch.Tensor, img_size: Size, interpolation: str = "bicubic"
) -> torch.Tensor:
    """Resample zero-padded images (N, C, H, W) to (N, C, *img_size) on their device.

    imgs: each image is in the top left corner, with zeros below and to the right of it.
    crops: one row of `encode_crop` per image, (N, 8), on the CPU.

    Two batched matrix products with the weights of Pillow's antialiased filter, in float32 regardless of
    autocast and TF32, rounded where Pillow rounds: almost all pixels equal Pillow's, the rest differ by one.
    There is no synchronisation with the device. Meant for GPUs: on a CPU, products with whole rows of zeros
    take much longer than `resample`.
    """
    numbers = crops.to(imgs.device, non_blocking=True).double()
    height, width, down, across, top, left, flip, vertical_first = numbers.unbind(1)
    taps = [_max_taps(crops[:, axis], crops[:, 2 + axis], interpolation) for axis in (0, 1)]
    rows = _compute_weights(height, down, top, img_size[0], imgs.shape[2], taps[0], interpolation)
    columns = _compute_weights(width, across, left, img_size[1], imgs.shape[3], taps[1], interpolation)
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns).mT[:, None]  # (N, 1, W, w)
    rows = rows[:, None]  # (N, 1, h, H)
    with torch.autocast(imgs.device.type, enabled=False), _FullPrecision(imgs.device):
        values, is_uint8 = imgs.float(), imgs.dtype == torch.uint8
        across_first = rows @ _round(values @ columns, is_uint8)
        if bool(crops[:, 7].any()):
            down_first = _round(rows @ values, is_uint8) @ columns
            across_first = torch.where(vertical_first.bool()[:, None, None, None], down_first, across_first)
    return _convert(across_first, imgs.dtype)


def _round(values: torch.Tensor, is_uint8: bool) -> torch.Tensor:
    """Round to 8 bits in place, as Pillow does between its two passes over an 8-bit image."""
    return values.add_(0.5).floor_().clamp_(0, 255) if is_uint8 else values


class _FullPrecision:
    """Disable TF32, which keeps only 10 bits of the mantissa of a weight."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def __enter__(self) -> None:
        if self._cuda:
            self._before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.backends.cuda.matmul.allow_tf32 = self._before


SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}  # radius of the filters in source pixels, without downsampling


def _max_taps(before: torch.Tensor, after: torch.Tensor, interpolation: str) -> int:
    scale = max(1.0, float((before.double() / after).max()))
    return math.ceil(SUPPORT[interpolation] * scale) * 2 + 1


def _compute_weights(
    before: torch.Tensor,
    after: torch.Tensor,
    offset: torch.Tensor,
    length: int,
    padded: int,
    taps: int,
    interpolation: str,
) -> torch.Tensor:
    """Return the weight of each source pixel in each output pixel, (N, length, padded).

    The outputs are the pixels offset ... offset + length - 1 of `before` pixels resized to `after`, each (N,)
    float64.
    """
    scale = (before / after)[:, None]
    stretch = scale.clamp(min=1)
    centre = (torch.arange(length, device=before.device) + offset[:, None] + 0.5) * scale
    support = SUPPORT[interpolation] * stretch
    first = (centre - support + 0.5).trunc().clamp(min=0)
    last = torch.minimum((centre + support + 0.5).trunc(), before[:, None])
    places = first[..., None] + torch.arange(taps, device=before.device)  # (N, length, taps)
    values = _filter(((places - centre[..., None] + 0.5) / stretch[..., None]).abs(), interpolation)
    values = torch.where(places < last[..., None], values, 0)
    values = (values / values.sum(-1, keepdim=True)).float()
    dense = torch.zeros(len(before), length, padded + taps, device=before.device)
    return dense.scatter_(2, places.long(), values)[..., :padded]


def _filter(x: torch.Tensor, interpolation: str) -> torch.Tensor:
    """Return Pillow's filter at distance x >= 0: the triangle, or the cubic of Keys (1981), a = -0.5."""
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
