"""A classifier of ImageNet-1k on images unlike its training's: ImageNet-A, -R, -Sketch, -V2 and -C."""

import time
from collections import defaultdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import nn

from mae_bench.data.checks.layouts import check_layout, image_sets
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import BadImages
from mae_bench.engine.distributed import world
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from mae_bench.record import Metric
from tasks.imagenet.config import RobustnessConfig
from tasks.imagenet.data import imagenet_classes
from tasks.imagenet.eval_only import load_classifier
from tasks.imagenet.evaluate import PREDICTIONS_FILE, Feed, predict_images

SUBSETS = {
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
}  # of 200 classes; the others have all
SEVERITIES = 5
CORRUPTIONS_FILE = "corruptions.json"
# Mean error of AlexNet over the five severities, of ImageNet-C's fifteen corruptions (arXiv 1903.12261; hendrycks/robustness).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip


class Among(nn.Module):
    """A classifier that chooses among some of its classes: logits (N, K) -> (N, len(classes)), in their order."""

    def __init__(self, model: nn.Module, classes: list[int]):
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        return self.model(imgs)[:, self.classes]


def run(config: RobustnessConfig, job: Job, progress: Progress) -> Outcome:
    """top1 of the set, or mCE of ImageNet-C (lower is better); one pass over each image.

    ImageNet-A and -R hold 200 of the 1000 classes: the classifier chooses among these, as their authors evaluate.
    """
    data = check_layout("image_sets", config.data)
    chosen = classes_of(config.set, list(data.classes))
    loaded = load_classifier(config, job)
    if loaded.num_classes != len(imagenet_classes()):
        raise UserError(f"a classifier of {loaded.num_classes} classes", expected="one of ImageNet-1k's 1000")
    if loaded.classes and tuple(loaded.classes) != imagenet_classes():
        raise UserError("a classifier of 1000 other classes", expected="the classes of ImageNet-1k")
    model = Among(loaded.model, chosen)
    feed, sets = Feed(config, loaded.spec, torch.device(job.device)), counted_sets(config)
    bad = BadImages(config.max_bad_images, sum(data.splits[name] for name in sets))
    began, count = time.monotonic(), 0
    found = {}
    for number, (name, folder) in enumerate(sets.items()):
        predictions = predict_images(model, open_images(folder, "train"), bad, feed, progress)
        found[name] = predictions.metrics()
        count += len(predictions.targets)
        if world().is_main:
            predictions.save(job.dir / (PREDICTIONS_FILE if name == "." else f"predictions-{number}.npz"))
    metrics = (
        found["."]
        if "." in found
        else corruption_metrics({name: each["top1"].value for name, each in found.items()})
    )
    if world().is_main and "." not in found:
        write_json(job.dir / CORRUPTIONS_FILE, {name: each["top1"].value for name, each in found.items()})
    main = "mCE" if config.set == "imagenet-c" else "top1"
    notes = [note for note in [loaded.doubt, bad.note()] if note]
    return loaded.outcome(metrics, main, data, count, job, config, time.monotonic() - began, notes)


def counted_sets(config: RobustnessConfig) -> dict[str, Path]:
    """The folders of classes that count: of ImageNet-C the fifteen corruptions of its mCE, without the extra ones."""
    found = image_sets(Path(config.data))
    return {name: path for name, path in found.items() if name == "." or name.split("/")[0] in ALEXNET_ERROR}


def classes_of(name: str, folders: list[str]) -> list[int]:
    """ImageNet-1k's class of each folder, in the folders' order; UserError for a set with other classes than `name` has.

    Folders are WordNet ids, or ImageNet-V2's numbers: these sort as text (0, 1, 10, 100 ...) and are read as numbers.
    """
    known = {wnid: place for place, wnid in enumerate(imagenet_classes())}
    if name == "imagenet-v2" and all(folder.isdigit() for folder in folders):
        known = {str(place): place for place in range(len(known))}
    expected = subset_of(name) or frozenset(known)
    if absent := sorted(expected - set(folders)) + sorted(set(folders) - expected):
        raise UserError(
            f"{name} with {len(folders)} class folders: {len(absent)} are missing or of another set, such as {absent[0]}",
            expected=f"the {len(expected)} classes of {name}, in folders named by WordNet ids",
        )
    return [known[folder] for folder in folders]


@cache
def subset_of(name: str) -> frozenset[str]:
    """The 200 WordNet ids of ImageNet-A or -R, as timm lists them; none for sets of all classes."""
    if name not in SUBSETS:
        return frozenset()
    return frozenset(files("timm.data").joinpath("_info", SUBSETS[name]).read_text(encoding="utf-8").split())


def corruption_metrics(top1: dict[str, float]) -> dict[str, Metric]:
    """mCE in percent, and the mean top1, from the top1 of every CORRUPTION/SEVERITY; UserError unless all 15 x 5 are there.

    mCE: the mean over corruptions of the error, summed over severities, over AlexNet's (arXiv 1903.12261, section 4.1).
    """
    errors: dict[str, list[float]] = defaultdict(list)
    for name, value in top1.items():
        errors[name.split("/")[0]].append(100 - value)
    absent = [name for name in ALEXNET_ERROR if len(errors.get(name, [])) != SEVERITIES]
    if absent:
        raise UserError(
            f"ImageNet-C without all severities of {', '.join(absent)}",
            expected="15 corruptions with 5 severities each",
        )
    ratios = {name: fmean(errors[name]) / ALEXNET_ERROR[name] for name in ALEXNET_ERROR}
    mean_top1 = float(
        np.mean(
            [top1[f"{name}/{severity}"] for name in ALEXNET_ERROR for severity in range(1, SEVERITIES + 1)]
        )
    )
    return {"mCE": Metric(fmean(ratios.values()), "%", "lower"), "top1": Metric(mean_top1)}
