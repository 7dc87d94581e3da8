import numpy as np
import pytest

from mae_bench.data.demo.scenes import OUTLINES, STUFF, THINGS, Recipe, build_rng, make_scene

RECIPE = Recipe(96, crowd_share=0.5)


def scene(seed=0, index=0, recipe=RECIPE, split="train", data_set="coco"):
    return make_scene(build_rng(seed, data_set, split, index), recipe)


def test_the_same_arguments_give_the_same_scene():
    one, two = scene(index=3), scene(index=3)
    assert np.array_equal(one.image, two.image)
    assert np.array_equal(one.stuff, two.stuff)
    assert [t.label for t in one.things] == [t.label for t in two.things]


@pytest.mark.parametrize("change", [{"seed": 1}, {"index": 1}, {"split": "val"}, {"data_set": "ade20k"}])
def test_each_argument_gives_another_scene(change):
    assert not np.array_equal(scene().image, scene(**change).image)


def inside(outline, size):
    """Return the pixels whose centre is inside the polygon, by the even-odd rule."""
    x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    odd = np.zeros((size, size), bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if y0 != y1:
            odd ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return odd


def test_visible_masks_are_disjoint_and_within_the_full_shape():
    for index in range(10):
        drawn = scene(index=index)
        assert np.sum([thing.mask for thing in drawn.things], axis=0).max() <= 1
        for thing in drawn.things:
            full = np.any([inside(outline, 96) for outline in thing.outlines], axis=0)
            border = sum(np.hypot(*np.diff(outline, axis=0).T).sum() for outline in thing.outlines)
            assert thing.area <= thing.full_area
            assert (thing.mask & ~full).sum() <= 0.25 * border + 2  # a quarter of a pixel along the outline


@pytest.mark.parametrize("label", range(len(THINGS)))
def test_a_whole_thing_is_its_outline(label):
    drawn = make_scene(
        build_rng(0, "a", "b", label), Recipe(96, num_things=(1, 1), radius=(0.3, 0.3), max_bars=0), label
    )
    full, mask = inside(drawn.things[0].outlines[0], 96), drawn.things[0].mask
    assert (full & mask).sum() > 0.9 * (full | mask).sum()


def test_a_lone_thing_shows_all_of_itself():
    drawn = scene(recipe=Recipe(64, num_things=(1, 1), max_bars=0))
    assert drawn.things[0].area == drawn.things[0].full_area > 0
    assert not drawn.things[0].crowd


def test_a_ring_has_a_hole():
    recipe = Recipe(64, num_things=(1, 1), radius=(0.4, 0.4), max_bars=0)
    drawn = make_scene(build_rng(0, "a", "b", 0), recipe, THINGS.index("ring"))
    y, x = np.argwhere(drawn.things[0].mask).mean(axis=0).astype(int)
    assert not drawn.things[0].mask[y, x]


def test_scenes_show_every_kind_of_label():
    scenes = [scene(index=i) for i in range(40)]
    assert {t.label for s in scenes for t in s.things} == set(range(len(THINGS)))
    assert set(np.unique([s.stuff for s in scenes])) == set(range(len(STUFF) + 1))
    assert {t.crowd for s in scenes for t in s.things} == {True, False}


def test_things_have_outlines_in_the_order_of_their_names():
    assert tuple(OUTLINES) == THINGS == tuple(sorted(THINGS))


def test_neither_position_nor_colour_tells_the_class():
    """The nearest class mean on raw pixels stays near chance (10 %)."""
    recipe = Recipe(32, num_things=(1, 1), radius=(0.26, 0.48), max_grounds=2, max_bars=1)
    pixels = (
        np.stack([make_scene(build_rng(0, "p", "q", i), recipe, i % 10).image for i in range(600)]).reshape(
            600, -1
        )
        / 255.0
    )
    means = np.stack([pixels[:400][np.arange(400) % 10 == k].mean(axis=0) for k in range(10)])
    nearest = ((pixels[400:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == np.arange(400, 600) % 10).mean() < 0.25
