"""Loading of ImageNet-like images on one core, ours from files, packed and raw sets against torchvision and Pillow, in turns."""

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

from benchmarks.measure import Table, Times, interleave, ratio, write_table
from mae_bench.data.batches.loader import Batch, Images, TrainingOrder, load_training_batches
from mae_bench.data.batches.transforms import PretrainTransform
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.packed import PackOptions, pack_sources
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError

PHOTOS = Path(__file__).parent.parent.parent / "shared" / "data" / "coco_small"
WIDTH, HEIGHT, QUALITY, NOISE = (
    500,
    375,
    97,
    2.0,
)  # of the test images: the size and the bytes of ImageNet's mean training image
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, SHORT_SIDE = (224, 224), 256
REFERENCE = "torchvision ImageFolder, Pillow"
TARGETS = {
    "files, fast": 2.2,
    "packed q95, fast": 6.0,
    "packed q90, fast": 6.0,
    "raw, fast": 9.0,
}  # least ratios
PROCESSES = (1, 2)  # of the whole loader
ROUTES = (
    "Ratio of medians [95 % interval over rounds] to the first row; above 1 is faster. From a file to a batch: the first row's "
    "of normalised floats, ours of uint8, which the device normalises. Packed: short side 256, JPEG 4:2:0; raw: the same pixels, "
    "uncompressed. In shared memory is how a loader's process hands batches over."
)
ERRORS = (
    "Against torchvision on Pillow's images from the files. Centre crops of the raw set are the same pixels, as both are of a "
    "short side of 256; packed ones show what JPEG costs. Random crops of these sets have less detail than those of the files."
)
WORKERS = (
    "The whole loader; the consumer sleeps twice the time that the loader takes for a batch, and the share of all time that it "
    "then still waits is the wait share."
)


def make_photos(folder: Path, photos: Path, count: int) -> float:
    """`count` JPEGs of 500 x 375 (q97, 4:2:0) cut from photographs, with a little noise; their mean size in bytes."""
    draw, found = np.random.default_rng(0), sorted(photos.rglob("*.jpg"))
    wide = [path for path in found if (size := Image.open(path).size)[0] >= WIDTH and size[1] >= HEIGHT]
    if not wide:
        raise UserError(f"no photographs of {WIDTH} x {HEIGHT} or more below {photos}", fix="--photos FOLDER")
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


@dataclass(frozen=True)
class Sets:
    """The same images as files, packed (short side 256, JPEG of quality 95 and 90) and raw (short side 256)."""

    folder: Path
    files: ImageSource
    packed: ImageSource
    packed_90: ImageSource
    raw: ImageSource


def make_sets(folder: Path, photos: Path, count: int) -> tuple[Sets, float]:
    """The sets in `folder`, and the mean bytes of a file."""
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


def torchvision_batches(folder: Path, batch_size: int) -> Callable[[], object]:
    """What the reference does: a file to normalised floats, then the default collate."""
    crop = T.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    steps = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])
    images = ImageFolder(str(folder), steps)
    turn = _turns(len(images), batch_size)
    return lambda: default_collate([images[i] for _, i, _ in next(turn)])


def our_batches(images: ImageSource, batch_size: int, **options: Any) -> Callable[[], Batch]:
    """What one of our loader's processes does for a batch."""
    dataset = Images(images, PretrainTransform(SIZE, **options), seed=0, replace_bad=True)
    turn = _turns(len(images), batch_size)

    def call() -> Batch:
        batch = dataset.__getitems__(next(turn))
        if not isinstance(batch, Batch):
            raise batch
        return batch

    return call


def _turns(count: int, batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    step = 0
    while True:
        yield [((step + i) // count, (step + i) % count, i) for i in range(batch_size)]
        step += batch_size


def pixel_errors(sets: Sets) -> list[list[object]]:
    """Mean absolute error (of 255) and PSNR of each route's 224-pixel crops against Pillow's from the files."""
    rows: list[list[object]] = []
    pairs: dict[str, tuple[str, str, ImageSource]] = {
        "random crops, fast, from the files": ("resized_crop", "fast", sets.files)
    }
    for name, images in {"packed q95": sets.packed, "packed q90": sets.packed_90, "raw": sets.raw}.items():
        pairs[f"centre crops, fast, from the {name} set"] = ("none", "fast", images)
        pairs[f"centre crops, exact, from the {name} set"] = ("none", "exact", images)
    for name, (augment, decode, images) in pairs.items():
        reference = our_batches(sets.files, len(images), augment=augment, decode="exact")()
        found = our_batches(images, len(images), augment=augment, decode=decode)()
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


def with_workers(images: ImageSource, num_workers: int, batch_size: int, steps: int) -> tuple[float, float]:
    """Images a second of the whole loader, and the share of its time that a consumer of half that speed waits."""
    order = TrainingOrder(len(images), batch_size, seed=0)
    batches = load_training_batches(images, PretrainTransform(SIZE), order, 0, 4 + 3 * steps, num_workers)
    for _ in range(4):  # the processes start
        next(batches)
    began = time.perf_counter()
    for _ in range(2 * steps):
        next(batches)
    each = (time.perf_counter() - began) / (2 * steps)
    waited = 0.0
    for _ in range(steps):
        time.sleep(2 * each)  # the consumer computes elsewhere
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
    return batch_size / each, waited / (waited + 2 * each * steps)


@contextmanager
def like_a_worker() -> Iterator[None]:
    """Batches are made in shared memory, as in a loader's process."""
    before = worker._worker_info
    worker._worker_info = worker.WorkerInfo(id=0, num_workers=1, seed=0, dataset=Dataset())
    try:
        yield
    finally:
        worker._worker_info = before


def routes_of(sets: Sets, batch_size: int) -> dict[str, Callable[[], object]]:
    """A batch of each route."""
    return {
        REFERENCE: torchvision_batches(sets.folder, batch_size),
        "files, exact": our_batches(sets.files, batch_size, decode="exact"),
        "files, fast": our_batches(sets.files, batch_size),
        "packed q95, fast": our_batches(sets.packed, batch_size),
        "packed q90, fast": our_batches(sets.packed_90, batch_size),
        "raw, fast": our_batches(sets.raw, batch_size),
        "files, fast, crop on the device": our_batches(sets.files, batch_size, crop_on="device"),
    }


def route_rows(samples: dict[str, Times], batch_size: int) -> list[list[object]]:
    """Each route against the reference."""
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


def worker_rows(sets: Sets, batch_size: int, steps: int) -> list[list[object]]:
    """Throughput and waiting of the whole loader."""
    rows: list[list[object]] = []
    for name, images in {"files": sets.files, "packed q95": sets.packed, "raw": sets.raw}.items():
        for num_workers in PROCESSES:
            found, share = with_workers(images, num_workers, batch_size, steps)
            rows.append([name, num_workers, f"{found:.0f}", f"{100 * share:.1f} %"])
    return rows


def main() -> None:
    """Makes the sets in a temporary folder, measures, and writes the tables."""
    args = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MAE_BENCH_CACHE"] = f"{folder}/cache"
        sets, size = make_sets(Path(folder), args.photos, args.images)
        routes = routes_of(sets, args.batch_size)
        samples = {"One core": interleave(routes, args.repeats, warmup=2)}
        with like_a_worker():
            samples["One core, batches in shared memory"] = interleave(routes, args.repeats, warmup=2)
        errors, workers = pixel_errors(sets), worker_rows(sets, args.batch_size, args.repeats)
    about = f"{args.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1000:.0f} KB each; batches of {args.batch_size}, 224 pixels."
    header = ["route", "ratio, CPU time", "ratio, wall time", "target", "images a CPU second"]
    found = [
        Table(name, header, route_rows(times, args.batch_size), f"{about} {ROUTES}")
        for name, times in samples.items()
    ]
    found += [
        Table("Pixels", ["what", "mean absolute error, of 255", "PSNR, dB", "largest"], errors, ERRORS),
        Table("Loader", ["set", "processes", "images a second", "wait share"], workers, WORKERS),
    ]
    write_table("Data loading", found, samples, args.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--photos", type=Path, default=PHOTOS, help=f"a folder of JPEGs of {WIDTH} x {HEIGHT} or more"
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds of all routes")
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
