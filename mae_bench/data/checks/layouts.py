"""Check that a folder has the ImageNet, COCO or ADE20K layout, or images only, and report its content."""

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
    "imagenet": "train/CLASS/NAME.JPEG and val/CLASS/NAME.JPEG; or train.tar and val.tar with members "
    "CLASS/NAME.JPEG; or a packed set, Arrow or Parquet files or shards, with labels; "
    "or iNaturalist 2017 to 2019 or Places as published",
    "imagenet_val": "val/CLASS/NAME.JPEG, or val.tar, or any other form of imagenet; train is optional",
    "image_sets": "CLASS/NAME.JPEG, or CORRUPTION/SEVERITY/CLASS/NAME.JPEG as in ImageNet-C",
    "images": "images at any depth, in train/ (and val/) or in the folder itself; or any form of imagenet",
    "coco": "train2017/*.jpg, val2017/*.jpg and annotations/instances_{train,val}2017.json",
    "ade20k": "images/{training,validation}/*.jpg, annotations/{training,validation}/*.png "
    "and objectInfo*.txt",
}
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
COCO_KEYS: dict[str, tuple[str, ...]] = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
}
MAX_TRIED = 20  # images per split, of which one must decode
MAX_OPENED = 200  # label maps per split whose pixels are read


@dataclass(frozen=True)
class LayoutReport:
    """Content of a checked folder.

    splits: number of images per split.
    classes: class names in the order of their labels.
    digest: SHA-256 over the sorted relative paths of the layout's files with their sizes; over the content of
    annotations, and over the content of some images of image sets. A tar counts as the files in it, a packed
    set as its content.
    notes: irregularities that do not prevent a job.
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
    """Fields of a LayoutReport that a check of a layout finds."""

    splits: dict[str, int]
    classes: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()


def check_layout(layout: str, root: str | Path, *, thorough: bool = False) -> LayoutReport:
    """Check `root` without decoding images; raise UserError with what was expected and what was found.

    A million files are listed only once: a cached index is used while no folder has changed
    (mae_bench.data.sets.index).
    thorough: list every file again, and read the content of a packed set.
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
            f"{root} is a file" if root.exists() else f"{root} is missing",
            expected=f"a folder with {EXPECTED[layout]}",
            fix=_suggest_folder(layout, root),
        )
    if not _is_root(layout, root) and not (layout in SOURCES and find_splits(root, plain=layout == "images")):
        raise UserError(
            f"{root} does not hold the {layout} layout; found: {_describe_folder(root)}",
            expected=EXPECTED[layout],
            fix=_suggest_folder(layout, root),
        )
    try:
        content = CHECKS[layout](root, thorough)
    except OSError as error:  # a broken link, a folder without read permission
        raise UserError(f"{root} cannot be read: {error}", expected="files that can be opened") from error
    return LayoutReport(
        layout, read_dataset_name(root), root, content.splits, content.classes, content.digest, content.notes
    )


def _digest_files(files: dict[str, int | str]) -> str:
    """Return SHA-256 over relative paths with their size in bytes, or the SHA-256 of their content."""
    lines = [f"{path}\0{mark}\n" for path, mark in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    return f"give the folder that contains {MARKS[layout][0]}"


def _join(names: Collection[Any], num_shown: int = 5) -> str:
    shown = ", ".join(map(str, sorted(names)[:num_shown]))
    return shown + (f", ... ({len(names)} in total)" if len(names) > num_shown else "")


def _describe_folder(folder: Path) -> str:
    if folder.is_file():
        return "a file"
    if not folder.is_dir():
        return "no such folder"
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(folder)]
    return _join(names) or "an empty folder"


def _list_images(folder: Path) -> dict[str, int]:
    """Return names and sizes of the images directly in `folder`."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if is_image(entry.name)}


def _require_images(folder: Path, expected: str) -> dict[str, int]:
    """Return the images of a folder; raise UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; found: {_describe_folder(folder.parent)}", expected=expected)
    found = _list_images(folder)
    if not found:
        raise UserError(f"no images in {folder}; found: {_describe_folder(folder)}", expected=expected)
    return found


def _check_imagenet(root: str | Path, thorough: bool) -> Content:
    sources = {split: _open_images(root, split, thorough) for split in ("train", "val")}
    train, val = (_find_classes(root, split, source) for split, source in sources.items())
    _compare_classes(root, train, val)
    if len(set(train)) == 1:
        raise UserError(
            f"{_locate_split(root, 'train')} has only one class: {train[0]}",
            expected="at least two class folders",
            fix="give the folder whose train/ has one folder per class",
        )
    for split, source in sources.items():
        _require_every_class(root, split, source)
    return _describe_sets(root, sources, thorough)


def _compare_classes(root: str | Path, train: list[str], val: list[str]) -> None:
    """Raise UserError unless both splits have the same classes in the same order."""
    only_train, only_val = set(train) - set(val), set(val) - set(train)
    if only_train or only_val:
        is_folder = (Path(root) / "val").is_dir()
        raise UserError(
            f"{root}: the classes of train and val differ: only in train: {_join(only_train) or 'none'}; "
            f"only in val: {_join(only_val) or 'none'}",
            expected="the same classes in both",
            fix="sort ImageNet's val into class folders: it is flat as published" if is_folder else "",
        )
    for label, (name, val_name) in enumerate(zip(train, val, strict=False)):
        if name != val_name:
            raise UserError(
                f"{root}: train and val number their classes differently: "
                f"label {label} is {name} in train and {val_name} in val",
                expected="the same order in both",
            )


def _require_every_class(root: str | Path, split: str, source: ImageSource) -> None:
    """Raise UserError for classes without images, which a list of classes or labels may contain."""
    counts = np.bincount(source.targets, minlength=len(source.classes))
    empty = [source.classes[i] for i in np.flatnonzero(counts == 0).tolist()]
    if empty:
        raise UserError(
            f"{_locate_split(root, split)} has no image of {split} with the class {_join(empty)}",
            expected="at least one image of every class in both splits",
        )


def _check_images(root: str | Path, thorough: bool) -> Content:
    splits = find_splits(root)
    if "train" not in splits:
        raise UserError(
            f"{root} has no images to train on; found: {_describe_folder(Path(root))}",
            expected=EXPECTED["images"],
        )
    sources = {split: _open_images(root, split, thorough) for split in splits}
    for split, source in sources.items():
        _require_readable(root, split, source)
    return _describe_sets(root, sources, thorough)


def _describe_sets(root: str | Path, sources: dict[str, ImageSource], thorough: bool) -> Content:
    if thorough and is_packed(Path(root)):
        verify_packed(Path(root))
    splits = {split: len(source) for split, source in sources.items()}
    return Content(splits, tuple(sources["train"].classes), digest_dataset(sources), _collect_notes(sources))


def _collect_notes(sources: dict[str, ImageSource]) -> tuple[str, ...]:
    """Return the notes made while the images were indexed."""
    notes: list[str] = []
    for source in sources.values():
        if isinstance(source, IndexedImages):
            notes += source.index.notes
    return tuple(notes)


def _locate_split(root: str | Path, split: str) -> str | Path:
    """Return the path of a split, or `root` if the split has no path of its own."""
    paths = (Path(root) / split, Path(root) / f"{split}.tar")
    return next((path for path in paths if path.exists()), root)


def _open_images(root: str | Path, split: str, thorough: bool) -> ImageSource:
    if split not in find_splits(root):
        raise UserError(
            f"{Path(root) / split} is missing; found in {root}: {_describe_folder(Path(root))}",
            expected=EXPECTED["imagenet"],
        )
    return open_images(root, split, refresh=thorough)


def _require_readable(root: str | Path, split: str, source: ImageSource) -> None:
    """Raise UserError if none of a few images decodes.

    A job counts bad images, but a set without good ones is the wrong one.
    """
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
        expected="images that decode",
    )


def _find_classes(root: str | Path, split: str, source: ImageSource) -> list[str]:
    """Return the classes of a split; raise UserError if there are none or one has no image."""
    folder = Path(root) / split
    if isinstance(source, IndexedImages) and not source.index.files:
        for path in map(Path, source.index.stamps):
            if path.parent == folder and path.name not in source.classes and source.classes != [""]:
                _require_images(path, "at least one image in every class folder")
    if source.classes != [""]:
        return source.classes
    place = _locate_split(root, split)
    inside = [name for name in map(source.name, range(min(len(source), 1000))) if name.count("/") != 1]
    raise UserError(
        f"no class folders in {place}, or images outside them: {_join(inside)}; "
        f"found: {_describe_folder(Path(place))}",
        expected=f"{split}/CLASS/NAME.JPEG, or a label for every image",
        fix="sort the images into one folder per class",
    )


def _check_coco(root: Path, thorough: bool) -> Content:
    splits: dict[str, int] = {}
    files: dict[str, int | str] = {}
    notes: list[str] = []
    classes: dict[str, dict[int, str]] = {}
    for split in ("train2017", "val2017"):
        path = root / "annotations" / f"instances_{split}.json"
        images = _require_images(root / split, "the images listed in the annotations")
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
        names_differing = _join({name for _, name in differing})
        raise UserError(
            f"{root}: the categories of train2017 and val2017 differ in {names_differing}",
            expected="the same ids and names in both",
        )
    names = tuple(name for _, name in sorted(classes["train2017"].items()))
    return Content(splits, names, _digest_files(files), tuple(notes))


def _read_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read an annotation file; check that ids are unique and that the keys of pycocotools are present."""
    try:
        data: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; found in {path.parent}: {_describe_folder(path.parent)}",
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
            found = _join(data) if isinstance(data, dict) else type(data).__name__
            raise UserError(f"{path} has no {part}; found: {found}", expected=f"a non-empty list {part!r}")
        missing = _find_missing_keys(items, keys)
        if missing:
            raise UserError(
                f"{path}: entries of {part!r} lack {_join(missing)}", expected=f"{', '.join(keys)} in each"
            )
        counts = Counter(item["id"] for item in items)
        duplicates = [number for number, count in counts.items() if count > 1]
        if duplicates:
            raise UserError(
                f"{path}: ids that occur more than once in {part!r}: {_join(duplicates)}",
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
            f"{path} lists {len(absent)} images that are missing: {_join(absent)}",
            expected=f"each of its {len(data['images'])} images in {path.parents[1]}",
            fix="unpack the images again, or remove their entries",
        )
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        known = {item["id"] for item in data[part]}
        unknown = {annotation[key] for annotation in data["annotations"]} - known
        if unknown:
            raise UserError(
                f"{path}: annotations refer to unknown {part}: {key} {_join(unknown)}",
                expected=f"an id in {part!r}",
            )


def _check_boxes(path: Path, annotations: list[dict[str, Any]]) -> None:
    invalid = [annotation["id"] for annotation in annotations if not _is_box(annotation["bbox"])]
    if invalid:
        raise UserError(
            f"{path}: annotations whose bbox is not a box: id {_join(invalid)}",
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


def _check_ade20k(root: Path, thorough: bool) -> Content:
    classes, files = _read_object_info(root)
    splits = {}
    for split in ("training", "validation"):
        image_folder, map_folder = root / "images" / split, root / "annotations" / split
        sizes = _require_images(image_folder, "the images")
        images = {Path(name).stem: name for name in sizes}
        maps = {
            Path(name).stem: name for name in _require_images(map_folder, "one label map (PNG) per image")
        }
        unpaired = {
            "images without a label map": images.keys() - maps,
            "label maps without an image": maps.keys() - images,
        }
        for description, stems in unpaired.items():
            if stems:
                raise UserError(
                    f"{root}: {len(stems)} {description} in {split}: {_join(stems)}",
                    expected=EXPECTED["ade20k"],
                )
        for stem in _sample_names(sorted(images)):
            _check_map(image_folder / images[stem], map_folder / maps[stem], len(classes))
        splits[split] = len(images)
        files |= {f"images/{split}/{name}": sizes[name] for name in images.values()}
        files |= {f"annotations/{split}/{name}": file_digest(map_folder / name) for name in maps.values()}
    return Content(splits, classes, _digest_files(files))


def _sample_names(names: list[str]) -> Iterable[str]:
    return (names[i] for i in np.linspace(0, len(names) - 1, min(len(names), MAX_OPENED)).astype(int))


def _read_object_info(root: Path) -> tuple[tuple[str, ...], dict[str, int | str]]:
    """Read the class names of labels 1, 2, ... from objectInfo*.txt (tab-separated, from Idx to Name)."""
    path = next(iter(sorted(root.glob("objectInfo*.txt"))), None)
    if path is None:
        raise UserError(
            f"no objectInfo*.txt in {root}; found: {_describe_folder(root)}",
            expected="a table of the classes: Idx, tab, Name",
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            expected="a UTF-8 text file",
            fix="convert it with iconv -t UTF-8",
        ) from error
    rows = [line.split("\t") for line in lines if line.strip()]
    if not rows or [row[0].strip() for row in rows] != [str(i) for i in range(1, len(rows) + 1)]:
        raise UserError(
            f"{path} does not number its classes 1, 2, ...",
            expected="a header, then one line per class: Idx, tab, Name",
        )
    return tuple(row[-1].strip() for row in rows), {path.name: file_digest(path)}


def _check_map(image_path: Path, path: Path, num_classes: int) -> None:
    """Check mode, size and labels of a label map; raise UserError."""
    try:
        with Image.open(image_path) as image, Image.open(path) as labels:
            if labels.mode not in ("L", "P"):
                raise UserError(
                    f"{path} has mode {labels.mode}",
                    expected="one channel of 8 bits: 0 for ignore, 1, 2, ... for the classes",
                )
            if labels.size != image.size:
                raise UserError(
                    f"{path} has {labels.width} x {labels.height} pixels",
                    expected=f"{image.width} x {image.height}, as its image",
                )
            highest = int(np.asarray(labels).max())
            if highest > num_classes:
                raise UserError(
                    f"{path} has label {highest}",
                    expected=f"0 (ignore) to {num_classes}, the last class in objectInfo",
                )
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(
            f"{image_path} or its label map {path} cannot be read: {error}",
            expected="images that decode",
            fix="download or unpack them again",
        ) from error


def _check_imagenet_val(root: str | Path, thorough: bool) -> Content:
    source = _open_images(root, "val", thorough)
    classes = tuple(_find_classes(root, "val", source))
    return Content(
        {"val": len(source)}, classes, digest_dataset({"val": source}), _collect_notes({"val": source})
    )


def _check_image_sets(root: Path, thorough: bool) -> Content:
    sources = {
        name: open_images(path, "train", refresh=thorough) for name, path in find_image_sets(root).items()
    }
    classes = {name: tuple(source.classes) for name, source in sources.items()}
    first = next(iter(classes))
    if classes[first] == ("",):
        raise UserError(
            f"{root / first} has no class folders; found: {_describe_folder(root)}",
            expected=EXPECTED["image_sets"],
        )
    for name, found in classes.items():
        if found != classes[first]:
            raise UserError(
                f"{root}: {name} has other classes than {first}: {_join(set(found) ^ set(classes[first]))}",
                expected="the same classes in every set",
            )
    return Content(
        {name: len(source) for name, source in sources.items()}, classes[first], digest_dataset(sources)
    )


def find_image_sets(root: Path) -> dict[str, Path]:
    """Return the sets below `root`: CORRUPTION/SEVERITY of ImageNet-C, where SEVERITY is a number, or "."."""
    found: dict[str, Path] = {}
    for corruption in sorted(path for path in root.iterdir() if path.is_dir()):
        for severity in sorted(
            path for path in corruption.iterdir() if path.is_dir() and path.name.isdigit()
        ):
            found[f"{corruption.name}/{severity.name}"] = severity
    return found or {".": root}


CHECKS: dict[str, Callable[[Any, bool], Content]] = {
    "imagenet": _check_imagenet,
    "coco": _check_coco,
    "ade20k": _check_ade20k,
    "images": _check_images,
    "imagenet_val": _check_imagenet_val,
    "image_sets": _check_image_sets,
}
