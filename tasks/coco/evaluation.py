"""Score a detector on a COCO split with detectron2's COCOEvaluator and keep the detections as COCO JSON."""

import json
from pathlib import Path
from typing import Any

from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from torch import nn

from mae_bench.progress import Progress
from mae_bench.record import Metric
from tasks.coco.data import GoodImages
from tasks.coco.metrics import SUFFIXES, translate

DETECTIONS_FILE = "coco_instances_results.json"  # as COCOEvaluator names it


def evaluate(
    model: nn.Module, loader: GoodImages, name: str, folder: Path, progress: Progress
) -> tuple[dict[str, Metric], int]:
    """Return metrics in percent and the number of detections, which are saved in folder/DETECTIONS_FILE.

    An image that the loader skips counts as an image without detections.
    """
    evaluator = COCOEvaluator(
        name, tasks=tuple(SUFFIXES), distributed=False, output_dir=str(folder), use_fast_impl=False
    )
    progress.stage("evaluate", len(loader))
    done = iter(range(1, len(loader) + 1))
    callbacks = {"after_inference": lambda: progress.step(next(done))}
    results: dict[str, Any] = inference_on_dataset(model, loader, evaluator, callbacks=callbacks)
    (folder / "instances_predictions.pth").unlink()  # the same detections, pickled
    num_detections = len(json.loads((folder / DETECTIONS_FILE).read_text()))
    return translate(results, num_detections), num_detections
