"""Evaluate an ImageNet-1k classifier on shifted images: ImageNet-A, -R, -Sketch, -V2 and -C."""

import time
from collections import defaultdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import nn

from mae_bench.data.checks.images import find_image_sets
from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import BadImages
from mae_bench.engine.distributed import world
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import num_params
from mae_bench.progress import Progress
from mae_bench.record import Metric
from tasks.context import TaskContext
from tasks.imagenet.config import RobustnessConfig
from tasks.imagenet.data import load_imagenet_classes
from tasks.imagenet.eval_only import LoadedClassifier, load_classifier
from tasks.imagenet.evaluate import PREDICTIONS_FILE, Feed, build_outcome, predict_images

# timm's lists of the sets with 200 classes; the other sets have all 1000.
SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}
NUM_SEVERITIES = 5
CORRUPTIONS_FILE = "corruptions.json"
# Error of AlexNet, averaged over the five severities, per corruption of ImageNet-C
# (arXiv 1903.12261; hendrycks/robustness).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


class ClassSubset(nn.Module):
    """A classifier restricted to some of its classes: logits (N, K) -> (N, len(classes)), in their order."""

    def __init__(self, model: nn.Module, classes: list[int]):
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(imgs)
        return logits[:, self.classes]


def run(config: RobustnessConfig, job: Job, progress: Progress) -> Outcome:
    """Compute top1 of the set, or mCE for ImageNet-C (lower is better), in one pass over the images.

    ImageNet-A and -R have 200 of the 1000 classes: the classifier chooses among these, as their authors
    evaluate.
    """
    layout = check_layout("image_sets", config.data)
    classes = match_classes(config.set, list(layout.classes))
    classifier = load_classifier(config, job)
    _require_imagenet_classifier(classifier)
    context = TaskContext(config, job, progress, layout, classifier.spec, classifier.report)
    model = ClassSubset(classifier.model, classes)
    sets = find_scored_sets(config)
    bad = BadImages(config.max_bad_images, sum(layout.splits[name] for name in sets))
    began, count = time.monotonic(), 0
    by_set = {}
    for number, (name, folder) in enumerate(sets.items()):
        predictions = predict_images(model, open_images(folder, "train"), bad, Feed(context), progress)
        by_set[name] = predictions.metrics()
        count += len(predictions.targets)
        if world().is_main:
            predictions.save(job.dir / (PREDICTIONS_FILE if name == "." else f"predictions-{number}.npz"))
    if "." in by_set:
        metrics = by_set["."]
    else:
        top1 = {name: each["top1"].value for name, each in by_set.items()}
        metrics = compute_corruption_metrics(top1)
        if world().is_main:
            write_json(job.dir / CORRUPTIONS_FILE, top1)
    return build_outcome(
        context,
        metrics,
        count,
        time.monotonic() - began,
        num_params(classifier.model),
        "mCE" if config.set == "imagenet-c" else "top1",
        notes=[note for note in [classifier.note, bad.note()] if note],
    )


def _require_imagenet_classifier(classifier: LoadedClassifier) -> None:
    if classifier.num_classes != len(load_imagenet_classes()):
        raise UserError(
            f"a classifier of {classifier.num_classes} classes", expected="one of ImageNet-1k's 1000 classes"
        )
    if classifier.classes and tuple(classifier.classes) != load_imagenet_classes():
        raise UserError("a classifier of 1000 other classes", expected="the classes of ImageNet-1k")


def find_scored_sets(config: RobustnessConfig) -> dict[str, Path]:
    """Return the folders that count: of ImageNet-C the fifteen corruptions of its mCE, not the extra ones."""
    sets = find_image_sets(Path(config.data))
    return {name: path for name, path in sets.items() if name == "." or name.split("/")[0] in ALEXNET_ERROR}


def match_classes(name: str, folders: list[str]) -> list[int]:
    """Return the ImageNet-1k label of each class folder.

    Raise UserError if they are not the classes of the set `name`. Folders are named by WordNet ids.
    ImageNet-V2's are numbers, which sort as text (0, 1, 10, 100, ...).
    """
    labels = {wnid: label for label, wnid in enumerate(load_imagenet_classes())}
    if name == "imagenet-v2" and all(folder.isdigit() for folder in folders):
        labels = {str(label): label for label in range(len(labels))}
    expected = load_subset_classes(name) or frozenset(labels)
    wrong = sorted(expected - set(folders)) + sorted(set(folders) - expected)
    if wrong:
        raise UserError(
            f"{name} with {len(folders)} class folders: {len(wrong)} are missing or unknown, as {wrong[0]}",
            expected=f"the {len(expected)} classes of {name}, in folders named by WordNet ids",
        )
    return [labels[folder] for folder in folders]


@cache
def load_subset_classes(name: str) -> frozenset[str]:
    """Return the 200 WordNet ids of ImageNet-A or -R, as timm lists them; empty for sets of all classes."""
    if name not in SUBSETS:
        return frozenset()
    return frozenset(files("timm.data").joinpath("_info", SUBSETS[name]).read_text(encoding="utf-8").split())


def compute_corruption_metrics(top1: dict[str, float]) -> dict[str, Metric]:
    """Return mCE and mean top1 in percent from the top1 per CORRUPTION/SEVERITY.

    Raise UserError unless all 15 x 5 are given. mCE is the mean over corruptions of the error, summed over
    severities, relative to AlexNet's (arXiv 1903.12261, section 4.1).
    """
    errors: dict[str, list[float]] = defaultdict(list)
    for name, value in top1.items():
        errors[name.split("/")[0]].append(100 - value)
    incomplete = [name for name in ALEXNET_ERROR if len(errors.get(name, [])) != NUM_SEVERITIES]
    if incomplete:
        raise UserError(
            f"ImageNet-C without all severities of {', '.join(incomplete)}",
            expected="15 corruptions with 5 severities each",
        )
    ratios = {name: fmean(errors[name]) / ALEXNET_ERROR[name] for name in ALEXNET_ERROR}
    values: list[float] = []
    for name in ALEXNET_ERROR:
        values += [top1[f"{name}/{severity}"] for severity in range(1, NUM_SEVERITIES + 1)]
    return {
        "mCE": Metric(fmean(ratios.values()), "%", "lower"),
        "top1": Metric(float(np.mean(values))),
    }
