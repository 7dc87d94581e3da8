"""Check image sets with and without classes, in any form that `open_images` reads."""

from pathlib import Path

import numpy as np

from mae_bench.data.checks.folders import EXPECTED, Content, describe_folder, join_names, require_images
from mae_bench.data.sets.decode import decode_size
from mae_bench.data.sets.index import IndexedImages, escape_name
from mae_bench.data.sets.open import digest_dataset, find_splits, open_images
from mae_bench.data.sets.packed import is_packed, verify_packed
from mae_bench.data.sets.source import BadImage, ImageSource
from mae_bench.errors import UserError

MAX_TRIED = 20  # images per split, of which one must decode


def check_imagenet(root: str | Path, thorough: bool) -> Content:
    """Check that both splits have the same classes, each with images."""
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
            f"{root}: the classes of train and val differ: only in train: "
            f"{join_names(only_train) or 'none'}; only in val: {join_names(only_val) or 'none'}",
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
            f"{_locate_split(root, split)} has no image of {split} with the class {join_names(empty)}",
            expected="at least one image of every class in both splits",
        )


def check_images(root: str | Path, thorough: bool) -> Content:
    """Check that there are images to train on and that some decode."""
    splits = find_splits(root)
    if "train" not in splits:
        raise UserError(
            f"{root} has no images to train on; found: {describe_folder(Path(root))}",
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
    return Content(
        splits,
        tuple(sources["train"].classes),
        digest_dataset(sources),
        _collect_notes(sources),
        {split: digest_dataset({split: source}) for split, source in sources.items()},
    )


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
            f"{Path(root) / split} is missing; found in {root}: {describe_folder(Path(root))}",
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
            is_empty = path.parent == folder and escape_name(path.name) not in source.classes
            if is_empty and source.classes != [""]:
                require_images(path, "at least one image in every class folder")
    if source.classes != [""]:
        return source.classes
    place = _locate_split(root, split)
    inside = [name for name in map(source.name, range(min(len(source), 1000))) if name.count("/") != 1]
    raise UserError(
        f"no class folders in {place}, or images outside them: {join_names(inside)}; "
        f"found: {describe_folder(Path(place))}",
        expected=f"{split}/CLASS/NAME.JPEG, or a label for every image",
        fix="sort the images into one folder per class",
    )


def check_imagenet_val(root: str | Path, thorough: bool) -> Content:
    """Check that there are validation images with classes."""
    source = _open_images(root, "val", thorough)
    classes = tuple(_find_classes(root, "val", source))
    return Content(
        {"val": len(source)}, classes, digest_dataset({"val": source}), _collect_notes({"val": source})
    )


def check_image_sets(root: Path, thorough: bool) -> Content:
    """Check that every set has the same classes."""
    sources = {
        name: open_images(path, "train", refresh=thorough) for name, path in find_image_sets(root).items()
    }
    classes = {name: tuple(source.classes) for name, source in sources.items()}
    first = next(iter(classes))
    if classes[first] == ("",):
        raise UserError(
            f"{root / first} has no class folders; found: {describe_folder(root)}",
            expected=EXPECTED["image_sets"],
        )
    for name, found in classes.items():
        if found != classes[first]:
            differing = join_names(set(found) ^ set(classes[first]))
            raise UserError(
                f"{root}: {name} has other classes than {first}: {differing}",
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
