"""IoUMetric without its rounding, and its names translated into ours, once and here."""

from typing import Any

import numpy as np
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from numpy.typing import NDArray

from mae_bench.record import Metric

MAIN_METRIC = "mIoU"
INTERSECT, UNION, PRED, LABEL = range(4)  # of the areas that IoUMetric accumulates, in pixels

Areas = NDArray[np.int64]


@METRICS.register_module()
class ExactIoUMetric(IoUMetric):
    """mmsegmentation's IoUMetric; `areas` (images, 4, K) keeps its sums an image, and its scores are not rounded.

    It adds the images up in float32, which is exact only below 2 ** 24 pixels, and rounds to two decimals; we add integers.
    """

    areas: Areas

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        super().compute_metrics(results)  # its table goes to the log
        self.areas = np.array([[area.numpy() for area in image] for image in results]).astype(np.int64)
        return scores(self.areas)


def scores(areas: Areas) -> dict[str, float]:
    """mIoU, mAcc and aAcc in percent of areas (images, 4, K).

    As mmsegmentation means them: a class that is neither labelled nor predicted has no IoU, one that is not labelled no accuracy,
    and neither counts in a mean.
    """
    total = areas.sum(axis=0)
    iou, acc = _ratios(total, UNION), _ratios(total, LABEL)
    return {
        "mIoU": float(np.nanmean(iou)), "mAcc": float(np.nanmean(acc)),
        "aAcc": float(100 * total[INTERSECT].sum() / total[LABEL].sum()),
    }  # fmt: skip


def metrics(areas: Areas) -> dict[str, Metric]:
    """`scores` as the record holds them."""
    return {name: Metric(value) for name, value in scores(areas).items()}


def per_class(areas: Areas, classes: list[str]) -> list[dict[str, Any]]:
    """Each class's IoU and accuracy in percent (None where not measured), with the pixels behind them."""
    total = areas.sum(axis=0)
    iou, acc = _ratios(total, UNION), _ratios(total, LABEL)
    return [
        {"class": name, "IoU": _measured(iou[k]), "Acc": _measured(acc[k]), "intersect": int(total[INTERSECT, k]),
         "union": int(total[UNION, k]), "label": int(total[LABEL, k])}
        for k, name in enumerate(classes)
    ]  # fmt: skip


def _ratios(total: Areas, denominator: int) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that marks a class without pixels
        return 100 * total[INTERSECT] / total[denominator]


def _measured(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
