"""Compute the ceiling of a COCO split: the AP of its own objects as detections."""

import io
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import area, decode, encode

from mae_bench.data.sets.cache import load_or_compute
from mae_bench.files import file_digest, json_digest
from tasks.coco.metrics import SUFFIXES

VERSION = 1  # a higher one has every ceiling computed again
MAX_DETECTIONS = 100  # that COCO's AP counts per image and category


@dataclass(frozen=True)
class Ceiling:
    """The AP of perfect detections in percent, {"AP_box": ..., "AP_mask": ...}, and why it is below 100."""

    scores: dict[str, float]
    reasons: list[str]

    @property
    def is_lowered(self) -> bool:
        return min(self.scores.values()) < 99.995

    def describe(self, split: str) -> str:
        """Return the ceiling as a sentence."""
        scores = ", ".join(f"{score:.2f} {name}" for name, score in self.scores.items())
        reasons = f" ({'; '.join(self.reasons)})" if self.is_lowered and self.reasons else ""
        return f"{split}: a perfect detector scores {scores}{reasons}"


def load_or_compute_ceiling(annotations: Path) -> Ceiling:
    """Return the ceiling of an annotation file, from the cache if it is known by the file's digest."""
    key = json_digest([VERSION, file_digest(annotations)])
    return load_or_compute(
        "ceiling", key, lambda: asdict(compute_ceiling(annotations)), lambda value: Ceiling(**value)
    )


def compute_ceiling(annotations: Path) -> Ceiling:
    """Score the objects of an annotation file against the file with pycocotools; crowds are not detected."""
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        objects = [item for item in truth.dataset["annotations"] if not item["iscrowd"]]
        boxes = [_round_box(item["bbox"]) for item in objects]
        masks = [_encode(truth, item) for item in objects]
        values: dict[str, list[Any]] = {"bbox": boxes, "segm": masks}
        scores = {
            f"AP_{suffix}": _score(truth, objects, task, values[task]) for task, suffix in SUFFIXES.items()
        }
    counts = Counter((item["image_id"], item["category_id"]) for item in objects)
    found = {
        f"images with more than {MAX_DETECTIONS} objects of a category, of which COCO's AP counts "
        f"{MAX_DETECTIONS}": len({image for (image, _), n in counts.items() if n > MAX_DETECTIONS}),
        "boxes without area": sum(width * height == 0 for _, _, width, height in boxes),
        "masks without a pixel": sum(area(mask) == 0 for mask in masks),  # pycocotools fails on long lists
    }
    return Ceiling(scores, [f"{what}: {count}" for what, count in found.items() if count])


def _round_box(box: list[float]) -> list[float]:
    """Return a box as a detector has it: with its corners in float32."""
    x, y, width, height = box
    corners = np.array([[x, y], [x + width, y + height]], np.float32)
    return [*corners[0].tolist(), *(corners[1] - corners[0]).tolist()]


def _encode(truth: COCO, item: dict[str, Any]) -> dict[str, Any]:
    """Return the mask as pycocotools encodes it, as that of a detection.

    Run lengths from elsewhere may have runs of length 0 in their midst: compared with themselves, pycocotools
    stops at the first.
    """
    mask: dict[str, Any] = truth.annToRLE(item)
    return encode(decode(mask)) if isinstance(item["segmentation"], dict) else mask


def _score(truth: COCO, objects: list[dict[str, Any]], task: str, values: list[Any]) -> float:
    """Return the AP in percent over all areas; `values` are the boxes or the masks of the objects."""
    key = {"bbox": "bbox", "segm": "segmentation"}[task]
    detections = [
        {"image_id": item["image_id"], "category_id": item["category_id"], "score": 1.0, key: value}
        for item, value in zip(objects, values, strict=True)
    ]
    evaluation = COCOeval(truth, truth.loadRes(detections), task)
    evaluation.params.areaRng, evaluation.params.maxDets = evaluation.params.areaRng[:1], [MAX_DETECTIONS]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"]
    return 100 * float(np.mean(precision[precision > -1]))
