"""The data of an ImageNet protocol: both splits, checked before anything is trained, and the budget of images that may be bad."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mae_bench.data.checks.layouts import LayoutReport, check_layout
from mae_bench.data.checks.overlap import known_overlap, overlap_note
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import BadImages, ImageSource
from mae_bench.errors import UserError
from mae_bench.files import json_digest
from tasks.imagenet.config import ImageConfig

IMAGENET_SIZES = {"train": 1_281_167, "val": 50_000}
IMAGENET_CLASSES = "5e738e464c43c92037bbb4252eeb6ba2c306091861443ae7e182e28c9662324e"  # json_digest of the sorted WordNet ids
ANOTHER_SET = "set expect=null for another data set (tasks.NAME.expect=null in evaluate and in suites)"
ABOUT_A_THOUSAND = 900, 1100
WORDNET_ID = re.compile(r"n\d{8}")
TRANSFER_SETS: dict[str, tuple[int, dict[str, int]]] = {  # classes and images, as the publishers count them
    "inat-2017": (5089, {"train": 579_184, "val": 95_986}),
    "inat-2018": (8142, {"train": 437_513, "val": 24_426}),
    "inat-2019": (1010, {"train": 265_213, "val": 3_030}),
    "places205": (205, {"train": 2_448_873, "val": 20_500}),
    "places365": (365, {"train": 1_803_460, "val": 36_500}),
}


@dataclass(frozen=True)
class Data:
    """Both splits of an ImageNet layout, checked, with the budget of images that may fail to decode. told: what looks odd."""

    report: LayoutReport
    train: ImageSource
    val: ImageSource
    bad_train: BadImages
    bad_val: BadImages
    told: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return len(self.report.classes)

    @property
    def notes(self) -> list[str]:
        return [
            note
            for note in (*self.report.notes, *self.told, self.bad_train.note(), self.bad_val.note())
            if note
        ]


def open_data(config: ImageConfig) -> Data:
    """Checks the layout before anything is trained; UserError for what is not the data set that the config expects."""
    root = Path(config.data)
    report = check_layout("imagenet", root)
    if config.expect:
        require_set(config.expect, report)
    train, val = open_images(root, "train"), open_images(root, "val")
    told = [doubt(report), overlap_of(report, train, val)]
    if told[1] and config.overlap == "refuse":
        raise UserError(
            told[1],
            expected="splits that share no image",
            fix="remove them from one split, or set tasks.NAME.overlap=note",
        )
    bad_train, bad_val = (BadImages(config.max_bad_images, len(images)) for images in (train, val))
    return Data(report, train, val, bad_train, bad_val, told)


def overlap_of(report: LayoutReport, train: ImageSource, val: ImageSource) -> str:
    """A note on images that both splits have; "" for none. It is looked for once for each digest of a set."""
    return overlap_note(known_overlap(train, val, report.digest), len(val))


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k in the order of their labels, as timm lists them."""
    from timm.data import ImageNetInfo  # here, for to look at a folder should not wait for torch

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def require_set(name: str, report: LayoutReport, splits: tuple[str, ...] = ("train", "val")) -> None:
    """UserError unless classes and the splits' sizes are those of the data set of that name (config.expect)."""
    if name == "imagenet-1k":
        require_imagenet(report, splits)
        return
    num_classes, sizes = TRANSFER_SETS[name]
    sizes = {split: sizes[split] for split in splits}
    if (len(report.classes), report.splits) != (num_classes, sizes):
        raise UserError(
            f"{report.root} has {len(report.classes)} classes and {report.splits} images",
            expected=f"those of {name}: {num_classes} classes and {sizes} images",
            fix=f"give the folder of the whole set, or {ANOTHER_SET}",
        )


def require_imagenet(report: LayoutReport, splits: tuple[str, ...] = ("train", "val")) -> None:
    """UserError unless classes, their order and the splits' sizes are those of ImageNet-1k; it names the difference."""
    fix = f"give the folder of ImageNet-1k, or {ANOTHER_SET}"
    if difference := class_difference(report.classes):
        raise UserError(
            f"{report.root} {difference}",
            expected="the 1000 classes of ImageNet-1k by their WordNet ids",
            fix=fix,
        )
    if report.splits != (sizes := {split: IMAGENET_SIZES[split] for split in splits}):
        raise UserError(f"{report.root} has {report.splits} images", expected=f"{sizes}", fix=fix)


def class_difference(classes: tuple[str, ...]) -> str:
    """How a list of classes differs from ImageNet-1k's; "" for the very list."""
    if json_digest(list(classes)) == IMAGENET_CLASSES:
        return ""
    known = imagenet_classes()
    absent, strange = sorted(set(known) - set(classes)), sorted(set(classes) - set(known))
    if not absent and not strange:
        first = next(
            (i for i, (ours, theirs) in enumerate(zip(classes, known, strict=False)) if ours != theirs),
            len(known),
        )
        return f"numbers the classes of ImageNet-1k differently, from label {first} ({classes[first]}) on"
    return (
        f"has {len(classes)} classes: {len(absent)} of ImageNet-1k are absent ({', '.join(absent[:3]) or 'none'}), "
        f"{len(strange)} are not of it ({', '.join(strange[:3]) or 'none'})"
    )


def doubt(report: LayoutReport) -> str:
    """A note on a set of about a thousand classes that looks like ImageNet-1k and is not quite: a label then means another class
    than to every classifier of it, or the numbers are of other images. "" for ImageNet-1k, and for what does not look like it."""
    classes = report.classes
    if not ABOUT_A_THOUSAND[0] <= len(classes) <= ABOUT_A_THOUSAND[1]:
        return ""
    if all(name.isdecimal() for name in classes):
        moved = next(((i, name) for i, name in enumerate(classes) if i != int(name)), None)
        return (
            f"the class folders are numbers and sorted as text: label {moved[0]} is class {moved[1]}"
            if moved
            else ""
        )
    if 2 * sum(map(bool, map(WORDNET_ID.fullmatch, classes))) < len(classes):
        return ""
    if difference := class_difference(classes):
        return f"nearly ImageNet-1k: the set {difference}"
    odd = [f"{count} in {split} instead of {IMAGENET_SIZES[split]}" for split, count in report.splits.items()
           if count != IMAGENET_SIZES.get(split, count)]  # fmt: skip
    return f"the classes are ImageNet-1k's and the images are not: {', '.join(odd)}" if odd else ""
