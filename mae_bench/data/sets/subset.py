"""Select a subset of an image set, and sample images per class, reproducibly on every machine."""

from collections.abc import Sequence

import numpy as np

from mae_bench.data.seeds import derive_seed
from mae_bench.data.sets.source import ImageSource
from mae_bench.files import json_digest


class Subset(ImageSource):
    """The images `indices` of `source`, in that order, with the classes of the whole set."""

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


def sample_per_class(targets: np.ndarray, amount: float | int, seed: int) -> np.ndarray:
    """Return sorted indices of images sampled from every class.

    amount: a fraction of each class (float, at least one image), or a number per class (int, at most all
    images). The sample of a class depends only on (seed, class); a larger amount with the same seed contains
    the smaller sample.
    """
    sampled = []
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        order = np.random.default_rng(derive_seed(seed, int(label), -31)).permutation(members)
        num_images = amount if isinstance(amount, int) else max(1, round(amount * len(members)))
        sampled.append(order[:num_images])
    return np.sort(np.concatenate(sampled))
