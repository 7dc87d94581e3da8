"""The scores, against sums computed by hand."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

from mmseg.evaluation import IoUMetric

from tasks.ade20k.metrics import ExactIoUMetric, compute_metrics, compute_scores, score_per_class

pytestmark = pytest.mark.framework

LABEL = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 255], [255, 0, 0, 0]])
PRED = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1], [2, 0, 0, 2]])
# class 0: 4 hits of 6 labelled, 5 predicted, union 7; class 1: 3 hits of 4 labelled, 4 predicted, union 5;
# class 2: not labelled, predicted once where it counts, union 1; class 3: nowhere.
IOU, ACC = (4 / 7, 3 / 5, 0.0), (4 / 6, 3 / 4)


def evaluate(*pairs: tuple[torch.Tensor, torch.Tensor], cls=ExactIoUMetric):
    metric = cls(ignore_index=255)
    metric.dataset_meta = {"classes": ("a", "b", "c", "d")}
    metric.process(
        {}, [{"pred_sem_seg": {"data": pred}, "gt_sem_seg": {"data": label}} for pred, label in pairs]
    )
    return metric, metric.evaluate(len(pairs))


def test_known_answer_at_full_precision():
    metric, found = evaluate((PRED, LABEL))
    expected = {"mIoU": 100 * sum(IOU) / 3, "mAcc": 100 * sum(ACC) / 2, "aAcc": 100 * 7 / 10}
    assert found == pytest.approx(expected, rel=1e-14)
    assert {name: m.value for name, m in compute_metrics(metric.areas).items()} == found
    assert {(m.unit, m.direction) for m in compute_metrics(metric.areas).values()} == {("%", "higher")}


def test_agrees_with_mmsegmentation_to_its_two_decimals():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (5, 2, 9, 11), generator=generator)
    pairs = [(prediction, label) for prediction, label in maps]
    _, exact = evaluate(*pairs)
    _, rounded = evaluate(*pairs, cls=IoUMetric)
    assert {name: round(value, 2) for name, value in exact.items()} == pytest.approx(rounded, abs=0.0101)


def test_predictions_at_ignored_pixels_change_nothing():
    other = torch.where(LABEL == 255, 3 - PRED, PRED)
    assert not torch.equal(other, PRED)
    assert evaluate((other, LABEL))[1] == evaluate((PRED, LABEL))[1]


def test_sums_over_images_are_not_means_over_images():
    halves = [(PRED[:, :2], LABEL[:, :2]), (PRED[:, 2:], LABEL[:, 2:])]
    metric, found = evaluate(*halves)
    assert found == pytest.approx(evaluate((PRED, LABEL))[1], rel=1e-14)
    assert metric.areas.shape == (2, 4, 4)


def test_many_pixels_lose_none():
    areas = np.zeros((3, 4, 1), np.int64)
    areas[0], areas[1:] = 2**25, 1  # float32 holds 2 ** 25 + 1 as 2 ** 25
    areas[2, 0] = 0
    assert compute_scores(areas)["aAcc"] == 100 * (2**25 + 1) / (2**25 + 2) < 100


def test_per_class_has_no_number_for_what_was_not_measured():
    rows = score_per_class(evaluate((PRED, LABEL))[0].areas, ["a", "b", "c", "d"])
    assert [row["IoU"] for row in rows] == [pytest.approx(100 * 4 / 7), pytest.approx(60), 0, None]
    assert [row["Acc"] for row in rows] == [pytest.approx(100 * 4 / 6), pytest.approx(75), None, None]
    assert [(row["intersect"], row["union"], row["label"]) for row in rows] == [
        (4, 7, 6),
        (3, 5, 4),
        (0, 1, 0),
        (0, 0, 0),
    ]
    json.dumps(rows, allow_nan=False)
