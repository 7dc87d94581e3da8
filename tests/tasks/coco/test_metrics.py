"""COCO's metrics under our names: known answers from the real COCOEvaluator."""

import contextlib
import io
import json
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is optional: make setup")

from detectron2.evaluation import COCOEvaluator  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

from tasks.coco.data import register  # noqa: E402
from tasks.coco.metrics import translate  # noqa: E402

pytestmark = pytest.mark.framework


def score(coco: Path, shift: float) -> dict[str, float]:
    """Return the metrics of detections that are the ground truth, moved right by `shift` pixels."""
    names = register(coco, f"shift {shift}", coco / "unused")
    evaluator = COCOEvaluator(names.val, tasks=("bbox", "segm"), distributed=False, use_fast_impl=False)
    evaluator.reset()
    truth = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    for image in truth["images"]:
        found = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor(
            [[x + shift, y, x + shift + w, y + h] for x, y, w, h in (a["bbox"] for a in found)]
        )
        masks = torch.zeros(len(found), 40, 48, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances(
            (40, 48), pred_boxes=Boxes(boxes), scores=torch.full((len(found),), 0.9), pred_masks=masks
        )
        instances.pred_classes = torch.tensor([(3, 7).index(a["category_id"]) for a in found])
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return {
            name: metric.value
            for name, metric in translate(evaluator.evaluate(), len(truth["annotations"])).items()
        }


def test_perfect_detections_have_an_ap_of_100(coco: Path) -> None:
    # no object is medium or large: these APs are absent, not 0
    names = [f"{ap}_{kind}" for ap, kind in product(("AP", "AP50", "AP75", "APs"), ("box", "mask"))]
    assert score(coco, 0.0) == pytest.approx(dict.fromkeys(names, 100.0))


def test_an_overlap_of_three_fifths_counts_at_three_of_ten_thresholds(coco: Path) -> None:
    found = score(coco, 4.0)  # of 16 pixels: the IoU is 12 / 20 = 0.6, so 0.5, 0.55 and 0.6 are met
    assert found["AP50_box"] == pytest.approx(100)
    assert found["AP75_box"] == pytest.approx(0)
    assert found["AP_box"] == found["AP_mask"] == pytest.approx(30)


def test_no_detection_is_an_ap_of_0_and_nothing_by_area() -> None:
    nan = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), float("nan"))
    metrics = translate({"bbox": nan, "segm": nan}, 0)
    assert {name: metric.value for name, metric in metrics.items()} == {
        "AP_box": 0,
        "AP50_box": 0,
        "AP75_box": 0,
        "AP_mask": 0,
        "AP50_mask": 0,
        "AP75_mask": 0,
    }
