"""Subsets of an image set, and samples per class that depend only on the seed."""

import numpy as np
import pytest
from PIL import Image

from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.subset import Subset, sample_per_class

TARGETS = np.repeat([0, 1, 2], [10, 20, 3])


@pytest.mark.parametrize(
    ("amount", "counts"), [(2, [2, 2, 2]), (5, [5, 5, 3]), (0.1, [1, 2, 1]), (0.5, [5, 10, 2])]
)
def test_so_many_of_each_class(amount, counts):
    drawn = sample_per_class(TARGETS, amount, seed=0)
    assert np.bincount(TARGETS[drawn]).tolist() == counts
    assert len(set(drawn.tolist())) == len(drawn)
    assert np.all(np.diff(drawn) > 0)


def test_draws_follow_from_the_seed_and_grow():
    few, more, other = (sample_per_class(TARGETS, amount, seed) for amount, seed in ((2, 0), (5, 0), (5, 1)))
    assert set(few.tolist()) < set(more.tolist())
    assert more.tolist() != other.tolist()
    assert few.tolist() == sample_per_class(TARGETS, 2, 0).tolist()
    shuffled = sample_per_class(TARGETS[::-1], 2, 0)
    assert np.bincount(TARGETS[::-1][shuffled]).tolist() == [2, 2, 2]


def test_a_subset_is_those_images(tmp_path):
    for number in range(6):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
    whole = open_images(tmp_path, "train")
    part = Subset(whole, [4, 1])
    assert (len(part), part.classes) == (2, ["class0", "class1"])
    assert [part.name(0), part.name(1)] == [whole.name(4), whole.name(1)]
    assert part.read(1) == whole.read(1)
    assert part.targets.tolist() == [whole.targets[4], whole.targets[1]]
    assert part.digest not in (whole.digest, Subset(whole, [1, 4]).digest)
