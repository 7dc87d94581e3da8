"""Files of one set of cached features: rows of float32 with a checksum each, written and read in any order.

N images, n rows of a batch, D width.
"""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mae_bench.errors import UserError
from mae_bench.files import is_full

VALUES_FILE = "values.f32"
CHECKSUMS_FILE = "checksums.u32"


@dataclass(frozen=True)
class FeatureFiles:
    """The features of one set: `values.f32` (N, D), and `checksums.u32` (N,), 0 for a row without features.

    The files have no header: their shapes follow from the images and the backbone.
    """

    folder: Path
    num_images: int
    width: int

    def open(self, mode: Literal["r", "r+"] = "r") -> tuple[np.memmap, np.memmap]:
        """Memory-map values (N, D) and checksums (N,), to be read ("r") or also written ("r+")."""
        values = np.memmap(self.folder / VALUES_FILE, np.float32, mode, shape=(self.num_images, self.width))
        checksums = np.memmap(self.folder / CHECKSUMS_FILE, np.uint32, mode, shape=(self.num_images,))
        return values, checksums

    def reserve(self) -> None:
        """Create the files at their final size, so that a full disk fails here and not halfway through."""
        for name, size in ((CHECKSUMS_FILE, 4), (VALUES_FILE, 4 * self.width)):
            path, num_bytes = self.folder / name, size * self.num_images
            if path.is_file() and path.stat().st_size == num_bytes:
                continue
            part = self.folder / f"{name}.part"
            try:
                with part.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                part.unlink(missing_ok=True)
                if not is_full(error):
                    raise
                raise UserError(
                    f"no room in {self.folder} for {num_bytes / 2**30:.1f} GiB of features",
                    expected="as much free disk space",
                    fix="set MAE_BENCH_CACHE to a folder on a larger disk",
                ) from error
            part.replace(path)

    def discard_damaged(self) -> int:
        """Mark the rows that differ from their checksums as missing; return how many there are."""
        values, checksums = (np.asarray(array) for array in self.open("r+"))
        damaged = [
            i for i in np.flatnonzero(checksums).tolist() if compute_checksum(values[i]) != checksums[i]
        ]
        checksums[damaged] = 0
        return len(damaged)


def compute_checksum(row: np.ndarray) -> int:
    """Return the CRC-32 of a row (D,), but 1 for 0, which marks a row without features."""
    return zlib.crc32(row.data) or 1
