"""Check that a folder has the ImageNet, COCO or ADE20K layout, or images only, and report its content."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mae_bench.data.checks.ade20k import check_ade20k
from mae_bench.data.checks.coco import check_coco
from mae_bench.data.checks.folders import EXPECTED, Content, describe_folder
from mae_bench.data.checks.images import check_image_sets, check_imagenet, check_imagenet_val, check_images
from mae_bench.data.sets.listed import find_published
from mae_bench.data.sets.open import find_splits, read_dataset_name
from mae_bench.data.sets.shards import is_pattern
from mae_bench.data.sets.source import is_image
from mae_bench.errors import UserError, did_you_mean

SOURCES = ("imagenet", "images", "imagenet_val")  # layouts that open_images reads, in any form
MARKS: dict[str, tuple[str, ...]] = {  # any of them marks the root of the layout, complete or not
    "imagenet": ("train", "val", "train.tar", "val.tar"),
    "images": ("train", "train.tar"),
    "imagenet_val": ("val", "val.tar"),
    "image_sets": (".",),
    "coco": (
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "train2017",
        "val2017",
    ),
    "ade20k": ("images/training", "images/validation", "annotations/training", "annotations/validation"),
}


@dataclass(frozen=True)
class LayoutReport:
    """Content of a checked folder.

    splits: number of images per split.
    classes: class names in the order of their labels.
    digest: SHA-256 over the sorted relative paths of the layout's files with their sizes; over the content of
    annotations, and over the content of some images of image sets. A tar counts as the files in it, a packed
    set as its content.
    notes: irregularities that do not prevent a job.
    split_digests: SHA-256 per split, over its own files and those that all splits share.
    labels: per split of ADE20K, the pixels of labels 0 (ignored), 1, ... in all label maps.
    """

    layout: str
    name: str
    root: Path
    splits: dict[str, int]
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()
    split_digests: dict[str, str] = field(default_factory=dict)
    labels: dict[str, tuple[int, ...]] = field(default_factory=dict)


def check_layout(layout: str, root: str | Path, *, thorough: bool = False) -> LayoutReport:
    """Check `root` without decoding images; raise UserError with what was expected and what was found.

    A million files are listed only once: a cached index is used while no folder has changed
    (mae_bench.data.sets.index). Label maps are decoded once, all of them.
    thorough: list every file and read every label map again, and read the content of a packed set.
    """
    if layout not in CHECKS:
        raise UserError(
            f"unknown layout {layout!r}",
            expected=f"one of {', '.join(CHECKS)}",
            fix=did_you_mean(layout, CHECKS),
        )
    if layout in SOURCES and is_pattern(str(root)):
        content = CHECKS[layout](str(root), thorough)
        return LayoutReport(layout, read_dataset_name(root), Path(root), **vars(content))
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root} is a file" if root.exists() else f"{root} is missing",
            expected=f"a folder with {EXPECTED[layout]}",
            fix=_suggest_folder(layout, root),
        )
    if not _is_root(layout, root) and not (layout in SOURCES and find_splits(root, plain=layout == "images")):
        raise UserError(
            f"{root} does not hold the {layout} layout; found: {describe_folder(root)}",
            expected=EXPECTED[layout],
            fix=_suggest_folder(layout, root),
        )
    try:
        content = CHECKS[layout](root, thorough)
    except OSError as error:  # a broken link, a folder without read permission
        raise UserError(f"{root} cannot be read: {error}", expected="files that can be opened") from error
    return LayoutReport(layout, read_dataset_name(root), root, **vars(content))


def _is_root(layout: str, folder: Path) -> bool:
    marked = any((folder / mark).exists() for mark in MARKS[layout])
    return marked or (layout in SOURCES and find_published(folder) is not None)


def _suggest_folder(layout: str, root: Path) -> str:
    """Return the next step: the folder above or below `root` that has the layout, if there is one."""
    if layout == "image_sets":  # any folder would match
        return "give the folder that contains the class folders"
    folders = list(root.absolute().parents)[:2]
    if root.is_dir():
        folders += sorted(Path(entry) for entry in os.scandir(root) if entry.is_dir())
    for folder in folders:
        if _is_root(layout, folder):
            return f"give {folder}, which has the {layout} layout"
    if layout in ("imagenet", "imagenet_val") and _has_class_folders(root):
        return (
            f"split each class: about a tenth of {root}/CLASS to {root}/val/CLASS, the rest to "
            f"{root}/train/CLASS; pretraining needs no split: mae-bench data check images {root}"
        )
    return f"give the folder that contains {MARKS[layout][0]}"


def _has_class_folders(root: Path) -> bool:
    """Return whether images are in at least two folders of `root`, and so in classes without a split."""
    found = (any(map(is_image, os.listdir(path))) for path in sorted(root.glob("*")) if path.is_dir())
    return sum(islice(filter(None, found), 2)) == 2


CHECKS: dict[str, Callable[[Any, bool], Content]] = {
    "imagenet": check_imagenet,
    "coco": check_coco,
    "ade20k": check_ade20k,
    "images": check_images,
    "imagenet_val": check_imagenet_val,
    "image_sets": check_image_sets,
}
