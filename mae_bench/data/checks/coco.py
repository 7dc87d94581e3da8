"""Check that a folder has the COCO layout, and that training and scoring will read it as it is meant."""

import logging
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae_bench.data.checks.annotations import Annotations, Image, has_short_polygon, read_annotations
from mae_bench.data.checks.folders import Content, digest_files, join_names, require_images
from mae_bench.data.checks.headers import read_headers
from mae_bench.data.sets.cache import load_or_compute
from mae_bench.data.sets.index import Stamps
from mae_bench.data.sets.source import is_image
from mae_bench.errors import UserError
from mae_bench.files import file_digest, json_digest

log = logging.getLogger(__name__)

VERSION = 1  # of the rules: a higher one has every set checked again
SPLITS = ("train2017", "val2017")


@dataclass(frozen=True)
class Split:
    """What the check of a split found.

    digest: SHA-256 of its annotation file.
    names: file names of its images.
    classes: (id, name) of each category.
    repairs: what differs in the annotations that training and scoring read from those in the file.
    notes: irregularities that are left as they are.
    """

    digest: str
    names: list[str]
    classes: list[tuple[int, str]]
    repairs: list[str]
    notes: list[str]


def check_coco(root: Path, thorough: bool) -> Content:
    """Check the annotation files of both splits, that they agree, and that the images have their sizes."""
    splits: dict[str, Split] = {}
    files: dict[str, int | str] = {}
    split_digests: dict[str, str] = {}
    for name in SPLITS:
        images = require_images(root / name, "the images listed in the annotations")
        split = splits[name] = check_split(root, name, refresh=thorough)
        found: dict[str, int | str] = {f"{name}/{image}": images[image] for image in split.names}
        found[f"annotations/{annotation_path(root, name).name}"] = split.digest
        split_digests[name] = digest_files(found)
        files |= found
    train, val = splits.values()
    differing = set(train.classes) ^ set(val.classes)
    if differing:
        raise UserError(
            f"{root}: the categories of train2017 and val2017 differ in "
            f"{join_names({f'{number} ({name})' for number, name in differing})}",
            expected="the same ids and names in both annotation files",
            fix="list all categories in both",
        )
    return Content(
        {name: len(split.names) for name, split in splits.items()},
        tuple(name for _, name in sorted(train.classes)),
        digest_files(files),
        tuple(note for split in splits.values() for note in (*split.repairs, *split.notes)),
        split_digests,
    )


def annotation_path(root: Path, split: str) -> Path:
    """Return the path of a split's annotation file."""
    return root / "annotations" / f"instances_{split}.json"


def check_split(root: Path, split: str, *, refresh: bool = False) -> Split:
    """Check the annotation file and the images of a split; raise UserError if they cannot be used.

    The result is cached until the content of the annotation file or the size or time of change of an image
    differs: COCO's 118,287 headers are read only once. refresh: check again in any case.
    """
    path = annotation_path(root, split)
    if not path.is_file():
        read_annotations(path)  # says what is there instead
    digest, stamps = file_digest(path), _stamp_images(root / split)
    return load_or_compute(
        "coco",
        json_digest([VERSION, path.name, digest, stamps]),
        lambda: asdict(_check_split(path, digest, root / split, stamps)),
        _parse_split,
        refresh,
    )


def _parse_split(value: Any) -> Split:
    return Split(**value | {"classes": [(number, name) for number, name in value["classes"]]})


def _stamp_images(folder: Path) -> Stamps:
    """Return size and times of change of the images in a folder."""
    stamps = {}
    for entry in os.scandir(folder):
        found = entry.stat()
        if is_image(entry.name) and stat.S_ISREG(found.st_mode):
            stamps[entry.name] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    return stamps


def _check_split(path: Path, digest: str, folder: Path, present: Stamps) -> Split:
    log.info("checking %s and the headers of its images (once)", path)
    data, has_mark = read_annotations(path)
    images = data["images"]
    absent = [image["file_name"] for image in images if image["file_name"] not in present]
    if absent:
        raise UserError(
            f"{path} lists {len(absent)} images that are missing: {join_names(absent)}",
            expected=f"each of its {len(images)} images in {folder}",
            fix="move images out of subfolders, also in file_name"
            if any("/" in name for name in absent)
            else "unpack the images again, or remove their entries",
        )
    _check_images(path, images, folder)
    return Split(
        digest,
        [image["file_name"] for image in images],
        [(category["id"], category["name"]) for category in data["categories"]],
        _list_repairs(path.name, data, has_mark),
        _note_boxes(path.name, data),
    )


def _check_images(path: Path, images: list[Image], folder: Path) -> None:
    """Raise UserError for images that are not of the listed size, or not of 8 bits; unreadable ones pass."""
    wrong, deep = [], []
    headers = read_headers(folder / image["file_name"] for image in images)
    for image, header in zip(images, headers, strict=True):
        if header and (header.width, header.height) != (image["width"], image["height"]):
            listed, found = f"{image['width']} x {image['height']}", f"{header.width} x {header.height}"
            wrong.append(f"{image['file_name']} ({listed}, but the file has {found})")
        if header and not header.is_8_bit:
            deep.append(image["file_name"])
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} of {len(images)} images are of another size: {join_names(wrong, 3)}",
            expected="the sizes of the files in pixels, as shown: EXIF orientation swaps width and height",
            fix="correct width and height if the objects are where they should be, else restore the images",
        )
    if deep:
        raise UserError(
            f"{folder}: {len(deep)} of {len(images)} images have more than 8 bits: {join_names(deep)}",
            expected="8 bits per channel: detectron2 reads all brighter values as white",
            fix="scale the images to 8 bits",
        )


def _list_repairs(name: str, data: Annotations, has_mark: bool) -> list[str]:
    """Return a note per change that training and scoring make in their copy of the annotations."""
    annotations = data["annotations"]
    repairs = []
    if has_mark:
        repairs.append(f"{name}: the byte-order mark is left out")
    if any(annotation["id"] == 0 for annotation in annotations):
        repairs.append(f"{name}: annotation id 0 is replaced, as pycocotools takes it for 'no match'")
    num_short = sum(has_short_polygon(annotation) for annotation in annotations)
    if num_short:
        share = f"{num_short} of {len(annotations)} annotations"
        repairs.append(f"{name}: polygons of fewer than 3 points are left out in {share}")
    for key, meaning in (("iscrowd", "0"), ("area", "the area of the mask")):
        num_missing = sum(key not in annotation for annotation in annotations)
        if num_missing:
            share = f"{num_missing} of {len(annotations)} annotations"
            repairs.append(f"{name}: {key} is missing in {share} and taken as {meaning}")
    return repairs


def _note_boxes(name: str, data: Annotations) -> list[str]:
    """Return a note on boxes that are degenerate or extend beyond their image by more than a pixel."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    count = 0
    for annotation in data["annotations"]:
        (x, y, w, h), (width, height) = annotation["bbox"], sizes[annotation["image_id"]]
        is_degenerate = w == 0 or h == 0
        count += is_degenerate or x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
    counts = f"{count} of {len(data['annotations'])}"
    return [f"{counts} boxes in {name} extend beyond their image or are degenerate"] if count else []
