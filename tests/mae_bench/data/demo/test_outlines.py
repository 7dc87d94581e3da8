import numpy as np
import pytest

from mae_bench.data.demo.outlines import encode_run_lengths, find_box, trace_polygons

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # pycocotools 2.0.11, numpy 2


def random_masks():
    rng = np.random.default_rng(0)
    shapes = [(tuple(rng.integers(1, 20, 2)), rng.uniform(0.2, 0.9)) for _ in range(100)]
    return [mask for shape, share in shapes if (mask := rng.random(shape) < share).any()]


def test_a_rectangle_has_four_corners():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:5] = True
    assert trace_polygons(mask) == [[2, 1, 5, 1, 5, 3, 2, 3]]
    assert find_box(mask) == [2, 1, 3, 2]
    assert encode_run_lengths(mask) == {"counts": [11, 2, 3, 2, 3, 2, 7], "size": [5, 6]}


def test_a_full_mask_has_one_run_after_an_empty_one():
    assert encode_run_lengths(np.ones((2, 2), bool)) == {"counts": [0, 4], "size": [2, 2]}


def test_pixels_that_touch_by_a_corner_are_two_polygons():
    assert len(trace_polygons(np.eye(2, dtype=bool))) == 2


def test_a_hole_is_cut_open():
    mask = np.ones((3, 3), bool)
    mask[1, 1] = False
    assert len(trace_polygons(mask)) == 2


def test_pycocotools_gives_the_masks_back():
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    for mask in random_masks():
        filled = coco.decode(coco.merge(coco.frPyObjects(trace_polygons(mask), *mask.shape)))
        code = coco.frPyObjects(encode_run_lengths(mask), *mask.shape)
        assert np.array_equal(filled, mask)
        assert np.array_equal(coco.decode(code), mask)
        assert coco.toBbox(code).tolist() == find_box(mask)
