"""COCO's metrics under this project's names: the one place where detectron2's spelling is translated."""

import math
from collections.abc import Mapping

from mae_bench.record import Metric

MAIN_METRIC = "AP_box"
SUFFIXES = {"bbox": "box", "segm": "mask"}  # detectron2's task -> ours
NAMES = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
)  # over IoU 0.5:0.95, at 0.5, at 0.75, by area below 32^2, to 96^2, above


def translate(results: Mapping[str, Mapping[str, float]], num_detections: int) -> dict[str, Metric]:
    """COCOEvaluator's results -> {"AP_box": ..., "AP50_box": ..., "AP_mask": ...} in percent; what is nan is absent.

    detectron2 gives nan for everything when nothing was detected. By COCO's definition the AP is then 0 (recall stays 0), and
    it is reported so, without the AP by area, which is defined only where such objects exist.
    """
    if not num_detections:
        return {f"{name}_{suffix}": Metric(0.0) for suffix in SUFFIXES.values() for name in NAMES[:3]}
    return {
        f"{name}_{suffix}": Metric(float(results[task][name]))
        for task, suffix in SUFFIXES.items()
        for name in NAMES
        if math.isfinite(results[task][name])
    }
