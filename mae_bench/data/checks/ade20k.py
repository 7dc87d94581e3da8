"""Check that a folder has the ADE20K layout, and read every label map once."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from mae_bench.data.checks.folders import (
    EXPECTED,
    Content,
    describe_folder,
    digest_files,
    join_names,
    require_images,
)
from mae_bench.data.sets.cache import load_or_compute
from mae_bench.data.sets.index import stamp
from mae_bench.errors import UserError
from mae_bench.files import file_digest, json_digest

VERSION = 1  # of the rules: a higher one has every map read again
SPLITS = ("training", "validation")
NUM_LABELS = 256  # of a map of 8 bits
MAX_CLASSES = 254  # 0 and 255 are not classes to mmsegmentation
IMAGE_MODES = ("RGB", "L", "P", "CMYK", "YCbCr", "RGBA")  # decoded to 8-bit RGB without loss of range


@dataclass(frozen=True)
class Pair:
    """An image and its label map."""

    image: Path
    labels: Path


def check_ade20k(root: Path, thorough: bool) -> Content:
    """Check both splits: a label map per image, and the size, mode and labels of every map.

    The maps are read once: their counts are cached by the digests of the files, unless `thorough`.
    """
    classes, files = _read_object_info(root)
    splits: dict[str, int] = {}
    labels: dict[str, tuple[int, ...]] = {}
    shared, split_digests = dict(files), {}
    for split in SPLITS:
        pairs, found = _pair_files(root, split)
        splits[split] = len(pairs)
        labels[split] = _load_or_count_labels(pairs, found, len(classes), thorough)
        split_digests[split] = digest_files(shared | found)
        files |= found
    _require_every_class(root, classes, labels)
    notes = tuple(_note_absent_classes(classes, labels))
    return Content(splits, classes, digest_files(files), notes, split_digests, labels)


def _pair_files(root: Path, split: str) -> tuple[list[Pair], dict[str, int | str]]:
    """Return the images with their maps, and the files with sizes (images) and digests (maps)."""
    image_folder, map_folder = root / "images" / split, root / "annotations" / split
    sizes = require_images(image_folder, "the images")
    map_names = require_images(map_folder, "one label map (PNG) per image")
    _require_suffix(image_folder, sizes, ".jpg", "convert them to JPEG files, or rename those that are")
    _require_suffix(map_folder, map_names, ".png", "write the labels as PNG: JPEG changes them")
    images, maps = ({Path(name).stem: name for name in names} for names in (sizes, map_names))
    unpaired = {
        "images without a label map": images.keys() - maps,
        "label maps without an image": maps.keys() - images,
    }
    for description, stems in unpaired.items():
        if stems:
            raise UserError(
                f"{root}: {len(stems)} {description} in {split}: {join_names(stems)}",
                expected=EXPECTED["ade20k"],
                fix="add the missing files, or remove these",
            )
    files: dict[str, int | str] = {f"images/{split}/{name}": sizes[name] for name in images.values()}
    files |= {f"annotations/{split}/{name}": file_digest(map_folder / name) for name in maps.values()}
    return [Pair(image_folder / images[stem], map_folder / maps[stem]) for stem in sorted(images)], files


def _require_suffix(folder: Path, names: Iterable[str], suffix: str, fix: str) -> None:
    """Raise UserError for images that mmsegmentation would skip silently."""
    wrong = [name for name in names if not name.endswith(suffix)]
    if wrong:
        raise UserError(
            f"{len(wrong)} images in {folder} are not *{suffix}: {join_names(wrong)}",
            expected=f"files named *{suffix}, as in ADE20K",
            fix=fix,
        )


def _read_object_info(root: Path) -> tuple[tuple[str, ...], dict[str, int | str]]:
    """Read the class names of labels 1, 2, ... from the columns Idx and Name of objectInfo*.txt (tabs)."""
    path = next(iter(sorted(root.glob("objectInfo*.txt"))), None)
    if path is None:
        raise UserError(
            f"no objectInfo*.txt in {root}; found: {describe_folder(root)}",
            expected="a table of the classes: Idx, tab, Name",
            fix="copy objectInfo150.txt of ADEChallengeData2016 there, or write one line per class",
        )
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            expected="a UTF-8 text file",
            fix="convert it with iconv -t UTF-8",
        ) from error
    header = [name.strip().lower() for name in lines[0].split("\t")] if lines else []
    if not {"idx", "name"} <= set(header):
        raise UserError(
            f"{path} begins with {lines[0] if lines else 'nothing'!r}",
            expected="a header with the columns Idx and Name, separated by tabs",
            fix="write the header, for example: Idx, tab, Name",
        )
    rows = [dict(zip(header, line.split("\t"), strict=False)) for line in lines[1:]]
    numbers, names = ([row.get(key, "").strip() for row in rows] for key in ("idx", "name"))
    if not rows or numbers != [str(i) for i in range(1, len(rows) + 1)]:
        raise UserError(
            f"{path} does not number its classes 1, 2, ...",
            expected="a header, then one line per class: Idx, tab, Name",
            fix="list the classes in the order of their labels; label 0 is not a class",
        )
    if "" in names or len(set(names)) < len(names) or len(names) > MAX_CLASSES:
        repeated = {name for name in names if names.count(name) > 1}
        raise UserError(
            f"{path}: {len(names)} classes; without a name: {names.count('')}; "
            f"repeated names: {join_names(repeated) or 'none'}",
            expected=f"at most {MAX_CLASSES} classes, each with a name of its own",
            fix="give every class a name of its own",
        )
    return tuple(names), {path.name: file_digest(path)}


def _load_or_count_labels(
    pairs: list[Pair], files: dict[str, int | str], num_classes: int, refresh: bool
) -> tuple[int, ...]:
    """Return the pixels of each label, 0 to num_classes, in all maps of a split.

    They are cached by the digests of the maps, and by size and time of change of the images.
    """
    stamps = {str(pair.image): stamp(pair.image) for pair in pairs}
    key = json_digest({"version": VERSION, "files": files, "images": stamps, "classes": num_classes})
    return load_or_compute("labels", key, lambda: _count_all_labels(pairs, num_classes), tuple, refresh)


def _count_all_labels(pairs: list[Pair], num_classes: int) -> list[int]:
    """Return the pixels of each label in all maps; raise UserError for a label that is not listed."""
    with ThreadPoolExecutor() as pool:
        counts = sum(pool.map(_count_labels, pairs), np.zeros(NUM_LABELS, np.int64))
    unknown = np.flatnonzero(counts[num_classes + 1 :]) + num_classes + 1
    if len(unknown):
        _raise_unknown_label(pairs, int(unknown[-1]), num_classes)
    found: list[int] = counts[: num_classes + 1].tolist()
    return found


def _count_labels(pair: Pair) -> np.ndarray:
    """Return the pixels of each label in a map (256,); raise UserError for a wrong size or mode."""
    try:
        with Image.open(pair.image) as image, Image.open(pair.labels) as labels:
            _require_usable(pair, image, labels)
            values = np.asarray(labels)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{pair.image} or its label map {pair.labels} cannot be read: {error}",
            expected="images that decode",
            fix="download or unpack them again",
        ) from error
    return np.bincount(values.ravel(), minlength=NUM_LABELS)


def _require_usable(pair: Pair, image: Image.Image, labels: Image.Image) -> None:
    """Raise UserError for a map or an image that mmsegmentation would read as something else."""
    if labels.mode not in ("L", "P"):
        raise UserError(
            f"{pair.labels} has mode {labels.mode}",
            expected="one channel of 8 bits: 0 for ignore, 1, 2, ... for the classes",
            fix="write the labels as an 8-bit grey or palette PNG",
        )
    if image.mode not in IMAGE_MODES:
        raise UserError(
            f"{pair.image} has mode {image.mode}",
            expected="8 bits per channel",
            fix="scale it to 8 bits: more would be clipped",
        )
    orientation = image.getexif().get(Base.Orientation, 1)
    if orientation not in (0, 1):
        raise UserError(
            f"{pair.image} has the EXIF orientation {orientation}: it is turned when it is decoded, "
            "its label map is not",
            expected="images stored upright",
            fix="turn the pixels and remove the tag, for example with ImageMagick: mogrify -auto-orient",
        )
    if labels.size != image.size:
        raise UserError(
            f"{pair.labels} has {labels.width} x {labels.height} pixels",
            expected=f"{image.width} x {image.height}, as its image",
            fix="resize it without interpolation, or pair it with its own image",
        )


def _raise_unknown_label(pairs: list[Pair], label: int, num_classes: int) -> None:
    """Raise UserError that names the first map with this label."""
    path = next(pair.labels for pair in pairs if _count_labels(pair)[label])
    fix = "list all classes in objectInfo"
    if label == NUM_LABELS - 1:
        fix = "write 0 where 255 means ignore; if the classes start at 0, add 1 to their labels first"
    raise UserError(
        f"{path} has label {label}",
        expected=f"0 (ignore) to {num_classes}, the last class in objectInfo",
        fix=fix,
    )


def _require_every_class(root: Path, classes: tuple[str, ...], labels: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError for a class without a pixel in any map, and for a split without a labelled pixel."""
    for split, counts in labels.items():
        if not any(counts[1:]):
            raise UserError(
                f"{root / 'annotations' / split} has no labelled pixel: every label is 0",
                expected=f"labels 1 to {len(classes)}; 0 is ignored",
                fix="add 1 to every label if the classes start at 0",
            )
    total = np.sum(list(labels.values()), axis=0)
    absent = [i for i in range(1, len(classes) + 1) if not total[i]]
    if not absent:
        return
    names = join_names([f"{i} ({classes[i - 1]})" for i in absent])
    fix = "remove the classes that the set does not have from objectInfo, and renumber the labels"
    if absent == [len(classes)] and total[0]:
        fix = (
            f"the labels look zero-based (0 to {len(classes) - 1}; 0 is ignored here): add 1 to every label. "
            f"If they are not, remove class {len(classes)} from objectInfo"
        )
    raise UserError(
        f"{root}: no label map has a pixel of class {names}",
        expected="each class of objectInfo in at least one label map",
        fix=fix,
    )


def _note_absent_classes(classes: tuple[str, ...], labels: dict[str, tuple[int, ...]]) -> Iterable[str]:
    for split, effect in (
        ("training", "cannot be learned and count as 0 in mIoU"),
        ("validation", "count in mIoU only if predicted, and then as 0"),
    ):
        absent = [name for name, count in zip(classes, labels[split][1:], strict=True) if not count]
        if absent:
            yield f"classes without a pixel in {split}, which {effect}: {join_names(absent)}"
