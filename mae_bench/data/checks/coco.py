"""Check that a folder has the COCO layout and that its annotations are usable."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mae_bench.data.checks.folders import (
    EXPECTED,
    Content,
    describe_folder,
    digest_files,
    join_names,
    require_images,
)
from mae_bench.errors import UserError
from mae_bench.files import file_digest

COCO_KEYS: dict[str, tuple[str, ...]] = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
}


def check_coco(root: Path, thorough: bool) -> Content:
    """Check both splits: annotation files, their references to images and categories, and boxes."""
    splits: dict[str, int] = {}
    files: dict[str, int | str] = {}
    notes: list[str] = []
    classes: dict[str, dict[int, str]] = {}
    for split in ("train2017", "val2017"):
        path = root / "annotations" / f"instances_{split}.json"
        images = require_images(root / split, "the images listed in the annotations")
        data = _read_coco(path)
        _check_references(path, data, images)
        _check_boxes(path, data["annotations"])
        num_invalid = _count_invalid_boxes(data)
        if num_invalid:
            counts = f"{num_invalid} of {len(data['annotations'])}"
            notes.append(f"{counts} boxes in {path.name} extend beyond their image or are degenerate")
        classes[split] = {category["id"]: category["name"] for category in data["categories"]}
        splits[split] = len(data["images"])
        files |= {f"{split}/{image['file_name']}": images[image["file_name"]] for image in data["images"]}
        files[f"annotations/{path.name}"] = file_digest(path)
    differing = classes["train2017"].items() ^ classes["val2017"].items()
    if differing:
        names_differing = join_names({name for _, name in differing})
        raise UserError(
            f"{root}: the categories of train2017 and val2017 differ in {names_differing}",
            expected="the same ids and names in both",
        )
    names = tuple(name for _, name in sorted(classes["train2017"].items()))
    return Content(splits, names, digest_files(files), tuple(notes))


def _read_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read an annotation file; check that ids are unique and that the keys of pycocotools are present."""
    try:
        data: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; found in {path.parent}: {describe_folder(path.parent)}",
            expected=EXPECTED["coco"],
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a JSON file: {error}",
            expected="COCO's instances file",
            fix="download or unpack it again: it may be truncated",
        ) from error
    for part, keys in COCO_KEYS.items():
        items = data.get(part) if isinstance(data, dict) else None
        if not isinstance(items, list) or not items:
            found = join_names(data) if isinstance(data, dict) else type(data).__name__
            raise UserError(f"{path} has no {part}; found: {found}", expected=f"a non-empty list {part!r}")
        missing = _find_missing_keys(items, keys)
        if missing:
            raise UserError(
                f"{path}: entries of {part!r} lack {join_names(missing)}",
                expected=f"{', '.join(keys)} in each",
            )
        counts = Counter(item["id"] for item in items)
        duplicates = [number for number, count in counts.items() if count > 1]
        if duplicates:
            raise UserError(
                f"{path}: ids that occur more than once in {part!r}: {join_names(duplicates)}",
                expected="unique ids",
            )
    return data


def _find_missing_keys(items: list[Any], keys: tuple[str, ...]) -> set[str]:
    missing: set[str] = set()
    for item in items:
        missing |= {key for key in keys if not isinstance(item, dict) or key not in item}
    return missing


def _check_references(path: Path, data: dict[str, list[dict[str, Any]]], present: dict[str, int]) -> None:
    absent = {image["file_name"] for image in data["images"]} - set(present)
    if absent:
        raise UserError(
            f"{path} lists {len(absent)} images that are missing: {join_names(absent)}",
            expected=f"each of its {len(data['images'])} images in {path.parents[1]}",
            fix="unpack the images again, or remove their entries",
        )
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        known = {item["id"] for item in data[part]}
        unknown = {annotation[key] for annotation in data["annotations"]} - known
        if unknown:
            raise UserError(
                f"{path}: annotations refer to unknown {part}: {key} {join_names(unknown)}",
                expected=f"an id in {part!r}",
            )


def _check_boxes(path: Path, annotations: list[dict[str, Any]]) -> None:
    invalid = [annotation["id"] for annotation in annotations if not _is_box(annotation["bbox"])]
    if invalid:
        raise UserError(
            f"{path}: annotations whose bbox is not a box: id {join_names(invalid)}",
            expected="four numbers: x, y, w, h",
        )


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, int | float) for number in value)
    )


def _count_invalid_boxes(data: dict[str, list[dict[str, Any]]]) -> int:
    """Count the boxes that are degenerate or extend beyond their image by more than a pixel (rounding)."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    count = 0
    for annotation in data["annotations"]:
        (x, y, w, h), (width, height) = annotation["bbox"], sizes[annotation["image_id"]]
        is_degenerate = w <= 0 or h <= 0
        is_outside = x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
        count += is_degenerate or is_outside
    return count
