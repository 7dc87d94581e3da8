"""A classifier as it is, with no training, on the validation images."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from backbones.classifier import read_head
from backbones.translating.report import ConversionReport
from mae_bench.config import expand_variables
from mae_bench.data.checks.layouts import LayoutReport, check_layout
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import BadImages
from mae_bench.engine.distributed import world
from mae_bench.errors import UserError
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import num_params
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.imagenet.classify import Classifier, load_at_size
from tasks.imagenet.config import EvalOnlyConfig, ImageConfig
from tasks.imagenet.data import class_difference, doubt, require_set
from tasks.imagenet.evaluate import PREDICTIONS_FILE, Feed, Predictions, outcome_of, predict_images

NUMBER = re.compile(r"(\d{8})\.JPEG$", re.IGNORECASE)  # of ILSVRC2012_val_00000001.JPEG


@dataclass(frozen=True)
class Loaded:
    """A classifier with its own head. classes: the names of its outputs, none where the file does not say."""

    model: Classifier
    spec: BackboneSpec
    report: ConversionReport
    classes: list[str]

    @property
    def doubt(self) -> str:
        """A note where the file does not name its classes."""
        order = "in the order of the class folders' names (WordNet ids)"
        return "" if self.classes else f"the file does not name the classifier's classes: taken {order}"

    @property
    def num_classes(self) -> int:
        return self.model.head.out_features

    def outcome(
        self,
        metrics: dict[str, Metric],
        main_metric: str,
        data: LayoutReport,
        counted: int,
        job: Job,
        config: ImageConfig,
        seconds: float,
        notes: list[str],
    ) -> Outcome:
        """The Outcome on a set of images."""
        params = num_params(self.model)
        return outcome_of(
            metrics,
            counted,
            data,
            config,
            self.spec,
            self.report,
            job,
            seconds,
            params,
            main_metric,
            notes=notes,
        )


def load_classifier(config: ImageConfig, job: Job) -> Loaded:
    """The classifier behind job.backbone, pooled as its weights were trained; UserError where the checkpoint has no head."""
    head, classes = read_head(job.backbone)
    vit, spec, report = load_at_size(config, job.backbone)
    if head.in_features != vit.num_features:
        raise UserError(
            f"a head for {head.in_features} features on a backbone of {vit.num_features}",
            expected="pooled features of one width",
        )
    model = Classifier(vit, spec, head.out_features, spec.global_pool, fc_norm=False)
    model.head = head
    return Loaded(model.to(job.device).eval(), spec, report, classes)


def run(config: EvalOnlyConfig, job: Job, progress: Progress) -> Outcome:
    """top1, top5 and loss of the classifier on every validation image; with `real`, also against ReaL's labels."""
    data = check_layout("imagenet_val", config.data)
    if config.expect:
        require_set(config.expect, data, ("val",))
    if config.real and (difference := class_difference(data.classes)):
        raise UserError(
            f"real={config.real} and {config.data} {difference}",
            expected="ImageNet-1k: ReaL counts its classes",
        )
    loaded = load_classifier(config, job)
    if loaded.num_classes != len(data.classes):
        raise UserError(
            f"a classifier of {loaded.num_classes} classes on {len(data.classes)} class folders",
            expected="the classes that it was trained on",
            fix="give their folder as data, or a checkpoint with a head for these (finetune with export_classifier=true)",
        )
    if loaded.classes and tuple(loaded.classes) != data.classes:
        different = sorted(set(loaded.classes) ^ set(data.classes))[:3] or "their order"
        raise UserError(
            f"the classifier's classes are not those of {config.data}: {different}",
            expected="the same class folders",
            fix="give the folder of the set that it was trained on",
        )
    images = open_images(config.data, "val")
    bad = BadImages(config.max_bad_images, len(images))
    began = time.monotonic()
    found = predict_images(
        loaded.model, images, bad, Feed(config, loaded.spec, torch.device(job.device)), progress
    )
    if world().is_main:
        found.save(job.dir / PREDICTIONS_FILE)
    metrics = found.metrics()
    if config.real:
        names = [images.name(int(i)) for i in found.indices]
        metrics["top1_real"] = Metric(
            real_accuracy(found, names, read_real(Path(expand_variables(config.real))))
        )
    notes = [note for note in [*data.notes, doubt(data), loaded.doubt, bad.note()] if note]
    return loaded.outcome(
        metrics, "top1", data, len(found.targets), job, config, time.monotonic() - began, notes
    )


def read_real(path: Path) -> list[list[int]]:
    """ReaL's labels: a list of classes for each of the 50,000 validation images in the order of their numbers."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}", expected="real.json of google-research/reassessed-imagenet"
        ) from error
    if not isinstance(labels, list) or not all(isinstance(item, list) for item in labels):
        raise UserError(
            f"{path} holds a {type(labels).__name__}", expected="a list of lists of class numbers"
        )
    return labels


def real_accuracy(found: Predictions, names: list[str], labels: list[list[int]]) -> float:
    """Share in percent of images whose first class is among ReaL's labels; images without a label do not count
    (arXiv 2006.07159, section 3)."""
    numbers = [NUMBER.search(name) for name in names]
    if None in numbers:
        raise UserError(
            f"{names[numbers.index(None)]} has no number",
            expected="ILSVRC2012_val_00000001.JPEG and its like: ReaL goes by numbers",
        )
    hits = [
        int(top) in accepted
        for top, number in zip(found.top5[:, 0], numbers, strict=True)
        if number and (accepted := _labels_of(labels, int(number[1])))
    ]
    if not hits:
        raise UserError(
            "none of the images has a label of ReaL", expected="the images of ImageNet's validation set"
        )
    return 100 * float(np.mean(hits))


def _labels_of(labels: list[list[int]], number: int) -> list[int]:
    if not 1 <= number <= len(labels):
        raise UserError(
            f"image number {number} with {len(labels)} entries of ReaL", expected="an entry an image"
        )
    return labels[number - 1]
