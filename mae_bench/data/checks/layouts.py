"""Checks that a place holds data in the true ImageNet, COCO or ADE20K layout, or images alone, and says what it holds."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from mae_bench.data.sets.decode import decode_size
from mae_bench.data.sets.index import IndexedImages
from mae_bench.data.sets.listed import find_published
from mae_bench.data.sets.open import digest_dataset, find_splits, open_images, read_dataset_name
from mae_bench.data.sets.packed import is_packed, verify_packed
from mae_bench.data.sets.shards import is_pattern
from mae_bench.data.sets.source import BadImage, ImageSource, is_image
from mae_bench.errors import UserError, did_you_mean
from mae_bench.files import file_digest

Layout = Literal["imagenet", "coco", "ade20k", "images", "imagenet_val", "image_sets"]

EXPECTED: dict[str, str] = {
    "imagenet": "train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG, or train.tar and val.tar with members CLASS/NAME.JPEG, "
    "or a packed, Arrow or Parquet set or shards, with labels, or iNaturalist 2017 to 2019 or Places as published",
    "imagenet_val": "val/CLASS/NAME.JPEG, or val.tar, or any form that imagenet may have; a train split need not be there",
    "image_sets": "CLASS/NAME.JPEG, or CORRUPTION/SEVERITY/CLASS/NAME.JPEG as ImageNet-C",
    "images": "images at any depth, in train/ (and val/) or in the folder itself; or a set in any form that imagenet may have",
    "coco": "train2017/*.jpg, val2017/*.jpg and annotations/instances_{train,val}2017.json",
    "ade20k": "images/{training,validation}/*.jpg, annotations/{training,validation}/*.png and objectInfo*.txt",
}
SOURCES = ("imagenet", "images", "imagenet_val")  # what open_images reads, in any of its forms
MARKS: dict[str, tuple[str, ...]] = {  # one of them is there: this is, or was meant to be, the layout's root
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
COCO_KEYS: dict[str, tuple[str, ...]] = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
}
MAX_TRIED = 20  # images a split of which one must decode
MAX_OPENED = 200  # label maps a split whose pixels are read


@dataclass(frozen=True)
class LayoutReport:
    """What a checked folder holds. splits: images a split. classes: names in the order of their labels.

    digest: SHA-256 over the sorted relative paths of the layout's files with their sizes, for annotations with their contents,
    for sets of images with the content of some; a tar counts as the files in it, a packed set as its content. notes: oddities
    that do not stop a job.
    """

    layout: str
    name: str
    root: Path
    splits: dict[str, int]
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Content:
    """What a layout's check finds, as LayoutReport has it."""

    splits: dict[str, int]
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()


def check_layout(layout: str, root: str | Path, *, thorough: bool = False) -> LayoutReport:
    """Looks through `root` without decoding images; UserError names the folder, what was expected in it and what was found.

    A million files are listed once: an index that the cache keeps is believed while no folder changed (mae_bench.data.sets.index).
    thorough: list every file again, and read a packed set's content.
    """
    if layout not in CHECKS:
        raise UserError(
            f"unknown layout {layout!r}",
            expected=f"one of {', '.join(CHECKS)}",
            fix=did_you_mean(layout, CHECKS),
        )
    if layout in SOURCES and is_pattern(str(root)):
        content = CHECKS[layout](str(root), thorough)
        name = read_dataset_name(root)
        return LayoutReport(
            layout, name, Path(root), content.splits, content.classes, content.digest, content.notes
        )
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root} is {'a file' if root.exists() else 'missing'}",
            expected=f"a folder with {EXPECTED[layout]}",
            fix=_elsewhere(layout, root),
        )
    if not _is_root(layout, root) and not (layout in SOURCES and find_splits(root, plain=layout == "images")):
        raise UserError(
            f"{root} does not hold the {layout} layout; found: {_listing(root)}",
            expected=EXPECTED[layout],
            fix=_elsewhere(layout, root),
        )
    try:
        content = CHECKS[layout](root, thorough)
    except OSError as error:  # a link to nowhere, a folder that may not be read
        raise UserError(f"{root} cannot be read: {error}", expected="files that can be opened") from error
    return LayoutReport(
        layout, read_dataset_name(root), root, content.splits, content.classes, content.digest, content.notes
    )


def _digest(files: dict[str, int | str]) -> str:
    """files: relative path -> size in bytes, or SHA-256 of the content."""
    return hashlib.sha256(
        "".join(f"{path}\0{mark}\n" for path, mark in sorted(files.items())).encode()
    ).hexdigest()


def _is_root(layout: str, folder: Path) -> bool:
    marked = any((folder / mark).exists() for mark in MARKS[layout])
    return marked or (layout in SOURCES and find_published(folder) is not None)


def _elsewhere(layout: str, root: Path) -> str:
    """The next thing to do: the folder beside, above or below that has the layout, if there is one."""
    if layout == "image_sets":  # any folder could be meant
        return "give the folder that holds the class folders"
    above = list(root.absolute().parents)[:2]
    below = (
        [Path(entry) for entry in sorted(os.scandir(root), key=lambda e: e.name) if entry.is_dir()]
        if root.is_dir()
        else []
    )
    for folder in [*above, *below]:
        if _is_root(layout, folder):
            return f"give {folder}, which has the {layout} layout"
    return f"give the folder that holds {MARKS[layout][0]}"


def _shown(names: Collection[Any], most: int = 5) -> str:
    return ", ".join(map(str, sorted(names)[:most])) + (
        f", ... ({len(names)} in all)" if len(names) > most else ""
    )


def _listing(folder: Path) -> str:
    if folder.is_file():
        return "a file"
    if not folder.is_dir():
        return "no such folder"
    return _shown([entry.name + "/" * entry.is_dir() for entry in os.scandir(folder)]) or "an empty folder"


def _images(folder: Path) -> dict[str, int]:
    """Names and sizes of the images directly in `folder`."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if is_image(entry.name)}


def _need(folder: Path, expected: str) -> dict[str, int]:
    """The images of a folder that must hold some."""
    found = _images(folder) if folder.is_dir() else {}
    if not found:
        problem = f"no images in {folder}" if folder.is_dir() else f"{folder} is missing"
        raise UserError(
            f"{problem}; found: {_listing(folder if folder.is_dir() else folder.parent)}", expected=expected
        )
    return found


def _check_imagenet(root: str | Path, thorough: bool) -> Content:
    sources = {split: _open_images(root, split, thorough) for split in ("train", "val")}
    classes = {split: _classes(root, split, source) for split, source in sources.items()}
    train, val = set(classes["train"]), set(classes["val"])
    if train != val:
        raise UserError(
            f"{root}: the classes of val are not those of train: only in train: {_shown(train - val) or 'none'}; "
            f"only in val: {_shown(val - train) or 'none'}",
            expected="the same classes in both",
            fix="ImageNet's val is flat as published: sort it into class folders"
            if (Path(root) / "val").is_dir()
            else "",
        )
    if len(train) == 1:
        raise UserError(
            f"{_place(root, 'train')} has one class only: {_shown(train)}",
            expected="at least two class folders",
            fix="give the folder whose train/ holds one folder a class",
        )
    if other := [
        (i, names) for i, names in enumerate(zip(*classes.values(), strict=False)) if names[0] != names[1]
    ]:
        label, names = other[0]
        raise UserError(
            f"{root}: train and val number their classes differently: label {label} is {names[0]} in train and {names[1]} in val",
            expected="one order in both",
        )
    for split, source in sources.items():
        _need_every_class(root, split, source)
    return _content(root, sources, thorough)


def _need_every_class(root: str | Path, split: str, source: ImageSource) -> None:
    """UserError naming the classes without an image: a list of classes, or labels, may have such."""
    counts = np.bincount(source.targets, minlength=len(source.classes))
    if empty := [source.classes[i] for i in np.flatnonzero(counts == 0).tolist()]:
        raise UserError(
            f"{_place(root, split)} has no image of {split} with the class {_shown(empty)}",
            expected="at least one image of every class in both splits",
        )


def _check_images(root: str | Path, thorough: bool) -> Content:
    splits = find_splits(root)
    if "train" not in splits:
        raise UserError(
            f"{root} has no images to train on; found: {_listing(Path(root))}", expected=EXPECTED["images"]
        )
    sources = {split: _open_images(root, split, thorough) for split in splits}
    for split, source in sources.items():
        _need_readable(root, split, source)
    return _content(root, sources, thorough)


def _content(root: str | Path, sources: dict[str, ImageSource], thorough: bool) -> Content:
    if thorough and is_packed(Path(root)):
        verify_packed(Path(root))
    splits = {split: len(source) for split, source in sources.items()}
    return Content(splits, tuple(sources["train"].classes), digest_dataset(sources), _notes(sources))


def _notes(sources: dict[str, ImageSource]) -> tuple[str, ...]:
    """What was met where the images were listed."""
    return tuple(
        note
        for source in sources.values()
        if isinstance(source, IndexedImages)
        for note in source.index.notes
    )


def _place(root: str | Path, split: str) -> str | Path:
    """Where a split lies, as far as a path of its own tells."""
    return next((path for path in (Path(root) / split, Path(root) / f"{split}.tar") if path.exists()), root)


def _open_images(root: str | Path, split: str, thorough: bool) -> ImageSource:
    if split not in find_splits(root):
        raise UserError(
            f"{Path(root) / split} is missing; found in {root}: {_listing(Path(root))}",
            expected=EXPECTED["imagenet"],
        )
    return open_images(root, split, refresh=thorough)


def _need_readable(root: str | Path, split: str, source: ImageSource) -> None:
    """UserError if none of a few images decodes: some that do not are counted later, but where none does, the place is wrong."""
    reason = ""
    for i in np.linspace(0, len(source) - 1, min(len(source), MAX_TRIED)).astype(int).tolist():
        try:
            if source.pixels(i) is None:
                decode_size(source.read(i))
        except (BadImage, OSError) as error:
            reason = f"{source.name(i)}: {error}"
            continue
        return
    raise UserError(
        f"{root}: none of {min(len(source), MAX_TRIED)} images of {split} can be read ({reason})",
        expected="images",
    )


def _classes(root: str | Path, split: str, source: ImageSource) -> list[str]:
    """The classes of a split, each with an image at least."""
    folder = Path(root) / split
    if isinstance(source, IndexedImages) and not source.index.files:
        for path in map(Path, source.index.stamps):
            if path.parent == folder and path.name not in source.classes and source.classes != [""]:
                _need(path, "at least one image in every class folder")
    if source.classes != [""]:
        return source.classes
    place = _place(root, split)
    inside = [name for name in map(source.name, range(min(len(source), 1000))) if name.count("/") != 1]
    raise UserError(
        f"no class folders in {place}, or images outside them: {_shown(inside)}; found: {_listing(Path(place))}",
        expected=f"{split}/CLASS/NAME.JPEG, or a label for every image",
        fix="sort the images into one folder a class",
    )


def _check_coco(root: Path, thorough: bool) -> Content:
    splits: dict[str, int] = {}
    files: dict[str, int | str] = {}
    notes: list[str] = []
    classes: dict[str, dict[int, str]] = {}
    for split in ("train2017", "val2017"):
        path = root / "annotations" / f"instances_{split}.json"
        images = _need(root / split, "the images that the annotations name")
        data = _read_coco(path)
        _check_references(path, data, images)
        _check_boxes(path, data["annotations"])
        if odd := _odd_boxes(data):
            notes.append(
                f"{odd} of {len(data['annotations'])} boxes in {path.name} reach outside their image or are degenerate"
            )
        classes[split] = {category["id"]: category["name"] for category in data["categories"]}
        splits[split] = len(data["images"])
        files |= {f"{split}/{image['file_name']}": images[image["file_name"]] for image in data["images"]}
        files[f"annotations/{path.name}"] = file_digest(path)
    if classes["train2017"] != classes["val2017"]:
        raise UserError(
            f"{root}: the categories of train2017 and val2017 differ in "
            f"{_shown({name for _, name in classes['train2017'].items() ^ classes['val2017'].items()})}",
            expected="the same ids and names in both",
        )
    names = tuple(name for _, name in sorted(classes["train2017"].items()))
    return Content(splits, names, _digest(files), tuple(notes))


def _read_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The annotation file, with all keys that detectron2 and pycocotools read, and unique ids."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; found in {path.parent}: {_listing(path.parent)}", expected=EXPECTED["coco"]
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a JSON file: {error}",
            expected="COCO's instances file",
            fix="fetch or unpack it again: it may be cut short",
        ) from error
    for part, keys in COCO_KEYS.items():
        items = data.get(part) if isinstance(data, dict) else None
        if not isinstance(items, list) or not items:
            found = _shown(data) if isinstance(data, dict) else type(data).__name__
            raise UserError(
                f"{path} has no {part}; found: {found}", expected=f"a list {part!r} that is not empty"
            )
        if lacking := {
            key for item in items for key in keys if not isinstance(item, dict) or key not in item
        }:
            raise UserError(
                f"{path}: entries of {part!r} lack {_shown(lacking)}", expected=f"{', '.join(keys)} in each"
            )
        if twice := [number for number, count in Counter(item["id"] for item in items).items() if count > 1]:
            raise UserError(
                f"{path}: ids that occur more than once in {part!r}: {_shown(twice)}", expected="unique ids"
            )
    return data


def _check_references(path: Path, data: dict[str, list[dict[str, Any]]], present: dict[str, int]) -> None:
    if absent := {image["file_name"] for image in data["images"]} - set(present):
        raise UserError(
            f"{path} names {len(absent)} images that are absent: {_shown(absent)}",
            expected=f"each of its {len(data['images'])} images in {path.parents[1]}",
            fix="unpack the images again, or remove their entries",
        )
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        if unknown := {annotation[key] for annotation in data["annotations"]} - {
            item["id"] for item in data[part]
        }:
            raise UserError(
                f"{path}: annotations refer to unknown {part}: {key} {_shown(unknown)}",
                expected=f"an id among {part!r}",
            )


def _check_boxes(path: Path, annotations: list[dict[str, Any]]) -> None:
    if wrong := [annotation["id"] for annotation in annotations if not _is_box(annotation["bbox"])]:
        raise UserError(
            f"{path}: annotations whose bbox is no box: id {_shown(wrong)}",
            expected="four numbers: x, y, w, h",
        )


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, int | float) for number in value)
    )


def _odd_boxes(data: dict[str, list[dict[str, Any]]]) -> int:
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    count = 0
    for annotation in data["annotations"]:
        (x, y, w, h), (width, height) = annotation["bbox"], sizes[annotation["image_id"]]
        count += (
            w <= 0 or h <= 0 or x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
        )  # a pixel is rounding
    return count


def _check_ade20k(root: Path, thorough: bool) -> Content:
    classes, files = _object_info(root)
    splits = {}
    for split in ("training", "validation"):
        images = {
            Path(name).stem: (name, size)
            for name, size in _need(root / "images" / split, "the images").items()
        }
        maps = {
            Path(name).stem: name
            for name in _need(root / "annotations" / split, "a label map (PNG) an image")
        }
        unpaired = {
            "images without a label map": images.keys() - maps,
            "label maps without an image": maps.keys() - images,
        }
        for what, alone in unpaired.items():
            if alone:
                raise UserError(
                    f"{root}: {len(alone)} {what} in {split}: {_shown(alone)}", expected=EXPECTED["ade20k"]
                )
        for stem in _sample(sorted(images)):
            _check_map(
                root / "images" / split / images[stem][0],
                root / "annotations" / split / maps[stem],
                len(classes),
            )
        splits[split] = len(images)
        files |= {f"images/{split}/{name}": size for name, size in images.values()}
        files |= {
            f"annotations/{split}/{name}": file_digest(root / "annotations" / split / name)
            for name in maps.values()
        }
    return Content(splits, classes, _digest(files))


def _sample(names: list[str]) -> Iterable[str]:
    return (names[i] for i in np.linspace(0, len(names) - 1, min(len(names), MAX_OPENED)).astype(int))


def _object_info(root: Path) -> tuple[tuple[str, ...], dict[str, int | str]]:
    """Class names of labels 1, 2, ... from objectInfo.txt (or objectInfo150.txt): tab-separated, Idx first and Name last."""
    path = next(iter(sorted(root.glob("objectInfo*.txt"))), None)
    if path is None:
        raise UserError(
            f"no objectInfo*.txt in {root}; found: {_listing(root)}",
            expected="a table of the classes: Idx, tab, Name",
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            expected="a text in UTF-8",
            fix="convert it, with iconv -t UTF-8",
        ) from error
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows or [row[0].strip() for row in rows] != [str(i) for i in range(1, len(rows) + 1)]:
        raise UserError(
            f"{path} does not number its classes 1, 2, ...",
            expected="a heading, then a line a class: Idx, tab, Name",
        )
    return tuple(row[-1].strip() for row in rows), {path.name: file_digest(path)}


def _check_map(image_path: Path, path: Path, num_classes: int) -> None:
    try:
        with Image.open(image_path) as image, Image.open(path) as labels:
            if labels.mode not in ("L", "P"):
                raise UserError(
                    f"{path} has mode {labels.mode}",
                    expected="one channel of 8 bits: 0 = ignore, 1 ... the classes",
                )
            if labels.size != image.size:
                raise UserError(
                    f"{path} is {labels.width} x {labels.height} pixels",
                    expected=f"its image's {image.width} x {image.height}",
                )
            if (highest := int(np.asarray(labels).max())) > num_classes:
                raise UserError(
                    f"{path} has label {highest}",
                    expected=f"0 (ignore) to {num_classes}, the last class in objectInfo",
                )
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(
            f"{image_path} or its label map {path} cannot be read: {error}", expected="whole images"
        ) from error


def _check_imagenet_val(root: str | Path, thorough: bool) -> Content:
    source = _open_images(root, "val", thorough)
    classes = tuple(_classes(root, "val", source))
    return Content({"val": len(source)}, classes, digest_dataset({"val": source}), _notes({"val": source}))


def _check_image_sets(root: Path, thorough: bool) -> Content:
    sources = {name: open_images(path, "train", refresh=thorough) for name, path in image_sets(root).items()}
    classes = {name: tuple(source.classes) for name, source in sources.items()}
    first = next(iter(classes))
    if classes[first] == ("",):
        raise UserError(
            f"{root / first} has no class folders; found: {_listing(root)}", expected=EXPECTED["image_sets"]
        )
    if odd := [name for name, found in classes.items() if found != classes[first]]:
        raise UserError(
            f"{root}: {odd[0]} has other classes than {first}: {_shown(set(classes[odd[0]]) ^ set(classes[first]))}",
            expected="the same classes in every set",
        )
    return Content(
        {name: len(source) for name, source in sources.items()}, classes[first], digest_dataset(sources)
    )


def image_sets(root: Path) -> dict[str, Path]:
    """The folders of classes below `root`: itself (as "."), or CORRUPTION/SEVERITY of ImageNet-C where severities are numbers."""
    found = {
        f"{corruption.name}/{severity.name}": severity
        for corruption in sorted(path for path in root.iterdir() if path.is_dir())
        for severity in sorted(path for path in corruption.iterdir() if path.is_dir() and path.name.isdigit())
    }
    return found or {".": root}


CHECKS: dict[str, Callable[[Any, bool], Content]] = {
    "imagenet": _check_imagenet,
    "coco": _check_coco,
    "ade20k": _check_ade20k,
    "images": _check_images,
    "imagenet_val": _check_imagenet_val,
    "image_sets": _check_image_sets,
}
