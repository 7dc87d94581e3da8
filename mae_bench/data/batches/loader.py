"""Load batches that depend only on (seed, epoch, index), not on the number of loader processes.

Dimensions: N batch, C channels, H W image.
"""

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
# Epoch, which seeds the augmentation; index in the image set; position in the step's global batch.
Item = tuple[int, int, int]
# An input (C, H, W) and None; or, for crops on the device, the crop's box and the numbers of the crop.
View = tuple[torch.Tensor, list[int] | None]

GRACE_SECONDS = 45  # a loader process keeps running for this long after SIGTERM, while its main process saves
MAX_BAD_IN_A_ROW = 100  # more than this is not a damaged image set but the wrong one


@dataclass
class Batch:
    """A batch of images.

    imgs: (N, C, H, W), uint8 unless the image set has more bits.
    targets: (N,) int64.
    indices: index in the image set, (N,).
    bad: name and reason of each image that did not decode.
    start: position of the first image in the step's global batch.
    crops: (N, 8), only for images still to be cropped by `mae_bench.data.batches.crops.resample_batch`.
    """

    imgs: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)
    start: int = 0
    crops: torch.Tensor | None = None

    def split(self, sizes: Sequence[int]) -> Iterator["Batch"]:
        """Yield consecutive parts of these sizes, without `bad`."""
        begin = 0
        for size in sizes:
            part = slice(begin, begin + size)
            crops = None if self.crops is None else self.crops[part]
            yield Batch(
                self.imgs[part], self.targets[part], self.indices[part], start=self.start + begin, crops=crops
            )
            begin += size

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, which the DataLoader requests for copies to a GPU."""
        crops = None if self.crops is None else self.crops.pin_memory()
        return replace(self, imgs=self.imgs.pin_memory(), targets=self.targets.pin_memory(), crops=crops)


class Images(Dataset[Batch | UserError]):
    """Decoded and transformed images of a source, addressed by a list of items per batch.

    replace_bad: an image that does not decode is replaced by the next one (training) or dropped (evaluation).
    A UserError is returned rather than raised: an exception in a worker would reach the user as a traceback.
    """

    def __init__(self, images: ImageSource, transform: Transform, seed: int, replace_bad: bool):
        self.images, self.transform, self.seed, self.replace_bad = images, transform, seed, replace_bad

    def __getitems__(self, items: list[Item]) -> Batch | UserError:
        views: list[View] = []
        indices: list[int] = []
        bad: list[tuple[str, str]] = []
        try:
            for epoch, index, _ in items:
                found = self._find_first_good(epoch, index, bad)
                if found is not None:
                    indices.append(found[0])
                    views.append(found[1])
            self._require_one_depth(indices, views)
        except UserError as error:
            return error
        imgs, crops = _stack(views)
        targets = torch.tensor([int(self.images.targets[index]) for index in indices], dtype=torch.int64)
        return Batch(imgs, targets, torch.tensor(indices, dtype=torch.int64), bad, items[0][2], crops)

    def _require_one_depth(self, indices: list[int], views: list[View]) -> None:
        """Raise UserError for a batch of 8-bit and of deeper images: mean and std are of one kind."""
        names = {img.dtype: self.images.name(i) for i, (img, _) in zip(indices, views, strict=True)}
        if len(names) > 1:
            kinds = (f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in names.items())
            raise UserError(
                f"images of several depths: {', '.join(kinds)}",
                expected="one depth in a set of this number of channels, that of mean and std",
                fix="convert the images to one depth",
            )

    def _find_first_good(self, epoch: int, index: int, bad: list[tuple[str, str]]) -> tuple[int, View] | None:
        tries = min(MAX_BAD_IN_A_ROW, len(self.images)) if self.replace_bad else 1
        for attempt in range(tries):
            i = (index + attempt) % len(self.images)
            try:
                return i, self._load_view(epoch, i)
            except (BadImage, OSError) as error:
                bad.append((self.images.name(i), str(error)))
        if not self.replace_bad:
            return None
        raise UserError(
            f"none of {tries} images in a row can be used, from {bad[-tries][0]}: {bad[-1][1]}",
            expected="images that decode and have the model's channels",
            fix="check these files; model.in_chans is the number of channels",
        )

    def _load_view(self, epoch: int, i: int) -> View:
        seed, transform = derive_seed(self.seed, epoch, i), self.transform
        if not isinstance(transform, PretrainTransform):
            stored = self.images.pixels(i)
            image = decode(self.images.read(i)) if stored is None else Image.fromarray(stored)
            seed_everything(seed)
            return transform(image), None
        pixels = read_pixels(self.images, i, transform.in_chans, fast=transform.decode == "fast")
        if transform.crop_on == "device":
            return transform.defer(pixels, seed)
        return transform(pixels, seed), None


def _stack(views: list[View]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack images to (N, C, H, W), channels last in memory, and pad those that are still to be cropped.

    A worker writes the batch directly to shared memory, so that it is copied only once.
    """
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
    for row, img in zip(padded, imgs, strict=True):
        row[: img.shape[1], : img.shape[2]] = img.permute(1, 2, 0)
    if get_worker_info():
        padded.share_memory_()
    return padded.permute(0, 3, 1, 2)


def draw_epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the permutation of the images for one epoch."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(derive_seed(seed, epoch, -1)))


@dataclass(frozen=True)
class TrainingOrder:
    """Assign images to steps as a function of (seed, step), so that a run resumes at any step and world size.

    An epoch has num_images // global_batch_size steps; the remaining images are skipped in that epoch. Each
    rank takes an equal, consecutive part of each global batch.

    sizes: sizes of the micro-batches of a step on one rank; () for a single one.
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
                expected="a multiple of the number of processes",
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size

    @property
    def part(self) -> int:
        """Number of images of a step on one rank."""
        return self.global_batch_size // self.world_size

    def batches(self, start: int, stop: int) -> Iterator[list[Item]]:
        """Yield the items of this rank for steps start to stop - 1, one list per micro-batch."""
        sizes = self.sizes or (self.part,)
        epoch, order = -1, torch.empty(0)
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = draw_epoch_order(self.num_images, self.seed, epoch)
            begin = step % self.steps_per_epoch * self.global_batch_size
            position = self.rank * self.part
            for size in sizes:
                indices = order[begin + position : begin + position + size].tolist()
                yield [(epoch, index, position + i) for i, index in enumerate(indices)]
                position += size


@dataclass(frozen=True)
class Steps:
    """Batch sampler for steps start to stop - 1 that keeps only the order of one epoch in memory."""

    order: TrainingOrder
    start: int
    stop: int

    def __len__(self) -> int:
        return (self.stop - self.start) * max(1, len(self.order.sizes))

    def __iter__(self) -> Iterator[list[Item]]:
        return self.order.batches(self.start, self.stop)


def load_training_batches(
    images: ImageSource, transform: Transform, order: TrainingOrder, start: int, stop: int, num_workers: int
) -> Iterator[Batch]:
    """Yield the order's micro-batches for steps start to stop - 1.

    num_workers: number of processes that read ahead; 0 reads in this process, without a thread, as
    augmentations may seed the global generators.
    """
    dataset = Images(images, transform, order.seed, replace_bad=True)
    return _load_batches(dataset, Steps(order, start, stop), num_workers)


def load_evaluation_batches(
    images: ImageSource,
    transform: Transform,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield every image exactly once over all ranks, in order; the last batch may be smaller."""
    mine = [(0, index, 0) for index in range(rank, len(images), world_size)]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return _load_batches(Images(images, transform, seed=0, replace_bad=False), batches, num_workers)


def _load_batches(dataset: Images, batches: Any, num_workers: int) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_keep,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_init_worker,
    )
    try:
        for batch in _prefetch(iter(loader)) if num_workers else loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, OSError) as error:
        raise (_explain_lost_worker(str(error), num_workers) or error) from error


def _prefetch(batches: Iterator[Batch | UserError]) -> Iterator[Batch | UserError]:
    """Fetch the next batch in a thread while the current one is used: mapping its memory is slow."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = thread.submit(next, batches, None)
            yield batch


def _keep(batch: Any) -> Any:
    return batch


def _init_worker(_: int) -> None:
    """Ignore the signals that stop a job in a loader process, and end some time after SIGTERM.

    A launcher may signal every process. A worker that exits at once would take down the main process before
    it has saved; otherwise it ends together with the main process.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))


LOST = (  # pattern in the message of a failed loader, fix
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


def _explain_lost_worker(message: str, num_workers: int) -> UserError | None:
    for pattern, fix in LOST:
        if num_workers and re.search(pattern, message, re.DOTALL):
            what = message.strip().splitlines()[-1][:300]
            return UserError(
                f"a loader process was lost: {what}",
                expected=f"{num_workers} running loader processes",
                fix=fix,
            )
    return None
