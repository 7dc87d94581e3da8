"""Mask samplings: exact counts, shapes in the image, and dependence on the generator and row only."""

from typing import Any

import pytest
import torch

from mae_bench.errors import UserError
from mae_bench.models.masking import build_masking, count_kept, sample_noise

STRIPES: Any = "stripes"
GRIDS = [(14, 14), (7, 10), (1, 9), (3, 2)]


def draw(sampling, num_imgs, grid_size, mask_ratio, seed=0):
    noise = sample_noise(sampling, num_imgs, grid_size, mask_ratio, torch.Generator().manual_seed(seed))
    return build_masking(noise, mask_ratio).mask.reshape(num_imgs, *grid_size).bool()


def joins(removed):
    """Share of neighbouring pairs (down and across) that are both removed or both kept."""
    same = [(removed[:, 1:] == removed[:, :-1]).flatten(), (removed[..., 1:] == removed[..., :-1]).flatten()]
    return torch.cat(same).float().mean().item()


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
@pytest.mark.parametrize("grid_size", GRIDS)
@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75])
def test_every_image_keeps_the_exact_count(sampling, grid_size, mask_ratio):
    removed = draw(sampling, 16, grid_size, mask_ratio)
    num_patches = grid_size[0] * grid_size[1]
    assert (~removed).flatten(1).sum(1).tolist() == [int(num_patches * (1 - mask_ratio))] * 16


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
@pytest.mark.parametrize("mask_ratio", [0.02, 0.9, 0.97])
def test_ratios_near_the_ends_work(sampling, mask_ratio):
    noise = sample_noise(sampling, 8, (14, 14), mask_ratio, torch.Generator().manual_seed(0))
    assert noise.shape == (8, 196)
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert all(len(row.unique()) == 196 for row in noise), "ties would leave the choice to the sort"


def test_grid_keeps_one_of_every_four_regularly():
    removed = draw("grid", 2, (6, 8), 0.75)
    want = torch.ones(6, 8, dtype=torch.bool)
    want[::2, ::2] = False
    assert torch.equal(removed, want.expand(2, -1, -1))
    half = draw("grid", 1, (6, 8), 0.5)[0]
    assert torch.equal(half, (torch.arange(6)[:, None] + torch.arange(8)) % 2 == 1), (
        "half of them is a chessboard"
    )


def test_blocks_are_rectangles():
    """The removed part is a union of rectangles: far more connected than random patches."""
    for mask_ratio, least in ((0.5, 0.8), (0.75, 0.8)):
        random, block = (joins(draw(sampling, 64, (14, 14), mask_ratio)) for sampling in ("random", "block"))
        assert random < 0.7
        assert block > least
    small = draw(
        "block", 200, (14, 14), 16 / 196
    )  # one block of BEiT's smallest size, or as little as rounding leaves beside it
    boxes = [(row.any(1).nonzero().flatten(), row.any(0).nonzero().flatten()) for row in small]
    areas = torch.tensor([(r[-1] - r[0] + 1) * (c[-1] - c[0] + 1) for r, c in boxes])
    assert (areas <= 20).float().mean() > 0.35, "random patches would fill the grid"
    aspects = torch.tensor([(r[-1] - r[0] + 1) / (c[-1] - c[0] + 1) for r, c in boxes])[areas <= 20]
    assert aspects.min() <= 0.5
    assert aspects.max() >= 2


@pytest.mark.parametrize("sampling", ["random", "block"])
def test_masks_fall_everywhere_and_differ(sampling):
    removed = draw(sampling, 500, (8, 8), 0.5)
    share = removed.float().mean(0)
    assert share.min() > (0.4 if sampling == "random" else 0.1), "corners are in fewer rectangles"
    assert share.max() < (0.6 if sampling == "random" else 0.9)
    assert len({tuple(row.flatten().tolist()) for row in removed}) > 450


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
def test_repeats_from_a_generator(sampling):
    first, again, other = (
        sample_noise(sampling, 8, (14, 14), 0.6, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("mask_ratio", "usable"), [(0.0, "at most 0.937"), (0.99, "at most 0.937"), (-1.0, "above 0")]
)
def test_ratio_without_visible_or_removed_patches_names_the_usable_range(mask_ratio, usable):
    with pytest.raises(UserError, match="keeps") as error:
        sample_noise("random", 1, (4, 4), mask_ratio)
    assert usable in str(error.value)
    with pytest.raises(UserError):
        build_masking(torch.rand(1, 16), mask_ratio)


@pytest.mark.parametrize("num_patches", [2, 3, 5, 16, 196])
def test_the_range_that_is_named_is_usable(num_patches):
    with pytest.raises(UserError) as error:
        count_kept(num_patches, 1.0)
    assert count_kept(num_patches, float(error.value.fix.split()[-1])) >= 1
    assert count_kept(num_patches, 1e-6) == num_patches - 1
    with pytest.raises(UserError, match="larger"):
        count_kept(1, 0.5)


def test_an_unknown_sampling_is_refused():
    with pytest.raises(UserError, match="stripes"):
        sample_noise(STRIPES, 1, (4, 4), 0.5)
