"""Sets whose publisher lists images and labels in files: iNaturalist 2017, 2018 and 2019, Places205 and Places365.

iNaturalist 2021 comes in class folders whose order is its ids', and is read as those.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_bench.data.sets.folders import walk
from mae_bench.data.sets.index import Index, Stamps, build_index, stamp
from mae_bench.errors import UserError

LINE = re.compile(r"/?(\S.*?)[\s,]+(\d+)")  # of a list of Places: a path, then a label
PARTS: dict[str, dict[str, type]] = {  # what is read of iNaturalist's JSON
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": object},
    "annotations": {"image_id": int, "category_id": int},
}
MOST_NAMED = 5


@dataclass(frozen=True)
class Listing:
    """What a list says: an image's path below the folder of images, its label, and the classes in the order of the labels."""

    names: list[str]
    targets: list[int]
    classes: list[str]


@dataclass(frozen=True)
class Published:
    """How a set is published. lists: where a split's list may lie. folders: below which of them a split's images may lie, as
    far as the list does not say itself. beside: a file with the classes, where the lists have labels alone."""

    name: str
    lists: Mapping[str, tuple[str, ...]]
    folders: Mapping[str, tuple[str, ...]]
    read: Callable[[Path, Path | None], Listing]
    beside: tuple[str, ...] = ()

    def list_of(self, root: Path, split: str) -> Path | None:
        """A split's list, if it is there."""
        return _first(root, self.lists[split])

    def listing(self, root: Path, split: str) -> Listing:
        """What a split's list says, its names relative to `root`; UserError for a list that cannot be used."""
        path = self.list_of(root, split)
        assert path is not None  # the split is open: its list was there
        found = self.read(path, self._classes(root))
        folder = self._folder(root, split)
        if twice := [name for name, count in Counter(found.names).items() if count > 1]:
            raise UserError(
                f"{path} lists images more than once: {_named(twice)}", expected="each image once"
            )
        return Listing(
            [f"{folder}/{name}" if folder else name for name in found.names], found.targets, found.classes
        )

    def files(self, root: Path, split: str) -> list[Path]:
        """The files that a split's images and labels follow from."""
        return [path for path in (self.list_of(root, split), self._classes(root)) if path]

    def _classes(self, root: Path) -> Path | None:
        return _first(root, self.beside)

    def _folder(self, root: Path, split: str) -> str:
        there = [folder for folder in self.folders[split] if (root / folder).is_dir()]
        if len(there) == 1:
            return there[0]
        choice = " or ".join(str(root / folder) for folder in self.folders[split])
        if there:
            raise UserError(
                f"{root} has the images of {split} twice: {', '.join(there)}", expected=f"one of {choice}"
            )
        raise UserError(
            f"{root} has a list of {split} and no images of it",
            expected=choice,
            fix="unpack the images there",
        )


def find_published(root: Path) -> Published | None:
    """Which of these sets lies at `root`, by its lists; class folders or tars of splits beside them come first."""
    if any((root / name).exists() for name in ("train", "val", "train.tar", "val.tar")):
        return None
    return next(
        (each for each in PUBLISHED if any(each.list_of(root, split) for split in ("train", "val"))), None
    )


def index_listed(root: Path, published: Published, split: str) -> Index:
    """The images of a split in the order of its list. UserError names listed images that are not there; images that no list
    names are noted."""
    stamps: Stamps = {str(path): stamp(path) for path in published.files(root, split)}
    listing = published.listing(root, split)
    sizes = _sizes_below(root, listing.names, stamps)
    if absent := [name for name in listing.names if name not in sizes]:
        raise UserError(
            f"{published.list_of(root, split)} lists {len(absent)} images that are not in {root}: {_named(absent)}",
            expected=f"each of its {len(listing.names)} images",
            fix="unpack the images again, or take their lines out of the list",
        )
    return build_index(
        listing.names, (sizes[name] for name in listing.names), listing.targets, listing.classes, stamps=stamps,
        notes=_unlisted(root, published, split, sizes.keys() - set(listing.names), stamps),
    )  # fmt: skip


def _sizes_below(root: Path, names: Iterable[str], stamps: Stamps) -> dict[str, int]:
    """Name -> bytes of every image in the folders directly below `root` that the names begin with."""
    sizes: dict[str, int] = {}
    for top in sorted({name.partition("/")[0] for name in names}):
        for inside, images in walk(str(root / top), stamps).items() if (root / top).is_dir() else ():
            prefix = "/".join((top, *inside))
            sizes |= {f"{prefix}/{name}": size for name, size in images.items()}
    return sizes


def _unlisted(root: Path, published: Published, split: str, strange: set[str], stamps: Stamps) -> list[str]:
    """A note on images beside a split's that no list names. Where both splits lie in one folder, train's note speaks for both."""
    if published.folders["train"] == published.folders["val"]:
        if split == "val":
            return []
        if published.list_of(root, "val"):
            stamps |= {str(path): stamp(path) for path in published.files(root, "val")}
            strange = strange - set(published.listing(root, "val").names)
    return (
        [f"{len(strange)} images that no list names are left out: {_named(sorted(strange))}"]
        if strange
        else []
    )


def _first(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _named(names: Collection[Any]) -> str:
    shown = ", ".join(str(name) for name in list(names)[:MOST_NAMED])
    return shown + (f", ... ({len(names)} in all)" if len(names) > MOST_NAMED else "")


def _read_inaturalist(path: Path, beside: Path | None) -> Listing:
    """iNaturalist's JSON: a label is the place of its category among the ids in their order."""
    data = _read_json(path)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    place = {category["id"]: i for i, category in enumerate(categories)}
    labels: dict[Any, int] = {}
    for annotation in data["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if category not in place:
            raise UserError(
                f"{path}: image {image} has the unknown category_id {category}",
                expected="an id of 'categories'",
            )
        if labels.setdefault(image, place[category]) != place[category]:
            raise UserError(
                f"{path}: image {image} has annotations of several categories",
                expected="one category an image",
            )
    if without := [image["file_name"] for image in data["images"] if image["id"] not in labels]:
        raise UserError(
            f"{path}: {len(without)} images without an annotation: {_named(without)}", expected="a category for every image",
            fix="fetch the file again, or remove their entries",
        )  # fmt: skip
    if unknown := labels.keys() - {image["id"] for image in data["images"]}:
        raise UserError(
            f"{path}: annotations refer to unknown images: {_named(sorted(unknown))}",
            expected="ids of 'images'",
        )
    names = [str(category["name"]) for category in categories]
    if len(set(names)) < len(names):
        names = [f"{category['name']} ({category['id']})" for category in categories]
    return Listing(
        [image["file_name"] for image in data["images"]],
        [labels[image["id"]] for image in data["images"]],
        names,
    )


def _read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is not a JSON file: {error}",
            expected="iNaturalist's list",
            fix="fetch or unpack it again: it may be cut short",
        ) from error
    for part, keys in PARTS.items():
        items = data.get(part) if isinstance(data, dict) else None
        if not isinstance(items, list) or not items:
            raise UserError(f"{path} has no {part}", expected=f"a list {part!r} that is not empty")
        for item in items:
            if not isinstance(item, dict) or not all(
                isinstance(item.get(key), kind) for key, kind in keys.items()
            ):
                raise UserError(
                    f"{path}: an entry of {part!r} is {str(item)[:80]}",
                    expected=f"{' and '.join(keys)} in each",
                )
    return data


def _read_places365(path: Path, beside: Path | None) -> Listing:
    """Places365's lines `path label`, its classes from categories_places365.txt."""
    if beside is None:
        raise UserError(
            f"{path} lies without categories_places365.txt",
            expected="the classes beside the lists, as they are published",
        )
    numbered = {label: name for name, label in _lines(beside)}
    classes = [numbered.get(label, "") for label in range(len(_lines(beside)))]
    if "" in classes:
        raise UserError(
            f"{beside} does not number its classes 0, 1, ...", expected="a line a class: name, number"
        )
    lines = _lines(path)
    if odd := [line for line in lines if line[1] >= len(classes)]:
        raise UserError(
            f"{path}: {len(odd)} labels out of range: {odd[0][0]} has {odd[0][1]}",
            expected=f"0 to {len(classes) - 1}, of {beside}",
        )
    return Listing([name for name, _ in lines], [label for _, label in lines], classes)


def _read_places205(path: Path, beside: Path | None) -> Listing:
    """Places205's lines `path label`; a class is called as the folder of its images."""
    lines = _lines(path)
    folders: dict[int, str] = {}
    for name, label in lines:
        folder = name.rpartition("/")[0]
        if folders.setdefault(label, folder) != folder:
            raise UserError(
                f"{path}: label {label} is both {folders[label]} and {folder}", expected="one folder a label"
            )
    if gaps := sorted(set(range(max(folders) + 1)) - folders.keys()):
        raise UserError(
            f"{path}: no image has the label {_named(gaps)}", expected="labels 0, 1, ... without a gap"
        )
    return Listing(
        [name for name, _ in lines],
        [label for _, label in lines],
        [folders[label] for label in sorted(folders)],
    )


def _lines(path: Path) -> list[tuple[str, int]]:
    """(name without a leading slash, number) of each line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}", expected="a text in UTF-8") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if not (match := LINE.fullmatch(line.strip())):
            raise UserError(
                f"{path}, line {number}: {line.strip()[:80]!r}",
                expected="a name and a label: a/abbey/1.jpg 0",
            )
        found.append((match[1], int(match[2])))
    if not found:
        raise UserError(f"{path} is empty", expected="a line an image")
    return found


def _inaturalist(year: int) -> Published:
    """The JSON's file names begin with the images' folder: train_val2018/, and train_val_images/ in 2017."""
    lists = {split: _places(f"train_val{year}", f"{split}{year}.json") for split in ("train", "val")}
    return Published(f"iNaturalist {year}", lists, dict.fromkeys(("train", "val"), ("",)), _read_inaturalist)


def _places(folder: str, name: str) -> tuple[str, str]:
    """Where a file of the publisher's archive of lists may lie: in the root, or in the archive's folder."""
    return name, f"{folder}/{name}"


LISTS205, LISTS365 = "trainvalsplit_places205", "filelist_places365-standard"
IMAGES205 = (
    "data/vision/torralba/deeplearning/images256",
    "images256",
)  # as its archive has them, or taken out of it
PUBLISHED = (
    *map(_inaturalist, (2017, 2018, 2019)),
    Published(
        "Places365",
        {
            "train": _places(LISTS365, "places365_train_standard.txt"),
            "val": _places(LISTS365, "places365_val.txt"),
        },
        {
            "train": (
                "data_256",
                "data_large",
                "data_256_standard",
                "data_large_standard",
            ),  # the last two: torchvision's
            "val": ("val_256", "val_large"),
        },
        _read_places365,
        _places(LISTS365, "categories_places365.txt"),
    ),
    Published(
        "Places205",
        {split: _places(LISTS205, f"{split}_places205.csv") for split in ("train", "val")},
        dict.fromkeys(("train", "val"), IMAGES205),
        _read_places205,
    ),
)
