"""Resampling of single images and batches agrees with Pillow; positions of sampled crops."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from mae_bench.data.batches.crops import (
    Crop,
    encode_crop,
    resample,
    resample_batch,
    resample_exact,
    sample_fixed_crop,
    sample_resized_crop,
    take_box,
)

MODES = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RIGHT = (0.2, 1.0)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return noise of many scales, with clipped highlights and shadows."""
    draw, total = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for scale in (1, 2, 4, 8, 16, 32):
        small = (draw.normal(size=(3, height // scale + 2, width // scale + 2)) * scale**0.7).astype(
            np.float32
        )
        resized = [
            np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in small
        ]
        total += np.stack(resized, axis=2)
    return np.clip(128 + 22 * total, 0, 255).astype(np.uint8)


def boxes(height: int, width: int, img_size: tuple[int, int], count: int, seed: int = 0) -> list[Crop]:
    """Return boxes of all shapes and sizes, from a few pixels to the size of the output."""
    draw, found = random.Random(seed), []
    for number in range(count):
        h, w = draw.randint(3, height), draw.randint(3, width)
        if number % 5 == 0:
            h = min(height, img_size[0])
        if number % 7 == 0:
            w = min(width, img_size[1])
        found.append(
            Crop(
                draw.randint(0, height - h), draw.randint(0, width - w), h, w, img_size, flip=number % 2 == 1
            )
        )
    return found


def pillow(pixels: np.ndarray, crop: Crop, mode: str = "bicubic") -> np.ndarray:
    """Return the box resized by Pillow and flipped, (h, w, C)."""
    image = Image.fromarray(pixels).crop(
        (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    )
    resized = np.asarray(image.resize(crop.size[::-1], MODES[mode])).astype(int)
    return resized[:, ::-1] if crop.flip else resized


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("img_size", [(224, 224), (64, 64), (48, 96), (448, 320)])
def test_fast_is_within_a_twentieth_of_pillow(img_size: tuple[int, int], mode: str) -> None:
    errors = []
    for number, (height, width) in enumerate([(375, 500), (500, 333), (64, 64), (120, 700)]):
        pixels = photo(height, width, number)
        for crop in boxes(height, width, img_size, 12, number):
            found = resample(pixels, crop, img_size, mode).permute(1, 2, 0).numpy()
            errors.append(np.abs(found - pillow(pixels, crop, mode)).mean())
            exact = resample_exact(pixels, crop, img_size, mode).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(exact, pillow(pixels, crop, mode))
    assert np.mean(errors) < 0.02, "0.05 is the promise"
    assert max(errors) < 0.05, "of the worst box too"


def padded(imgs: list[torch.Tensor]) -> torch.Tensor:
    height, width = (max(img.shape[axis] for img in imgs) for axis in (1, 2))
    out = torch.zeros(len(imgs), imgs[0].shape[0], height, width, dtype=imgs[0].dtype)
    for place, img in enumerate(imgs):
        out[place, :, : img.shape[1], : img.shape[2]] = img
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("img_size", [(224, 224), (40, 72)])
def test_a_batch_on_the_device_equals_pillow(img_size: tuple[int, int], mode: str) -> None:
    pixels = photo(300, 410)
    crops = boxes(300, 410, img_size, 16)
    imgs = padded([take_box(pixels, crop)[0] for crop in crops])
    with torch.autocast("cpu", torch.bfloat16):
        found = resample_batch(imgs, torch.tensor([encode_crop(crop) for crop in crops]), img_size, mode)
    assert found.dtype == torch.uint8
    assert found.shape == (16, 3, *img_size)
    for img, crop in zip(found, crops, strict=True):
        error = np.abs(img.permute(1, 2, 0).numpy() - pillow(pixels, crop, mode))
        assert error.max() <= 1
        assert error.mean() < 0.02
    assert (
        len({crop.vertical_first for crop in crops}) == 2 or not Crop(0, 0, 300, 10, (10, 10)).vertical_first
    )


def test_a_batch_of_windows_equals_each_alone() -> None:
    pixels, img_size = photo(150, 200), (56, 40)
    crops = [sample_fixed_crop(150, 200, img_size, random.Random(seed)) for seed in range(6)]
    found = resample_batch(
        padded([take_box(pixels, crop)[0] for crop in crops]),
        torch.tensor([*map(encode_crop, crops)]),
        img_size,
    )
    for img, crop in zip(found, crops, strict=True):
        error = (img.int() - resample_exact(pixels, crop, img_size).int()).abs()
        assert error.max() <= 1
        assert error.float().mean() < 0.005


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_deep_images_keep_their_dtype_and_agree_on_both_routes(dtype: str) -> None:
    deep = (photo(60, 90).astype(np.float32) * 200).astype(dtype)[..., [0, 1, 2, 0, 1]]
    crop = Crop(5, 10, 50, 70, (32, 32), flip=True)
    alone = resample(deep, crop, (32, 32))
    batch = resample_batch(take_box(deep, crop), torch.tensor([encode_crop(crop)]), (32, 32))[0]
    assert str(alone.dtype) == str(batch.dtype) == f"torch.{dtype}"
    assert alone.shape == (5, 32, 32)
    torch.testing.assert_close(
        alone.float(), batch.float(), rtol=1e-5, atol=1.001 if dtype == "uint16" else 0.05
    )


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_any_number_of_channels_is_resampled_alike(channels: int) -> None:
    pixels = photo(70, 90)[..., [0, 1, 2, 2, 1, 0][:channels]]
    crop = Crop(3, 4, 60, 80, (32, 24))
    fast, exact = resample(pixels, crop, (32, 24)), resample_exact(pixels, crop, (32, 24))
    assert fast.shape == exact.shape == (channels, 32, 24)
    assert (fast.int() - exact.int()).abs().float().mean() < 0.05


def statistics(crops: list[tuple[int, int, int, int]], height: int, width: int) -> np.ndarray:
    top, left, h, w = np.array(crops, float).T
    values = np.stack(
        [
            h * w / (height * width),
            np.log(w / h),
            top / np.maximum(1, height - h),
            left / np.maximum(1, width - w),
        ]
    )
    return np.concatenate([values.mean(1), np.quantile(values, (0.05, 0.25, 0.75, 0.95), axis=1).ravel()])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (40, 400), (400, 40)])
def test_boxes_fall_as_torchvisions(height: int, width: int) -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, [*RIGHT], [3 / 4, 4 / 3]) for _ in range(3000)]
    draws = [
        sample_resized_crop(height, width, (224, 224), RIGHT, random.Random(seed)) for seed in range(3000)
    ]
    ours = [(crop.top, crop.left, crop.height, crop.width) for crop in draws]
    np.testing.assert_allclose(statistics(ours, height, width), statistics(theirs, height, width), atol=0.05)
    assert 0.45 < np.mean([crop.flip for crop in draws]) < 0.55


def test_a_strip_gives_its_centre() -> None:
    crop = sample_resized_crop(20, 1000, (224, 224), (0.9, 1.0), random.Random(0))
    assert (crop.top, crop.left, crop.height, crop.width) == (0, 486, 20, 27)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (100, 100), (30, 90)])
def test_the_fixed_size_crop_is_of_the_resized_image(height: int, width: int) -> None:
    pixels = photo(height, width)
    crop = sample_fixed_crop(height, width, (224, 224), random.Random(3))
    resized = tv.resize(Image.fromarray(pixels), 256, tv.InterpolationMode.BICUBIC)
    want = tv.crop(resized, *crop.offset, 224, 224)
    want = tv.hflip(want) if crop.flip else want
    np.testing.assert_array_equal(
        resample_exact(pixels, crop, (224, 224)).permute(1, 2, 0).numpy(), np.asarray(want)
    )


@pytest.mark.parametrize("img_size", [(224, 224), (64, 128), (128, 64)])
def test_fixed_size_crops_stay_inside_and_reach_the_edges(img_size: tuple[int, int]) -> None:
    for height, width in [(375, 500), (500, 333), (9, 1000)]:
        crops = [sample_fixed_crop(height, width, img_size, random.Random(seed)) for seed in range(800)]
        for axis in (0, 1):
            offsets, spare = [crop.offset[axis] for crop in crops], crops[0].size[axis] - img_size[axis]
            assert min(offsets) == 0 or spare > 400
            assert max(offsets) == spare or spare > 400
            assert max(offsets) <= spare
