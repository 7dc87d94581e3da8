"""Split a global batch over devices and micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mae_bench.errors import UserError

if TYPE_CHECKING:  # `mae-bench plan` uses this module without torch
    from mae_bench.data.batches.loader import Batch


@dataclass(frozen=True)
class Accumulation:
    """Sizes of the micro-batches of each device; their summed gradients are those of the global batch.

    world_size: number of devices.
    sizes: images per micro-batch.
    """

    world_size: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        """Describe the split: `global batch 4096 = 8 devices x 64 images x 8 accumulated`."""
        if min(self.sizes) == max(self.sizes):
            per_device = f"{self.sizes[0]} images x {len(self.sizes)} accumulated"
        else:
            per_device = f"({' + '.join(map(str, self.sizes))}) images"
        return (
            f"global batch {self.world_size * self.num_images} = {_devices(self.world_size)} x {per_device}"
        )

    @property
    def num_images(self) -> int:
        """Number of images per step on one device."""
        return sum(self.sizes)

    def split(self, batch: "Batch") -> "Iterator[Batch]":
        """Split the batch of a device into micro-batches; a batch that already is one is passed on."""
        return batch.split(self.sizes) if len(batch.targets) == self.num_images else iter([batch])


def plan_accumulation(
    global_batch_size: int, world_size: int = 1, device_batch_size: int | None = None, multiple_of: int = 1
) -> Accumulation:
    """Return the fewest micro-batches of at most `device_batch_size` images, as equal in size as possible.

    multiple_of: required divisor of every micro-batch (2 for mixup, which mixes pairs).

    Raise UserError if the devices cannot form the global batch.
    """
    unit = world_size * multiple_of
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = [size for size in (below, below + unit) if size]
        pairs = f", each taking a multiple of {multiple_of}" if multiple_of > 1 else ""
        raise UserError(
            f"global_batch_size {global_batch_size} on {_devices(world_size)}{pairs}",
            expected=f"a multiple of {unit}",
            fix=f"set global_batch_size={' or '.join(map(str, nearest))}",
        )
    units = global_batch_size // unit
    max_units = (device_batch_size or global_batch_size) // multiple_of
    if not max_units:
        raise UserError(
            f"device_batch_size {device_batch_size}",
            expected=f"at least {multiple_of} images",
            fix=f"device_batch_size={multiple_of}",
        )
    count = -(-units // max_units)
    smaller, larger = divmod(units, count)
    sizes = [multiple_of * (smaller + (part < larger)) for part in range(count)]
    return Accumulation(world_size, tuple(sizes))


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count > 1)}"
