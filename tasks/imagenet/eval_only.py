"""Evaluate a trained classifier on the validation images, without any training."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbones.classifier import load_head
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
from tasks.context import TaskContext
from tasks.imagenet.classify import Classifier, load_at_size
from tasks.imagenet.config import EvalOnlyConfig, ImageConfig
from tasks.imagenet.data import describe_class_difference, describe_near_imagenet, require_set
from tasks.imagenet.evaluate import PREDICTIONS_FILE, Feed, Predictions, build_outcome, predict_images

NUMBER = re.compile(r"(\d{8})\.JPEG$", re.IGNORECASE)  # of ILSVRC2012_val_00000001.JPEG


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier with its own head.

    classes: the names of its outputs, empty if the file does not name them.
    """

    model: Classifier
    spec: BackboneSpec
    report: ConversionReport
    classes: list[str]

    @property
    def note(self) -> str:
        """A note if the file does not name its classes."""
        order = "in the order of the class folders' names (WordNet ids)"
        return "" if self.classes else f"the file does not name the classifier's classes: taken {order}"

    @property
    def num_classes(self) -> int:
        return self.model.head.out_features


def load_classifier(config: ImageConfig, job: Job) -> LoadedClassifier:
    """Load the classifier job.backbone, pooled as it was trained; raise UserError if it has no head."""
    head, classes = load_head(job.backbone)
    vit, spec, report = load_at_size(config, job.backbone)
    if head.in_features != vit.num_features:
        raise UserError(
            f"a head for {head.in_features} features on a backbone of {vit.num_features}",
            expected="a head as wide as the pooled features",
        )
    model = Classifier(vit, spec, head.out_features, spec.global_pool, fc_norm=False)
    model.head = head
    return LoadedClassifier(model.to(job.device).eval(), spec, report, classes)


def run(config: EvalOnlyConfig, job: Job, progress: Progress) -> Outcome:
    """Compute top1, top5 and loss over the validation images; with config.real also top1 on ReaL's labels."""
    layout = check_layout("imagenet_val", config.data)
    if config.expect:
        require_set(config.expect, layout, ("val",))
    if config.real:
        _require_imagenet_classes(config, layout)
    classifier = load_classifier(config, job)
    _require_same_classes(classifier, layout, config.data)
    context = TaskContext(config, job, progress, layout, classifier.spec, classifier.report)
    images = open_images(config.data, "val")
    bad = BadImages(config.max_bad_images, len(images))
    began = time.monotonic()
    predictions = predict_images(classifier.model, images, bad, Feed(context), progress)
    if world().is_main:
        predictions.save(job.dir / PREDICTIONS_FILE)
    metrics = predictions.metrics()
    if config.real:
        names = [images.name(int(i)) for i in predictions.indices]
        labels = read_real_labels(Path(expand_variables(config.real)))
        metrics["top1_real"] = Metric(compute_real_accuracy(predictions, names, labels))
    seconds = time.monotonic() - began
    notes = [*layout.notes, describe_near_imagenet(layout), classifier.note, bad.note()]
    return build_outcome(
        context,
        metrics,
        len(predictions.targets),
        seconds,
        num_params(classifier.model),
        notes=[note for note in notes if note],
    )


def _require_imagenet_classes(config: EvalOnlyConfig, layout: LayoutReport) -> None:
    difference = describe_class_difference(layout.classes)
    if difference:
        raise UserError(
            f"real={config.real} and {config.data} {difference}",
            expected="ImageNet-1k, whose classes ReaL labels",
        )


def _require_same_classes(classifier: LoadedClassifier, layout: LayoutReport, data: str) -> None:
    """Raise UserError unless the classifier's classes are the class folders of `data`."""
    if classifier.num_classes != len(layout.classes):
        raise UserError(
            f"a classifier of {classifier.num_classes} classes on {len(layout.classes)} class folders",
            expected="the classes that it was trained on",
            fix="give their folder as data, or a checkpoint with a head for these classes "
            "(finetune with export_classifier=true)",
        )
    if classifier.classes and tuple(classifier.classes) != layout.classes:
        different = sorted(set(classifier.classes) ^ set(layout.classes))[:3] or "their order"
        raise UserError(
            f"the classifier's classes are not those of {data}: {different}",
            expected="the same class folders",
            fix="give the folder of the set that it was trained on",
        )


def read_real_labels(path: Path) -> list[list[int]]:
    """Read ReaL's labels: a list of classes for each of the 50,000 validation images, by number."""
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


def compute_real_accuracy(predictions: Predictions, names: list[str], labels: list[list[int]]) -> float:
    """Return the percentage of images whose first class is among ReaL's labels (arXiv 2006.07159, section 3).

    Images without a label do not count.
    """
    hits = []
    for top, name in zip(predictions.top5[:, 0], names, strict=True):
        accepted = _get_labels(labels, name)
        if accepted:
            hits.append(int(top) in accepted)
    if not hits:
        raise UserError(
            "none of the images has a label of ReaL", expected="the images of ImageNet's validation set"
        )
    return 100 * float(np.mean(hits))


def _get_labels(labels: list[list[int]], name: str) -> list[int]:
    """Return the labels of an image by the number in its name."""
    match = NUMBER.search(name)
    if match is None:
        raise UserError(
            f"{name} has no number",
            expected="names such as ILSVRC2012_val_00000001.JPEG, whose numbers ReaL's labels follow",
        )
    number = int(match[1])
    if not 1 <= number <= len(labels):
        raise UserError(
            f"image number {number} with {len(labels)} entries of ReaL", expected="one entry per image"
        )
    return labels[number - 1]
