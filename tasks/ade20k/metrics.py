"""mmsegmentation's IoUMetric without its rounding, and its metrics as this project records them.

K classes.
"""

from typing import Any

import numpy as np
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from numpy.typing import NDArray

from mae_bench.record import Metric

MAIN_METRIC = "mIoU"
INTERSECT, UNION, PRED, LABEL = range(4)  # rows of the areas in pixels that IoUMetric accumulates

Areas = NDArray[np.int64]  # (images, 4, K), or (4, K) for their sum


@METRICS.register_module()
class ExactIoUMetric(IoUMetric):
    """IoUMetric whose scores are not rounded and whose `areas` (images, 4, K) keep the pixels per image.

    mmsegmentation sums the images in float32, which is exact only below 2 ** 24 pixels, and rounds to two
    decimals; here the sums are integers.
    """

    areas: Areas

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        super().compute_metrics(results)  # writes its table to the log
        self.areas = np.array([[area.numpy() for area in image] for image in results]).astype(np.int64)
        return compute_scores(self.areas)


def compute_scores(areas: Areas) -> dict[str, float]:
    """Return mIoU, mAcc and aAcc in percent from areas (images, 4, K), as mmsegmentation defines them.

    A class that is neither labelled nor predicted has no IoU, one that is not labelled no accuracy; neither
    counts in a mean.
    """
    total = areas.sum(axis=0)
    iou, acc = _compute_ratios(total, UNION), _compute_ratios(total, LABEL)
    all_acc = 100 * total[INTERSECT].sum() / total[LABEL].sum()
    return {"mIoU": float(np.nanmean(iou)), "mAcc": float(np.nanmean(acc)), "aAcc": float(all_acc)}


def compute_metrics(areas: Areas) -> dict[str, Metric]:
    """Return `compute_scores` as metrics for the record."""
    return {name: Metric(value) for name, value in compute_scores(areas).items()}


def score_per_class(areas: Areas, classes: list[str]) -> list[dict[str, Any]]:
    """Return IoU and accuracy in percent (None if not measured) and the number of pixels of each class."""
    total = areas.sum(axis=0)
    iou, acc = _compute_ratios(total, UNION), _compute_ratios(total, LABEL)
    return [
        {
            "class": name,
            "IoU": _none_if_nan(iou[k]),
            "Acc": _none_if_nan(acc[k]),
            "intersect": int(total[INTERSECT, k]),
            "union": int(total[UNION, k]),
            "label": int(total[LABEL, k]),
        }
        for k, name in enumerate(classes)
    ]


def _compute_ratios(total: Areas, denominator: int) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # 0 / 0 gives NaN, which marks a class without pixels
        ratios: NDArray[np.float64] = 100 * total[INTERSECT] / total[denominator]
    return ratios


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
