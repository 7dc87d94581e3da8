"""Open and check both splits of an ImageNet layout before anything is trained on them."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mae_bench.data.checks.layouts import LayoutReport, check_layout
from mae_bench.data.checks.overlap import load_or_find_overlap, note_overlap
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import BadImages, ImageSource
from mae_bench.errors import UserError
from mae_bench.files import json_digest
from tasks.imagenet.config import ImageConfig

IMAGENET_SIZES = {"train": 1_281_167, "val": 50_000}
# json_digest of the sorted WordNet ids of ImageNet-1k
IMAGENET_CLASSES = "5e738e464c43c92037bbb4252eeb6ba2c306091861443ae7e182e28c9662324e"
ANOTHER_SET = "set expect=null for another data set (tasks.NAME.expect=null in evaluate and in suites)"
ABOUT_A_THOUSAND = 900, 1100
WORDNET_ID = re.compile(r"n\d{8}")

# Number of classes and of images per split, as the publishers state them.
TRANSFER_SETS: dict[str, tuple[int, dict[str, int]]] = {
    "inat-2017": (5089, {"train": 579_184, "val": 95_986}),
    "inat-2018": (8142, {"train": 437_513, "val": 24_426}),
    "inat-2019": (1010, {"train": 265_213, "val": 3_030}),
    "places205": (205, {"train": 2_448_873, "val": 20_500}),
    "places365": (365, {"train": 1_803_460, "val": 36_500}),
}


@dataclass(frozen=True)
class Data:
    """Both splits of a checked ImageNet layout, and the images of each that fail to decode.

    warnings: what looks wrong with the data but does not stop the task ("" for nothing).
    """

    layout: LayoutReport
    train: ImageSource
    val: ImageSource
    bad_train: BadImages
    bad_val: BadImages
    warnings: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return len(self.layout.classes)

    @property
    def notes(self) -> list[str]:
        """The notes for the record."""
        notes = (*self.layout.notes, *self.warnings, self.bad_train.note(), self.bad_val.note())
        return [note for note in notes if note]


def open_data(config: ImageConfig) -> Data:
    """Check the layout and open both splits; raise UserError if it is not the data set of `config.expect`."""
    root = Path(config.data)
    layout = check_layout("imagenet", root)
    if config.expect:
        require_set(config.expect, layout)
    train, val = open_images(root, "train"), open_images(root, "val")
    overlap = describe_overlap(layout, train, val)
    if overlap and config.overlap == "refuse":
        raise UserError(
            overlap,
            expected="splits that share no image",
            fix="remove the images from one split, or set tasks.NAME.overlap=note",
        )
    bad_train, bad_val = (BadImages(config.max_bad_images, len(images)) for images in (train, val))
    return Data(layout, train, val, bad_train, bad_val, [describe_near_imagenet(layout), overlap])


def describe_overlap(layout: LayoutReport, train: ImageSource, val: ImageSource) -> str:
    """Return a note on the images that are in both splits, "" if there are none.

    The result is cached per digest of the data set.
    """
    return note_overlap(load_or_find_overlap(train, val, layout.digest), len(val))


@cache
def load_imagenet_classes() -> tuple[str, ...]:
    """Return the 1000 WordNet ids of ImageNet-1k in the order of their labels, as timm lists them."""
    from timm.data.imagenet_info import ImageNetInfo  # imported late: checking a folder does not need torch

    info: Any = ImageNetInfo("imagenet-1k")
    return tuple(info.label_names())


def require_set(name: str, layout: LayoutReport, splits: tuple[str, ...] = ("train", "val")) -> None:
    """Raise UserError unless classes and sizes of `splits` are those of the set `name` (config.expect)."""
    if name == "imagenet-1k":
        require_imagenet(layout, splits)
        return
    num_classes, sizes = TRANSFER_SETS[name]
    sizes = {split: sizes[split] for split in splits}
    if (len(layout.classes), layout.splits) != (num_classes, sizes):
        raise UserError(
            f"{layout.root} has {len(layout.classes)} classes and {layout.splits} images",
            expected=f"those of {name}: {num_classes} classes and {sizes} images",
            fix=f"give the folder of the complete set, or {ANOTHER_SET}",
        )


def require_imagenet(layout: LayoutReport, splits: tuple[str, ...] = ("train", "val")) -> None:
    """Raise UserError, naming the difference, unless classes, order and sizes are those of ImageNet-1k."""
    fix = f"give the folder of ImageNet-1k, or {ANOTHER_SET}"
    difference = describe_class_difference(layout.classes)
    if difference:
        raise UserError(
            f"{layout.root} {difference}",
            expected="the 1000 classes of ImageNet-1k by their WordNet ids",
            fix=fix,
        )
    sizes = {split: IMAGENET_SIZES[split] for split in splits}
    if layout.splits != sizes:
        raise UserError(f"{layout.root} has {layout.splits} images", expected=f"{sizes}", fix=fix)


def describe_class_difference(classes: tuple[str, ...]) -> str:
    """Return how a list of classes differs from ImageNet-1k's, "" if it is the same list."""
    if json_digest(list(classes)) == IMAGENET_CLASSES:
        return ""
    known = load_imagenet_classes()
    missing, unknown = sorted(set(known) - set(classes)), sorted(set(classes) - set(known))
    if not missing and not unknown:
        pairs = enumerate(zip(classes, known, strict=False))
        first = next((label for label, (name, wnid) in pairs if name != wnid), len(known))
        return f"numbers the classes of ImageNet-1k differently, from label {first} ({classes[first]}) on"
    return (
        f"has {len(classes)} classes: {len(missing)} of ImageNet-1k are missing ({_list_some(missing)}), "
        f"{len(unknown)} are not in it ({_list_some(unknown)})"
    )


def _list_some(names: list[str]) -> str:
    return ", ".join(names[:3]) or "none"


def describe_near_imagenet(layout: LayoutReport) -> str:
    """Return a note if a set of about a thousand classes looks like ImageNet-1k but differs from it, else "".

    Its labels then mean other classes than those of every ImageNet-1k classifier, or its scores are for other
    images.
    """
    classes = layout.classes
    if not ABOUT_A_THOUSAND[0] <= len(classes) <= ABOUT_A_THOUSAND[1]:
        return ""
    if all(name.isdecimal() for name in classes):
        return _describe_sorted_numbers(classes)
    num_wordnet_ids = sum(WORDNET_ID.fullmatch(name) is not None for name in classes)
    if 2 * num_wordnet_ids < len(classes):
        return ""
    difference = describe_class_difference(classes)
    if difference:
        return f"nearly ImageNet-1k: the set {difference}"
    wrong = [
        f"{count} in {split} instead of {IMAGENET_SIZES[split]}"
        for split, count in layout.splits.items()
        if count != IMAGENET_SIZES.get(split, count)
    ]
    return (
        f"the classes are ImageNet-1k's but the number of images is not: {', '.join(wrong)}" if wrong else ""
    )


def _describe_sorted_numbers(classes: tuple[str, ...]) -> str:
    for label, name in enumerate(classes):
        if label != int(name):
            return f"the class folders are numbers and sorted as text: label {label} is class {name}"
    return ""
