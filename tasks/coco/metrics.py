"""Translate COCO's metrics from detectron2's names into this project's."""

import math
from collections.abc import Mapping
from itertools import product

from mae_bench.record import Metric

MAIN_METRIC = "AP_box"
SUFFIXES = {"bbox": "box", "segm": "mask"}  # detectron2's task -> ours
# Over IoU 0.5:0.95, at 0.5, at 0.75; by object area up to 32^2, up to 96^2, above.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def translate(results: Mapping[str, Mapping[str, float]], num_detections: int) -> dict[str, Metric]:
    """Return COCOEvaluator's results as {"AP_box": ..., "AP_mask": ...} in percent; NaN is left out.

    detectron2 returns NaN for everything if there are no detections. By COCO's definition the AP is then 0,
    because the recall stays 0; the APs by area are left out, since they are defined only where such objects
    exist.
    """
    if not num_detections:
        names = product(SUFFIXES.values(), NAMES[:3])
        return {f"{name}_{suffix}": Metric(0.0) for suffix, name in names}
    metrics = {}
    for task, suffix in SUFFIXES.items():
        for name in NAMES:
            if math.isfinite(results[task][name]):
                metrics[f"{name}_{suffix}"] = Metric(float(results[task][name]))
    return metrics
