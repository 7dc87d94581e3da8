"""Batches of images whose order and augmentation depend on (seed, epoch, index) alone, however many processes read them."""

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from mae_bench.data.batches.transforms import PretrainTransform
from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.data.sets.decode import read_pixels
from mae_bench.data.sets.source import BadImage, ImageSource, decode
from mae_bench.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor] | PretrainTransform
Item = tuple[
    int, int, int
]  # epoch, which seeds the augmentation; index in the image set; place in the step's global batch
View = tuple[
    torch.Tensor, list[int] | None
]  # an input (C, H, W); or what a crop on the device begins with, and its numbers

OUTLIVES = 45  # seconds that a loader process lives on when it is asked to end: longer than its main process has to save
MOST_BAD_IN_A_ROW = 100  # a set that begins like this is another kind of set


@dataclass
class Batch:
    """imgs (N, C, H, W), uint8 unless the set is deeper; targets (N,) int64, indices (N,) in the image set.

    bad: what did not decode, with the reason. start: the place of the first image in the step's global batch.
    crops: (N, 8) for `mae_bench.data.batches.crops.resample_batch`, where the images are still to be cropped on the device.
    """

    imgs: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)
    start: int = 0
    crops: torch.Tensor | None = None

    def split(self, sizes: Sequence[int]) -> Iterator["Batch"]:
        """Parts of so many images, in order; `bad` stays behind."""
        begin = 0
        for size in sizes:
            part = slice(begin, begin + size)
            crops = None if self.crops is None else self.crops[part]
            yield Batch(
                self.imgs[part], self.targets[part], self.indices[part], start=self.start + begin, crops=crops
            )
            begin += size

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from where copies to a GPU do not wait (the DataLoader calls it)."""
        crops = None if self.crops is None else self.crops.pin_memory()
        return replace(self, imgs=self.imgs.pin_memory(), targets=self.targets.pin_memory(), crops=crops)


class Images(Dataset[Batch | UserError]):
    """Decoded and transformed images of a source, a batch at a time, addressed by lists of items.

    replace_bad: an image that does not decode gives its place to the next one (training); else its place stays empty
    (evaluation). A UserError is returned, not raised: a worker's exception would reach the user as a traceback.
    """

    def __init__(self, images: ImageSource, transform: Transform, seed: int, replace_bad: bool):
        self.images, self.transform, self.seed, self.replace_bad = images, transform, seed, replace_bad

    def __getitems__(self, items: list[Item]) -> Batch | UserError:
        views: list[View] = []
        places: list[int] = []
        bad: list[tuple[str, str]] = []
        try:
            for epoch, index, _ in items:
                if (found := self._first_good(epoch, index, bad)) is not None:
                    places.append(found[0])
                    views.append(found[1])
        except UserError as error:
            return error
        imgs, crops = _stack(views)
        targets = torch.tensor([int(self.images.targets[place]) for place in places], dtype=torch.int64)
        return Batch(imgs, targets, torch.tensor(places, dtype=torch.int64), bad, items[0][2], crops)

    def _first_good(self, epoch: int, index: int, bad: list[tuple[str, str]]) -> tuple[int, View] | None:
        tries = min(MOST_BAD_IN_A_ROW, len(self.images)) if self.replace_bad else 1
        for place in range(index, index + tries):
            place %= len(self.images)
            try:
                return place, self._view(epoch, place)
            except (BadImage, OSError) as error:
                bad.append((self.images.name(place), str(error)))
        if not self.replace_bad:
            return None
        raise UserError(
            f"none of {tries} images in a row can be used, from {bad[-tries][0]}: {bad[-1][1]}",
            expected="images that decode and have the model's channels",
            fix="look at these files; model.in_chans is the number of channels",
        )

    def _view(self, epoch: int, place: int) -> View:
        seed, transform = derive_seed(self.seed, epoch, place), self.transform
        if not isinstance(transform, PretrainTransform):
            stored = self.images.pixels(place)
            image = decode(self.images.read(place)) if stored is None else Image.fromarray(stored)
            seed_everything(seed)
            return transform(image), None
        pixels = read_pixels(self.images, place, transform.in_chans, fast=transform.decode == "fast")
        return (
            transform.defer(pixels, seed)
            if transform.crop_on == "device"
            else (transform(pixels, seed), None)
        )


def _stack(views: list[View]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N, C, H, W), padded to the largest, channels last in memory; in a worker in shared memory, so that it is written once."""
    if not views:
        return torch.empty(0, 0, 0, 0, dtype=torch.uint8), None
    imgs = [img for img, _ in views]
    crops = [crop for _, crop in views if crop is not None]
    if crops:
        return _pad(imgs), torch.tensor(crops, dtype=torch.int32)
    return default_collate([img.permute(1, 2, 0) for img in imgs]).permute(0, 3, 1, 2), None


def _pad(imgs: list[torch.Tensor]) -> torch.Tensor:
    height, width = (max(img.shape[axis] for img in imgs) for axis in (1, 2))
    padded = torch.zeros(len(imgs), height, width, len(imgs[0]), dtype=imgs[0].dtype)
    for place, img in zip(padded, imgs, strict=True):
        place[: img.shape[1], : img.shape[2]] = img.permute(1, 2, 0)
    return (padded.share_memory_() if get_worker_info() else padded).permute(0, 3, 1, 2)


def epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of one epoch."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(derive_seed(seed, epoch, -1)))


@dataclass(frozen=True)
class TrainingOrder:
    """Which images make up each step: a function of (seed, step), so a run resumes at any step and on any number of processes.

    An epoch has num_images // global_batch_size steps (the rest waits for another epoch's order); rank r of `world_size` takes
    the r-th equal part of each global batch. sizes: the micro-batches that it is loaded in; none: all at once.
    """

    num_images: int
    global_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.global_batch_size > self.num_images:
            raise UserError(
                f"global_batch_size {self.global_batch_size} with {self.num_images} training images",
                expected="a global batch no larger than the data set",
                fix=f"set global_batch_size={self.num_images} or less",
            )
        if self.global_batch_size % self.world_size:
            raise UserError(
                f"global_batch_size {self.global_batch_size} on {self.world_size} processes",
                expected="a multiple of the processes",
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size

    @property
    def part(self) -> int:
        """Images of a step on one rank."""
        return self.global_batch_size // self.world_size

    def batches(self, start: int, stop: int) -> Iterator[list[Item]]:
        """The items of this rank for steps start to stop - 1, a list a micro-batch."""
        sizes = self.sizes or (self.part,)
        epoch, order = -1, torch.empty(0)
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.num_images, self.seed, epoch)
            begin, place = step % self.steps_per_epoch * self.global_batch_size, self.rank * self.part
            for size in sizes:
                indices = order[begin + place : begin + place + size].tolist()
                yield [(epoch, index, place + i) for i, index in enumerate(indices)]
                place += size


@dataclass(frozen=True)
class Steps:
    """The batches of steps start to stop - 1 as a batch sampler: made one by one, so that a long run holds one epoch's order."""

    order: TrainingOrder
    start: int
    stop: int

    def __len__(self) -> int:
        return (self.stop - self.start) * max(1, len(self.order.sizes))

    def __iter__(self) -> Iterator[list[Item]]:
        return self.order.batches(self.start, self.stop)


def training_batches(
    images: ImageSource, transform: Transform, order: TrainingOrder, start: int, stop: int, num_workers: int
) -> Iterator[Batch]:
    """Batches for steps start to stop - 1: the order's micro-batches.

    num_workers processes read ahead; 0 reads in this one, without a thread: augmentations may seed the global generators.
    """
    dataset = Images(images, transform, order.seed, replace_bad=True)
    return _batches(dataset, Steps(order, start, stop), num_workers)


def evaluation_batches(
    images: ImageSource,
    transform: Transform,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Every image of the set exactly once over all ranks, in order; the last batch may be smaller."""
    mine = [(0, index, 0) for index in range(rank, len(images), world_size)]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return _batches(Images(images, transform, seed=0, replace_bad=False), batches, num_workers)


def _batches(dataset: Images, batches: Any, num_workers: int) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_worker,
    )
    try:
        for batch in _ahead(iter(loader)) if num_workers else loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, OSError) as error:
        raise (_lost_worker(str(error), num_workers) or error) from error


def _ahead(batches: Iterator[Batch | UserError]) -> Iterator[Batch | UserError]:
    """Takes the next batch over from its loader process while the present one is used: to map its memory takes milliseconds."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    """Signals that stop a job are its main process's to answer: a launcher may send them to every process, and a worker that
    dies at once would take the main process with it before it has saved. It ends with its main process, or a while after."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(OUTLIVES))


LOST = (  # what a loader's failure says, and what mends it
    (
        r"[Bb]us error|shared memory|No space left",
        "give more shared memory (/dev/shm; docker run --shm-size=16g), or lower num_workers",
    ),
    (r"ancdata|Too many open files", "raise the limit of open files (ulimit -n 65536), or lower num_workers"),
    (
        r"worker.*(killed by signal: Killed|exited unexpectedly)",
        "lower num_workers: the machine may have run out of memory",
    ),
    (r"worker.*killed by signal", "set num_workers=0 to see where it fails"),
)


def _lost_worker(message: str, num_workers: int) -> UserError | None:
    for pattern, fix in LOST:
        if num_workers and re.search(pattern, message, re.DOTALL):
            what = message.strip().splitlines()[-1][:300]
            return UserError(
                f"a loader process was lost: {what}",
                expected=f"{num_workers} running loader processes",
                fix=fix,
            )
    return None
