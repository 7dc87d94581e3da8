"""Batches of images whose order and augmentation depend on (seed, epoch, index) alone, however many processes read them."""

import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mae_bench.data.images import BadImage, ImageSet, decode
from mae_bench.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor]
Item = tuple[int, int]  # epoch and index in the image set; the epoch seeds the augmentation


@dataclass
class Batch:
    """imgs (N, C, H, W) uint8, targets (N,) int64, indices (N,) in the image set; `bad` names what did not decode, with the
    reason; `start` is the place of the first image in the step's global batch."""

    imgs: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)
    start: int = 0


def seed_of(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every machine and for every process."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds torch, numpy and random: augmentations draw from all three."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # torch.manual_seed would queue a call, with a stack trace, for the day CUDA starts
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Images(Dataset[tuple[torch.Tensor | None, int, int, list[tuple[str, str]]]]):
    """Decoded and transformed images of an ImageSet, addressed by (epoch, index).

    replace_bad: an image that does not decode gives its place to the next one (training); else its place stays empty
    (evaluation).
    """

    def __init__(self, images: ImageSet, transform: Transform, seed: int, replace_bad: bool):
        self.images, self.transform, self.seed, self.replace_bad = images, transform, seed, replace_bad

    def __getitem__(self, item: Item) -> tuple[torch.Tensor | None, int, int, list[tuple[str, str]]]:
        epoch, index = item
        bad: list[tuple[str, str]] = []
        for place in range(index, index + (len(self.images) if self.replace_bad else 1)):
            place %= len(self.images)
            try:
                image = decode(self.images.read(place))
            except (BadImage, OSError) as error:
                bad.append((self.images.name(place), str(error)))
                continue
            seed_everything(seed_of(self.seed, epoch, place))
            return self.transform(image), self.images.targets[place], place, bad
        return None, -1, index, bad


def collate(items: list[tuple[torch.Tensor | None, int, int, list[tuple[str, str]]]]) -> Batch:
    """Stacks what decoded."""
    good = [(img, target, index) for img, target, index, _ in items if img is not None]
    return Batch(
        torch.stack([img for img, _, _ in good]) if good else torch.empty(0, 0, 0, 0, dtype=torch.uint8),
        torch.tensor([target for _, target, _ in good], dtype=torch.int64),
        torch.tensor([index for _, _, index in good], dtype=torch.int64),
        [entry for *_, bad in items for entry in bad],
    )


def epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of one epoch."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed_of(seed, epoch, -1)))


@dataclass(frozen=True)
class TrainingOrder:
    """Which images make up each step: a function of (seed, step), so a run resumes at any step and on any number of processes.

    An epoch has num_images // global_batch_size steps (the rest waits for another epoch's order); rank r of `world_size` takes
    the r-th equal part of each global batch.
    """

    num_images: int
    global_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch_size > self.num_images:
            raise UserError(
                f"global_batch_size {self.global_batch_size} with {self.num_images} training images",
                expected="a global batch no larger than the data set",
                fix=f"set global_batch_size={max(1, self.num_images // 2)} or less",
            )
        if self.global_batch_size % self.world_size:
            raise UserError(
                f"global_batch_size {self.global_batch_size} on {self.world_size} processes",
                expected="a multiple of the processes",
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size

    def batches(self, start: int, stop: int) -> Iterator[list[Item]]:
        """The (epoch, index) items of this rank for steps start to stop - 1."""
        part = self.global_batch_size // self.world_size
        epoch, order = -1, torch.empty(0)
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.num_images, self.seed, epoch)
            begin = step % self.steps_per_epoch * self.global_batch_size + self.rank * part
            yield [(epoch, int(index)) for index in order[begin : begin + part]]


@dataclass(frozen=True)
class Steps:
    """The batches of steps start to stop - 1 as a batch sampler: made one by one, so that a long run holds one epoch's order."""

    order: TrainingOrder
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Item]]:
        return self.order.batches(self.start, self.stop)


def training_batches(
    images: ImageSet, transform: Transform, order: TrainingOrder, start: int, stop: int, num_workers: int
) -> Iterator[Batch]:
    """Batches for steps start to stop - 1."""
    return iter(_loader(Images(images, transform, order.seed, replace_bad=True), Steps(order, start, stop), num_workers))


def evaluation_batches(
    images: ImageSet, transform: Transform, batch_size: int, num_workers: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Every image of the set exactly once over all ranks, in order; the last batch may be smaller."""
    mine = [(0, index) for index in range(rank, len(images), world_size)]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return iter(_loader(Images(images, transform, seed=0, replace_bad=False), batches, num_workers))


def _loader(dataset: Images, batches: Any, num_workers: int) -> DataLoader[Any]:
    pinned = torch.cuda.is_available()
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate, pin_memory=pinned)
