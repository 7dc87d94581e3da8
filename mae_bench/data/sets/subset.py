"""A part of an image set, and how a set is split in two by class, the same way on every machine."""

from collections.abc import Sequence

import numpy as np

from mae_bench.data.seeds import seed_of
from mae_bench.data.sets.source import ImageSource
from mae_bench.files import json_digest


class Subset(ImageSource):
    """The images `indices` of `source`, in that order; its classes are those of the whole set."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray):
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self._targets = source.targets[self.indices]

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @property
    def targets(self) -> np.ndarray:
        return self._targets

    @property
    def digest(self) -> str:
        return json_digest([self.source.digest, self.indices.tolist()])

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    def read(self, i: int) -> bytes:
        return self.source.read(int(self.indices[i]))

    def pixels(self, i: int) -> np.ndarray | None:
        return self.source.pixels(int(self.indices[i]))

    def stored(self, i: int, length: int | None = None) -> bytes:
        return self.source.stored(int(self.indices[i]), length)

    def stored_sizes(self) -> np.ndarray:
        return self.source.stored_sizes()[self.indices]


def drawn_a_class(targets: np.ndarray, share: float | int, seed: int) -> np.ndarray:
    """Sorted indices of some images of every class: a share (float, at least one image) or a number (int, or all there are).

    Drawn by (seed, class) alone; a larger share or number of the same seed contains a smaller one's images.
    """
    drawn = []
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        order = np.random.default_rng(seed_of(seed, int(label), -31)).permutation(members)
        count = share if isinstance(share, int) else max(1, round(share * len(members)))
        drawn.append(order[:count])
    return np.sort(np.concatenate(drawn))
