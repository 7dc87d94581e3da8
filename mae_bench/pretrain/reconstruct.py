"""Reconstructions drawn as images, the loss on held-out images, and saving an MAE with its decoder.

Legend: N batch, L patches, C channels, H W image.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save

from mae_bench.data.batches.loader import load_evaluation_batches
from mae_bench.data.batches.transforms import PretrainTransform, normalize
from mae_bench.data.seeds import derive_seed
from mae_bench.data.sets.decode import decode_pixels, read_pixels
from mae_bench.data.sets.source import BadImage, BadImages, ImageSource
from mae_bench.engine.distributed import gather_over_ranks, sum_over_ranks, world
from mae_bench.engine.precision import autocast
from mae_bench.errors import UserError
from mae_bench.export import seal_metadata
from mae_bench.files import write_atomic
from mae_bench.models.mae import MAE
from mae_bench.models.masking import sample_noise
from mae_bench.models.tokenizer import Tokenizer
from mae_bench.progress import Progress
from mae_bench.spec import BackboneSpec

MAE_FILE = "mae.safetensors"
EVAL_BATCH = 256  # images per batch, unless device_batch_size is smaller
GREY = 0.5  # brightness of a removed patch


def save_mae(model: MAE, folder: Path) -> None:
    """Save encoder and decoder with the reference's key names.

    Spec and options, from which the model is rebuilt, are stored in the metadata of the file.
    """
    weights = {
        name.removeprefix("encoder."): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "spec": json.dumps(model.spec.to_dict()),
        "decoder": json.dumps(asdict(model.options)),
    }
    write_atomic(
        folder / MAE_FILE, lambda file: file.write(save(weights, metadata=seal_metadata(metadata, weights)))
    )


@torch.no_grad()
def reconstruct(
    model: MAE, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """imgs (N, C, H, W) -> original, masked, reconstructed, each (N, C, H, W) in [0, 1].

    The reconstruction keeps the visible pixels. Normalised predictions are scaled with the mean and
    deviation of the true patch, which the model never saw: the picture shows structure, not brightness.

    Raise UserError if the model's target is not a picture.
    """
    if not model.can_reconstruct:
        raise UserError(
            f"a model that predicts {model.options.target} has no picture to draw",
            expected="a model that predicts pixels or PCA coefficients",
        )
    model.eval()
    device = model.mask_token.device
    inputs = normalize(imgs.to(device), model.spec.mean, model.spec.std)
    original = _to_unit_range(inputs, model.spec, imgs.dtype)
    _, pred, mask = model(inputs, mask_ratio, noise.to(device))
    patches = model.patchify(inputs)
    pred = model.target.to_pixels(pred, patches)
    painted = _to_unit_range(model.unpatchify(pred), model.spec, imgs.dtype)
    removed = model.unpatchify(mask[..., None].expand_as(patches))
    visible = original * (1 - removed)
    return original, visible + GREY * removed, visible + painted * removed


def _to_unit_range(x: torch.Tensor, spec: BackboneSpec, dtype: torch.dtype) -> torch.Tensor:
    """x (N, C, H, W), normalised -> the same in [0, 1].

    8-bit images get their pixels back; of others, two deviations around the mean are shown.
    """
    if dtype != torch.uint8:
        return (x / 4 + 0.5).clamp(0, 1)
    mean, std = (torch.tensor(value, device=x.device).view(1, -1, 1, 1) for value in (spec.mean, spec.std))
    return (x * std + mean).clamp(0, 1)


def draw_reconstructions(model: MAE, imgs: torch.Tensor, mask_ratio: float, out: Path, seed: int = 0) -> None:
    """Write a PNG with one row per image of imgs (N, C, H, W): original, masked, reconstructed.

    Masks only depend on `seed` and the position of the image. Of more than three channels, the first three
    are shown.
    """
    noise = draw_noise(model, range(len(imgs)), mask_ratio, seed)
    columns = reconstruct(model, imgs, mask_ratio, noise)
    shown = slice(3 if model.spec.in_chans >= 3 else 1)
    write_png(out, torch.stack([column[:, shown] for column in columns], dim=1))


def build_centre_crop(spec: BackboneSpec) -> PretrainTransform:
    """Build the transform of images outside training: centre crop with Pillow's pixels."""
    return PretrainTransform(
        spec.img_size, "none", interpolation=spec.interpolation, decode="exact", in_chans=spec.in_chans
    )


def write_png(out: Path, grid: torch.Tensor, gap: int = 4) -> None:
    """Write grid (rows, columns, C, H, W) in [0, 1] with white gaps; images below 96 pixels are enlarged."""
    rows, columns, c, h, w = grid.shape
    scale = max(1, 96 // h)
    canvas = torch.ones(c, rows * (h + gap) - gap, columns * (w + gap) - gap)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (h + gap), column * (w + gap)
            canvas[:, top : top + h, left : left + w] = grid[row, column].cpu()
    pixels = (canvas * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    write_atomic(out, lambda file: image.save(file, format="PNG"))


def reconstruct_files(
    model: MAE, paths: Sequence[str | Path], out: str | Path, mask_ratio: float = 0.75, seed: int = 0
) -> None:
    """Write the reconstructions of image files as a PNG. Raise UserError for an unreadable image."""
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"--out {out}", expected="a file name that ends with .png")
    transform, imgs = build_centre_crop(model.spec), []
    for path in paths:
        try:
            imgs.append(transform(decode_pixels(Path(path).read_bytes(), model.spec.in_chans, fast=False), 0))
        except (OSError, BadImage) as error:
            raise UserError(
                f"{path} cannot be read as an image: {error}",
                expected=f"a JPEG, PNG or other format of Pillow, with {model.spec.in_chans} channels",
            ) from error
    draw_reconstructions(model, torch.stack(imgs), mask_ratio, Path(out), seed)


def read_spread(images: ImageSource, count: int, spec: BackboneSpec) -> torch.Tensor:
    """Return `count` images (N, C, H, W) spread over the set, as transformed by `build_centre_crop`.

    Fewer if the set has fewer; images that cannot be decoded are replaced by the next ones. Raise UserError
    if none can be decoded.
    """
    transform, count = build_centre_crop(spec), min(count, len(images))
    found: list[torch.Tensor] = []
    spread = [i * len(images) // count for i in range(count)]
    for place in dict.fromkeys([*spread, *range(len(images))]):
        if len(found) == count:
            break
        with suppress(BadImage, OSError):
            found.append(transform(read_pixels(images, place, spec.in_chans, fast=False), 0))
    if not found:
        raise UserError("no image can be decoded", expected="images with the number of channels of the model")
    return torch.stack(found)


@torch.no_grad()
def evaluate_loss(
    model: MAE,
    images: ImageSource,
    bad_images: BadImages,
    mask_ratio: float,
    progress: Progress,
    num_workers: int = 0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    *,
    batch_size: int = EVAL_BATCH,
    amp_dtype: str = "float32",
) -> tuple[float, int]:
    """Return the mean loss per image over the whole set, and the number of images.

    Each image is used once with its own fixed mask. The processes of a distributed run share the images.

    tokenizer: provides the targets of a model that predicts tokens.
    """
    model.eval()
    device = model.mask_token.device
    here = world()
    progress.stage("evaluate", len(images))
    total, count = 0.0, 0
    for batch in load_evaluation_batches(
        images, build_centre_crop(model.spec), batch_size, num_workers, here.rank, here.size
    ):
        for name, reason in batch.bad:
            bad_images.add(name, reason)
        if not len(batch.targets):
            continue
        pixels = batch.imgs.to(device)
        targets = tokenizer(pixels, model.spec.grid_size) if tokenizer else None
        noise = draw_noise(model, batch.indices.tolist(), mask_ratio, seed).to(device)
        with autocast(device, amp_dtype):
            loss = model(normalize(pixels, model.spec.mean, model.spec.std), mask_ratio, noise, targets)[0]
        total += loss.item() * len(pixels)
        count += len(pixels)
        progress.step(count * here.size)
    for names in gather_over_ranks(bad_images.names):
        for name, reason in names.items():
            bad_images.add(name, reason)
    total, seen = sum_over_ranks([total, count])
    return total / seen, int(seen)


def draw_noise(model: MAE, indices: Sequence[int], mask_ratio: float, seed: int) -> torch.Tensor:
    """Return the noise of each image's fixed mask (N, L), which only depends on seed and index."""
    sampling, grid_size = model.options.mask_sampling, model.spec.grid_size
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(derive_seed(seed, index, -4))
        rows.append(sample_noise(sampling, 1, grid_size, mask_ratio, generator))
    return torch.cat(rows)
