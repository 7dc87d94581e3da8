"""Transforms of pretraining: parity with torchvision, seeds, colours, channels and normalisation."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as tv

from mae_bench.data.batches.crops import resample_batch, sample_resized_crop
from mae_bench.data.batches.transforms import (
    PretrainTransform,
    build_eval_transform,
    jitter_colors,
    normalize,
)
from mae_bench.data.sets.decode import Jpeg, decode_pixels
from mae_bench.errors import UserError
from tests.parity import assert_within_rounding


def photo(height: int = 150, width: int = 200, channels: int = 3) -> np.ndarray:
    """Return smooth colours with noise."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(rows / (7 + c)) * np.cos(columns / (9 + c)) for c in range(channels)]
    return np.clip(np.stack(waves, 2) + draw.normal(0, 12, (height, width, channels)), 0, 255).astype(
        np.uint8
    )


@pytest.mark.parametrize("seed", range(8))
def test_exact_is_torchvisions_resized_crop(seed: int) -> None:
    pixels = photo()
    crop = sample_resized_crop(150, 200, (64, 64), (0.2, 1.0), random.Random(seed))
    box = crop.top, crop.left, crop.height, crop.width
    want = tv.resized_crop(Image.fromarray(pixels), *box, [64, 64], T.InterpolationMode.BICUBIC)
    want = tv.pil_to_tensor(tv.hflip(want) if crop.flip else want)
    assert torch.equal(PretrainTransform((64, 64), decode="exact")(pixels, seed), want)
    fast = PretrainTransform((64, 64))(pixels, seed)
    assert (fast.int() - want.int()).abs().float().mean() < 0.05


def test_no_augmentation_is_the_evaluations_centre_crop() -> None:
    for shape in ((150, 200), (200, 150), (77, 123)):
        pixels = photo(*shape)
        found = PretrainTransform((56, 56), "none", decode="exact")(pixels, 1)
        assert torch.equal(found, build_eval_transform((56, 56))(Image.fromarray(pixels)))


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_a_seed_gives_one_crop_and_flip(augment: str) -> None:
    transform, pixels = PretrainTransform((64, 48), augment), photo()  # type: ignore[arg-type]
    torch.manual_seed(3)
    first = transform(pixels, 5)
    assert first.shape == (3, 64, 48)
    torch.manual_seed(4)
    assert torch.equal(transform(pixels, 5), first)
    assert not torch.equal(transform(pixels, 6), first)


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index,union-attr]
    PretrainTransform((32, 32), color_jitter=0.4)(photo(), 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("augment", ["none", "crop", "resized_crop"])
def test_a_file_gives_what_its_pixels_give(augment: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo()).save(buffer, format="JPEG", quality=97)
    data, transform = buffer.getvalue(), PretrainTransform((48, 48), augment)  # type: ignore[arg-type]
    place = data.index(b"\xff\xc0") + 5
    for seed in range(12):
        jpeg = Jpeg(data, 3, (150, 200), place)
        assert torch.equal(transform(jpeg, seed), transform(decode_pixels(data), seed))


@pytest.mark.parametrize("augment", ["none", "crop", "resized_crop"])
def test_what_is_left_to_the_device_ends_alike(augment: str) -> None:
    transform, pixels = PretrainTransform((40, 56), augment, crop_on="device"), photo()  # type: ignore[arg-type]
    for seed in range(6):
        img, numbers = transform.defer(pixels, seed)
        found = resample_batch(img[None], torch.tensor([numbers]), (40, 56))[0].int()
        want = PretrainTransform((40, 56), augment, decode="exact")(pixels, seed).int()  # type: ignore[arg-type]
        assert (found - want).abs().max() <= 1
        assert (found - want).abs().float().mean() < 0.02


def test_a_huge_image_is_resampled_before_it_travels() -> None:
    transform, pixels = PretrainTransform((32, 32), crop_scale=(0.9, 1.0), crop_on="device"), photo(900, 1000)
    img, numbers = transform.defer(pixels, 1)
    assert img.shape == (3, 32, 32)
    assert torch.equal(resample_batch(img[None], torch.tensor([numbers]), (32, 32))[0], transform(pixels, 1))


def test_jitter_stays_within_its_strength() -> None:
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    values = [jitter_colors(grey, 0.4, random.Random(seed)).float().mean().item() for seed in range(300)]
    assert 58 <= min(values) < 66, "brightness falls by 40 % at most"
    assert 134 < max(values) <= 142
    assert abs(np.mean(values) - 100) < 5
    colours = torch.tensor([200, 60, 60], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    found = {tuple(jitter_colors(colours, 0.4, random.Random(seed))[:, 0, 0].tolist()) for seed in range(50)}
    assert len(found) > 45
    assert torch.equal(jitter_colors(colours, 0.0, random.Random(0)), colours)


def test_jitter_of_grey_keeps_one_channel() -> None:
    transform = PretrainTransform((16, 16), color_jitter=0.4, in_chans=1)
    assert transform(photo(channels=1), 1).shape == (1, 16, 16)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match="5 channels"):
        PretrainTransform((32, 32), color_jitter=0.4, in_chans=5)
    with pytest.raises(UserError, match="crop_on=device"):
        PretrainTransform((32, 32), color_jitter=0.4, crop_on="device")
    with pytest.raises(UserError, match="lanczos"):
        PretrainTransform((32, 32), interpolation="lanczos")
    with pytest.raises(UserError, match="float32"):
        PretrainTransform((16, 16), color_jitter=0.4, in_chans=1)(photo(channels=1).astype(np.float32), 1)


def test_normalize_equals_the_formula() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    imgs = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    want = (imgs.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(
        std
    ).double().view(3, 1, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = normalize(imgs.contiguous(memory_format=layout), mean, std)
        assert_within_rounding(found, want, roundings=8)  # a product, a difference and a quotient
        assert found.is_contiguous(memory_format=layout)


def test_deep_images_are_normalised_in_their_own_unit() -> None:
    imgs = torch.tensor([0, 3000], dtype=torch.uint16).view(1, 2, 1, 1)
    found = normalize(imgs, (1000.0, 1000.0), (500.0, 1000.0)).flatten()
    assert_within_rounding(found, torch.tensor([-2.0, 2.0]), roundings=8)


def test_constants_made_in_inference_mode_serve_training() -> None:
    imgs = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    with torch.inference_mode():
        normalize(imgs, (0.123,), (0.456,))
    weight = torch.ones(1, requires_grad=True)
    (weight * normalize(imgs, (0.123,), (0.456,))).sum().backward()
    assert weight.grad is not None
