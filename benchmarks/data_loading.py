"""Image loading on one core from files, packed and raw sets, against torchvision with Pillow."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from torch.utils.data._utils import worker
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from benchmarks.measure import Table, Times, interleave, positive_int, ratio, run_main, write_table
from mae_bench.data.batches.loader import Batch, Images, TrainingOrder, load_training_batches
from mae_bench.data.batches.transforms import PretrainTransform
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.packing import PackOptions, pack_sources
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError

# Test images: size and bytes of ImageNet's mean training image
WIDTH, HEIGHT, QUALITY, NOISE = 500, 375, 97, 2.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, SHORT_SIDE = (224, 224), 256
REFERENCE = "torchvision ImageFolder, Pillow"
# Minimum ratios
TARGETS = {"files, fast": 2.2, "packed q95, fast": 6.0, "packed q90, fast": 6.0, "raw, fast": 9.0}
PROCESSES = (1, 2)  # worker processes of the loader
ROUTES = (
    "Ratio of medians [95 % interval over rounds] to the first row; above 1 is faster. From a file to a "
    "batch: normalised floats in the first row, uint8 in ours, which the device normalises. Packed: short "
    "side 256, JPEG 4:2:0; raw: the same pixels, uncompressed. Loader processes use shared memory."
)
ERRORS = (
    "Against torchvision on Pillow's images from the files. Centre crops of the raw set are the same pixels, "
    "as both have a short side of 256; packed ones show the loss of JPEG. Random crops of these sets have "
    "less detail than those of the files."
)
WORKERS = (
    "The whole loader. The consumer sleeps for twice the loader's time per batch; the wait share is the "
    "share of all time that it then still waits."
)


def make_photos(folder: Path, photos: Path, count: int) -> float:
    """Write `count` JPEGs of 500 x 375 (q97, 4:2:0), cut from photographs with a little noise.

    Return their mean size in bytes. Raise UserError if there are no photographs of that size.
    """
    draw = np.random.default_rng(0)
    wide = [path for path in sorted(photos.rglob("*")) if _is_large_jpeg(path)]
    if not wide:
        raise UserError(
            f"no photographs of {WIDTH} x {HEIGHT} or more in {photos}",
            expected="a folder of JPEG files, such as COCO's val2017 or ImageNet's val",
            fix="--photos FOLDER",
        )
    folder.mkdir(parents=True)
    for number in range(count):
        image = Image.open(wide[number % len(wide)]).convert("RGB")
        scale = max(WIDTH / image.width, HEIGHT / image.height)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(image.crop((0, 0, WIDTH, HEIGHT))) + draw.normal(0, NOISE, (HEIGHT, WIDTH, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:04}.jpg", quality=QUALITY, subsampling="4:2:0")
    return float(np.mean([path.stat().st_size for path in folder.iterdir()]))


def _is_large_jpeg(path: Path) -> bool:
    if path.suffix.lower() not in (".jpg", ".jpeg"):
        return False
    try:
        with Image.open(path) as image:
            return image.width >= WIDTH and image.height >= HEIGHT
    except OSError:
        return False


@dataclass(frozen=True)
class Sets:
    """The same images as files, packed (JPEG quality 95 and 90) and raw, the latter with short side 256."""

    folder: Path
    files: ImageSource
    packed: ImageSource
    packed_90: ImageSource
    raw: ImageSource


def make_sets(folder: Path, photos: Path, count: int) -> tuple[Sets, float]:
    """Write the sets to `folder`; return them and the mean size of a file in bytes."""
    size = make_photos(folder / "files" / "train" / "class0", photos, count)
    files = open_images(folder / "files", "train")
    kinds = {
        "q95": PackOptions(SHORT_SIDE, quality=95),
        "q90": PackOptions(SHORT_SIDE, quality=90),
        "raw": PackOptions(SHORT_SIDE, raw=True),
    }
    for name, how in kinds.items():
        pack_sources({"train": files}, folder / name, how, name="photos")
    return Sets(
        folder / "files" / "train", files, *(open_images(folder / name, "train") for name in kinds)
    ), size


def build_torchvision_batches(folder: Path, batch_size: int) -> Callable[[], object]:
    """Return a function that makes a batch as the reference does: normalised floats, default collate."""
    crop = T.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    steps = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])
    images = ImageFolder(str(folder), steps)
    batches = _index_batches(len(images), batch_size)
    return lambda: default_collate([images[i] for _, i, _ in next(batches)])


def build_our_batches(images: ImageSource, batch_size: int, **options: Any) -> Callable[[], Batch]:
    """Return a function that makes a batch as one process of our loader does."""
    dataset = Images(images, PretrainTransform(SIZE, **options), seed=0, replace_bad=True)
    batches = _index_batches(len(images), batch_size)

    def call() -> Batch:
        batch = dataset.__getitems__(next(batches))
        if not isinstance(batch, Batch):
            raise batch
        return batch

    return call


def _index_batches(count: int, batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    step = 0
    while True:
        yield [((step + i) // count, (step + i) % count, i) for i in range(batch_size)]
        step += batch_size


def measure_pixel_errors(sets: Sets) -> list[list[object]]:
    """Return mean absolute error (of 255) and PSNR of each route's 224-pixel crops against Pillow's."""
    rows: list[list[object]] = []
    pairs: dict[str, tuple[str, str, ImageSource]] = {
        "random crops, fast, from the files": ("resized_crop", "fast", sets.files)
    }
    for name, images in {"packed q95": sets.packed, "packed q90": sets.packed_90, "raw": sets.raw}.items():
        pairs[f"centre crops, fast, from the {name} set"] = ("none", "fast", images)
        pairs[f"centre crops, exact, from the {name} set"] = ("none", "exact", images)
    for name, (augment, decode, images) in pairs.items():
        reference = build_our_batches(sets.files, len(images), augment=augment, decode="exact")()
        found = build_our_batches(images, len(images), augment=augment, decode=decode)()
        error = (found.imgs.float() - reference.imgs.float()).abs()
        rows.append(
            [
                name,
                f"{error.mean():.4f}",
                f"{10 * torch.log10(255**2 / error.square().mean()):.1f}",
                int(error.max()),
            ]
        )
    return rows


def measure_workers(
    images: ImageSource, num_workers: int, batch_size: int, steps: int
) -> tuple[float, float]:
    """Return images per second of the whole loader, and the wait share of a consumer of half that speed."""
    order = TrainingOrder(len(images), batch_size, seed=0)
    batches = load_training_batches(images, PretrainTransform(SIZE), order, 0, 4 + 3 * steps, num_workers)
    for _ in range(4):  # start the processes
        next(batches)
    began = time.perf_counter()
    for _ in range(2 * steps):
        next(batches)
    each = (time.perf_counter() - began) / (2 * steps)
    waited = 0.0
    for _ in range(steps):
        time.sleep(2 * each)  # the consumer computes
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
    return batch_size / each, waited / (waited + 2 * each * steps)


@contextmanager
def imitate_worker() -> Iterator[None]:
    """Make batches in shared memory, as in a process of the loader."""
    before = worker._worker_info
    worker._worker_info = worker.WorkerInfo(id=0, num_workers=1, seed=0, dataset=Dataset())
    try:
        yield
    finally:
        worker._worker_info = before


def build_routes(sets: Sets, batch_size: int) -> dict[str, Callable[[], object]]:
    """Return a function per route that makes one batch."""
    return {
        REFERENCE: build_torchvision_batches(sets.folder, batch_size),
        "files, exact": build_our_batches(sets.files, batch_size, decode="exact"),
        "files, fast": build_our_batches(sets.files, batch_size),
        "packed q95, fast": build_our_batches(sets.packed, batch_size),
        "packed q90, fast": build_our_batches(sets.packed_90, batch_size),
        "raw, fast": build_our_batches(sets.raw, batch_size),
        "files, fast, crop on the device": build_our_batches(sets.files, batch_size, crop_on="device"),
    }


def format_routes(samples: dict[str, Times], batch_size: int) -> list[list[object]]:
    """Return a table row per route, compared with the reference."""
    base = samples[REFERENCE]
    return [
        [
            name,
            ratio(base.cpu, times.cpu),
            ratio(base.wall, times.wall),
            TARGETS.get(name, ""),
            f"{batch_size / float(np.median(times.cpu)):.0f}",
        ]
        for name, times in samples.items()
    ]


def measure_loaders(sets: Sets, batch_size: int, steps: int) -> list[list[object]]:
    """Return a table row of throughput and wait share per set and number of processes."""
    rows: list[list[object]] = []
    for name, images in {"files": sets.files, "packed q95": sets.packed, "raw": sets.raw}.items():
        for num_workers in PROCESSES:
            found, share = measure_workers(images, num_workers, batch_size, steps)
            rows.append([name, num_workers, f"{found:.0f}", f"{100 * share:.1f} %"])
    return rows


def main() -> None:
    """Make the sets in a temporary folder, measure, and write the tables."""
    args = _parse_arguments()
    if args.photos is None:
        raise UserError(
            "--photos is missing",
            expected=f"a folder of JPEG photographs of at least {WIDTH} x {HEIGHT}, such as COCO's val2017",
            fix="python -m benchmarks.data_loading --photos FOLDER",
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MAE_BENCH_CACHE"] = f"{folder}/cache"
        sets, size = make_sets(Path(folder), args.photos, args.images)
        routes = build_routes(sets, args.batch_size)
        samples = {"One core": interleave(routes, args.repeats, warmup=2)}
        with imitate_worker():
            samples["One core, batches in shared memory"] = interleave(routes, args.repeats, warmup=2)
        errors, workers = measure_pixel_errors(sets), measure_loaders(sets, args.batch_size, args.repeats)
    about = f"{args.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1000:.0f} KB each; "
    about += f"batches of {args.batch_size}, 224 pixels."
    header = ["route", "ratio, CPU time", "ratio, wall time", "target", "images per CPU second"]
    found = [
        Table(name, header, format_routes(times, args.batch_size), f"{about} {ROUTES}")
        for name, times in samples.items()
    ]
    found += [
        Table("Pixels", ["what", "mean absolute error, of 255", "PSNR, dB", "largest"], errors, ERRORS),
        Table("Loader", ["set", "processes", "images per second", "wait share"], workers, WORKERS),
    ]
    write_table("Data loading", found, samples, args.out)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--photos",
        type=Path,
        help=f"folder of JPEG photographs of at least {WIDTH} x {HEIGHT}, such as COCO's val2017 (required)",
    )
    parser.add_argument("--images", type=positive_int, default=256, help="number of test images")
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--repeats", type=positive_int, default=30, help="timed rounds of all routes")
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
