"""Accumulation: known answers, properties over many sizes, and impossible global batches."""

import pytest
import torch

from mae_bench.data.batches.loader import Batch
from mae_bench.engine.accumulation import plan_accumulation
from mae_bench.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((4096, 8, 64), "global batch 4096 = 8 devices x 64 images x 8 accumulated"),
        ((4096, 64, 64), "global batch 4096 = 64 devices x 64 images x 1 accumulated"),
        ((256, 1, None), "global batch 256 = 1 device x 256 images x 1 accumulated"),
        ((8, 1, 3), "global batch 8 = 1 device x (3 + 3 + 2) images"),
        ((96, 2, 64), "global batch 96 = 2 devices x 48 images x 1 accumulated"),
    ],
)
def test_known_answers(arguments: tuple[int, int, int | None], text: str) -> None:
    assert str(plan_accumulation(*arguments)) == text


@pytest.mark.parametrize("multiple_of", [1, 2])
@pytest.mark.parametrize("device_batch_size", [2, 3, 5, 7, 8, 100, None])
def test_parts_fit_are_as_equal_and_as_few_as_they_can_be(
    device_batch_size: int | None, multiple_of: int
) -> None:
    for size in range(multiple_of, 60, multiple_of):
        sizes = plan_accumulation(3 * size, 3, device_batch_size, multiple_of).sizes
        most = (device_batch_size or size) // multiple_of * multiple_of
        assert sum(sizes) == size
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= multiple_of
        assert all(part % multiple_of == 0 for part in sizes)
        assert (len(sizes) - 1) * most < size, "one part fewer would not hold them"


def test_micro_batches_know_their_place_in_the_global_batch() -> None:
    batch = Batch(torch.arange(16.0).view(8, 2), torch.arange(8), torch.arange(8) + 100, start=24)
    parts = list(plan_accumulation(8, 1, 3).split(batch))
    assert [part.start for part in parts] == [24, 27, 30]
    assert torch.equal(torch.cat([part.imgs for part in parts]), batch.imgs)
    assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ((100, 8, None, 1), "global_batch_size=96 or 104"),
        ((4, 8, None, 1), "global_batch_size=8"),
        ((100, 4, None, 2), "global_batch_size=96 or 104"),
        ((8, 1, 1, 2), "device_batch_size=2"),
    ],
)
def test_a_batch_that_the_devices_cannot_make_names_the_nearest_that_they_can(
    arguments: tuple[int, int, int | None, int], fix: str
) -> None:
    with pytest.raises(UserError) as error:
        plan_accumulation(*arguments)
    assert error.value.fix.endswith(fix)
