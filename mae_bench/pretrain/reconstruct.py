"""Pictures of what an MAE reconstructs, its loss on held-out images, and the file that holds it with its decoder."""

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
from mae_bench.files import write_atomic
from mae_bench.models.mae import MAE
from mae_bench.models.masking import sample_noise
from mae_bench.models.tokenizer import Tokenizer
from mae_bench.progress import Progress
from mae_bench.spec import BackboneSpec

MAE_FILE = "mae.safetensors"
EVAL_BATCH = 256  # images at once, unless fewer fit
GREY = 0.5  # of a removed patch


def save_mae(model: MAE, folder: Path) -> None:
    """Writes encoder and decoder with the reference's key names; what else is needed to rebuild it stands in the file's
    metadata."""
    weights = {
        name.removeprefix("encoder."): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "spec": json.dumps(model.spec.to_dict()),
        "decoder": json.dumps(asdict(model.options)),
    }
    write_atomic(folder / MAE_FILE, lambda file: file.write(save(weights, metadata=metadata)))


@torch.no_grad()
def reconstruct(
    model: MAE, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """imgs (N, C, H, W) -> original, masked, reconstructed, each (N, C, H, W) in [0, 1].

    The reconstruction shows the image's own pixels where they were visible. Normalised predictions are given the removed
    patch's own mean and deviation back, which the model never saw: the picture shows structure, not brightness.
    """
    if not model.can_reconstruct:
        raise UserError(
            f"a model that predicts {model.options.target} has no picture to draw",
            expected="one that predicts pixels or pca",
        )
    model.eval()
    device = model.mask_token.device
    inputs = normalize(imgs.to(device), model.spec.mean, model.spec.std)
    shown = _visible(inputs, model.spec, imgs.dtype)
    _, pred, mask = model(inputs, mask_ratio, noise.to(device))
    patches = model.patchify(inputs)
    pred = model.target.to_pixels(pred, patches)
    painted = _visible(model.unpatchify(pred), model.spec, imgs.dtype)
    removed = model.unpatchify(mask[..., None].expand_as(patches))
    return shown, shown * (1 - removed) + GREY * removed, shown * (1 - removed) + painted * removed


def _visible(x: torch.Tensor, spec: BackboneSpec, dtype: torch.dtype) -> torch.Tensor:
    """Normalised x (N, C, H, W) in [0, 1]: the pixels of 8-bit images, two deviations about the mean of any other."""
    if dtype != torch.uint8:
        return (x / 4 + 0.5).clamp(0, 1)
    mean, std = (torch.tensor(value, device=x.device).view(1, -1, 1, 1) for value in (spec.mean, spec.std))
    return (x * std + mean).clamp(0, 1)


def draw_reconstructions(model: MAE, imgs: torch.Tensor, mask_ratio: float, out: Path, seed: int = 0) -> None:
    """A PNG with one row for each of imgs (N, C, H, W): original, masked, reconstructed.

    The masks depend on `seed` and the image's place alone. Of more than three channels the first three are shown.
    """
    columns = reconstruct(model, imgs, mask_ratio, _noise(model, range(len(imgs)), mask_ratio, seed))
    shown = slice(3 if model.spec.in_chans >= 3 else 1)
    write_png(out, torch.stack([column[:, shown] for column in columns], dim=1))


def centre_crop(spec: BackboneSpec) -> PretrainTransform:
    """How images are shown to a model outside of training: the centre, by Pillow's pixels."""
    return PretrainTransform(
        spec.img_size, "none", interpolation=spec.interpolation, decode="exact", in_chans=spec.in_chans
    )


def write_png(out: Path, grid: torch.Tensor, gap: int = 4) -> None:
    """grid (rows, columns, C, H, W) in [0, 1], drawn with white gaps; images under 96 pixels are enlarged without smoothing."""
    rows, columns, c, h, w = grid.shape
    scale = max(1, 96 // h)
    canvas = torch.ones(c, rows * (h + gap) - gap, columns * (w + gap) - gap)
    for row in range(rows):
        for column in range(columns):
            canvas[:, row * (h + gap) : row * (h + gap) + h, column * (w + gap) : column * (w + gap) + w] = (
                grid[row, column].cpu()
            )
    pixels = (canvas * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    write_atomic(out, lambda file: image.save(file, format="PNG"))


def reconstruct_files(
    model: MAE, paths: Sequence[str | Path], out: str | Path, mask_ratio: float = 0.75, seed: int = 0
) -> None:
    """Draws the reconstructions of image files; an unreadable image raises UserError."""
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"--out {out}", expected="a name that ends with .png: the picture is a PNG")
    transform, imgs = centre_crop(model.spec), []
    for path in paths:
        try:
            imgs.append(transform(decode_pixels(Path(path).read_bytes(), model.spec.in_chans, fast=False), 0))
        except (OSError, BadImage) as error:
            raise UserError(
                f"{path} is not an image that can be read: {error}",
                expected=f"JPEG, PNG or another format that Pillow reads, for a model of {model.spec.in_chans} channels",
            ) from error
    draw_reconstructions(model, torch.stack(imgs), mask_ratio, Path(out), seed)


def first_readable(images: ImageSource, count: int, spec: BackboneSpec) -> torch.Tensor:
    """(N, C, H, W): `count` images spread over the set (fewer if it has fewer), as `centre_crop` shows them; the next ones that
    decode take the places of those that do not."""
    transform, count = centre_crop(spec), min(count, len(images))
    found: list[torch.Tensor] = []
    spread = [i * len(images) // count for i in range(count)]
    for place in dict.fromkeys([*spread, *range(len(images))]):
        if len(found) == count:
            break
        with suppress(BadImage, OSError):
            found.append(transform(read_pixels(images, place, spec.in_chans, fast=False), 0))
    if not found:
        raise UserError(
            "no image can be drawn: none decodes", expected="images that decode and have the model's channels"
        )
    return torch.stack(found)


@torch.no_grad()
def evaluation_loss(
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
    """Mean loss an image over the whole set, each image once under its own fixed mask, and the number of images.

    The processes of a distributed run share the images. tokenizer: gives the targets of a model that predicts tokens.
    """
    model.eval()
    device = model.mask_token.device
    here = world()
    progress.stage("evaluate", len(images))
    total, count = 0.0, 0
    for batch in load_evaluation_batches(
        images, centre_crop(model.spec), batch_size, num_workers, here.rank, here.size
    ):
        for name, reason in batch.bad:
            bad_images.add(name, reason)
        if not len(batch.targets):
            continue
        pixels = batch.imgs.to(device)
        targets = tokenizer(pixels, model.spec.grid_size) if tokenizer else None
        noise = _noise(model, batch.indices.tolist(), mask_ratio, seed).to(device)
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


def _noise(model: MAE, indices: Sequence[int], mask_ratio: float, seed: int) -> torch.Tensor:
    """(N, L), a row an image index."""
    generators = (torch.Generator().manual_seed(derive_seed(seed, index, -4)) for index in indices)
    return torch.cat(
        [
            sample_noise(model.options.mask_sampling, 1, model.spec.grid_size, mask_ratio, g)
            for g in generators
        ]
    )
