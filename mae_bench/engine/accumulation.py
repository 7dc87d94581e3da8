"""How the devices at hand make a global batch: processes x images a device takes at once x micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mae_bench.errors import UserError

if TYPE_CHECKING:  # a plan counts batches without torch
    from mae_bench.data.batches.loader import Batch


@dataclass(frozen=True)
class Accumulation:
    """The micro-batches of each of `world_size` devices; their gradients add up to that of the global batch."""

    world_size: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        """`global batch 4096 = 8 devices x 64 images x 8 accumulated`."""
        images, count = self.num_images, len(self.sizes)
        equal = min(self.sizes) == max(self.sizes)
        each = (
            f"{self.sizes[0]} images x {count} accumulated"
            if equal
            else f"({' + '.join(map(str, self.sizes))}) images"
        )
        return f"global batch {self.world_size * images} = {self.world_size} device{'s' * (self.world_size > 1)} x {each}"

    @property
    def num_images(self) -> int:
        """Of a step, on one device."""
        return sum(self.sizes)

    def split(self, batch: "Batch") -> "Iterator[Batch]":
        """The micro-batches of a device's batch, which may be one already; each knows its place in the global batch."""
        return batch.split(self.sizes) if len(batch.targets) == self.num_images else iter([batch])


def accumulation(
    global_batch_size: int, world_size: int = 1, device_batch_size: int | None = None, multiple_of: int = 1
) -> Accumulation:
    """The fewest micro-batches of at most `device_batch_size` images, as equal as they can be.

    multiple_of: what every micro-batch has to be a multiple of (2 where mixup mixes pairs). UserError for a batch that the
    devices cannot make.
    """
    unit = world_size * multiple_of
    if global_batch_size % unit:
        nearest = [
            size
            for size in (global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit)
            if size
        ]
        pairs = f", each taking a multiple of {multiple_of}" if multiple_of > 1 else ""
        raise UserError(
            f"global_batch_size {global_batch_size} on {world_size} device{'s' * (world_size > 1)}{pairs}",
            expected=f"a multiple of {unit}",
            fix=f"set global_batch_size={' or '.join(map(str, nearest))}",
        )
    units, most = global_batch_size // unit, (device_batch_size or global_batch_size) // multiple_of
    if not most:
        raise UserError(
            f"device_batch_size {device_batch_size}",
            expected=f"{multiple_of} images at least",
            fix=f"device_batch_size={multiple_of}",
        )
    count = -(-units // most)
    smaller, larger = divmod(units, count)
    return Accumulation(world_size, tuple(multiple_of * (smaller + (part < larger)) for part in range(count)))
