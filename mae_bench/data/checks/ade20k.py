"""Check that a folder has the ADE20K layout and that its label maps are usable."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

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

MAX_OPENED = 200  # label maps per split whose pixels are read


def check_ade20k(root: Path, thorough: bool) -> Content:
    """Check both splits: an image for each label map, and the first maps' mode, size and labels."""
    classes, files = _read_object_info(root)
    splits = {}
    for split in ("training", "validation"):
        image_folder, map_folder = root / "images" / split, root / "annotations" / split
        sizes = require_images(image_folder, "the images")
        images = {Path(name).stem: name for name in sizes}
        maps = {Path(name).stem: name for name in require_images(map_folder, "one label map (PNG) per image")}
        unpaired = {
            "images without a label map": images.keys() - maps,
            "label maps without an image": maps.keys() - images,
        }
        for description, stems in unpaired.items():
            if stems:
                raise UserError(
                    f"{root}: {len(stems)} {description} in {split}: {join_names(stems)}",
                    expected=EXPECTED["ade20k"],
                )
        for stem in _sample_names(sorted(images)):
            _check_map(image_folder / images[stem], map_folder / maps[stem], len(classes))
        splits[split] = len(images)
        files |= {f"images/{split}/{name}": sizes[name] for name in images.values()}
        files |= {f"annotations/{split}/{name}": file_digest(map_folder / name) for name in maps.values()}
    return Content(splits, classes, digest_files(files))


def _sample_names(names: list[str]) -> Iterable[str]:
    return (names[i] for i in np.linspace(0, len(names) - 1, min(len(names), MAX_OPENED)).astype(int))


def _read_object_info(root: Path) -> tuple[tuple[str, ...], dict[str, int | str]]:
    """Read the class names of labels 1, 2, ... from objectInfo*.txt (tab-separated, from Idx to Name)."""
    path = next(iter(sorted(root.glob("objectInfo*.txt"))), None)
    if path is None:
        raise UserError(
            f"no objectInfo*.txt in {root}; found: {describe_folder(root)}",
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
