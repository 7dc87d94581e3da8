"""Index sets published with lists of images and labels: iNaturalist 2017 to 2019, Places205 and Places365.

iNaturalist 2021 comes in class folders, sorted by class id, and is read as class folders.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_bench.data.sets.folders import list_images
from mae_bench.data.sets.index import Index, Stamps, build_index, stamp
from mae_bench.errors import UserError

LINE = re.compile(r"/?(\S.*?)[\s,]+(\d{1,9})")  # of a list of Places: a path and a label
PARTS: dict[str, dict[str, type]] = {  # the parts of iNaturalist's JSON that are read
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": object},
    "annotations": {"image_id": int, "category_id": int},
}
MAX_SHOWN = 5


@dataclass(frozen=True)
class Listing:
    """Content of a list: image paths below the image folder, their labels, and the classes in label order."""

    names: list[str]
    targets: list[int]
    classes: list[str]


@dataclass(frozen=True)
class Published:
    """Layout in which a set is published.

    lists: possible paths of the list of each split.
    folders: possible image folders of each split, unless the list includes them.
    class_files: possible paths of the file with the classes, if the lists contain only labels.
    """

    name: str
    lists: Mapping[str, tuple[str, ...]]
    folders: Mapping[str, tuple[str, ...]]
    read: Callable[[Path, Path | None], Listing]
    class_files: tuple[str, ...] = ()

    def find_list(self, root: Path, split: str) -> Path | None:
        """Return the list of a split; None if it is missing."""
        return _find_first(root, self.lists[split])

    def read_listing(self, root: Path, split: str) -> Listing:
        """Read the list of a split, with names relative to `root`; raise UserError if the list is invalid."""
        path = self.find_list(root, split)
        assert path is not None  # only splits with a list are opened
        listing = self.read(path, _find_first(root, self.class_files))
        folder = self._find_folder(root, split)
        duplicates = [name for name, count in Counter(listing.names).items() if count > 1]
        if duplicates:
            raise UserError(
                f"{path} lists images more than once: {_join(duplicates)}",
                expected="each image once",
                fix="remove the repeated lines, or download the list again",
            )
        prefix = f"{folder}/" if folder else ""
        return Listing([prefix + name for name in listing.names], listing.targets, listing.classes)

    def find_files(self, root: Path, split: str) -> list[Path]:
        """Return the files that determine a split's images and labels."""
        paths = (self.find_list(root, split), _find_first(root, self.class_files))
        return [path for path in paths if path]

    def _find_folder(self, root: Path, split: str) -> str:
        present = [folder for folder in self.folders[split] if (root / folder).is_dir()]
        if len(present) == 1:
            return present[0]
        choice = " or ".join(str(root / folder) for folder in self.folders[split])
        if present:
            raise UserError(
                f"{root} has the images of {split} twice: {', '.join(present)}",
                expected=f"one of {choice}",
                fix="move all but one of these folders elsewhere",
            )
        raise UserError(
            f"{root} has a list of {split} but no images of it",
            expected=choice,
            fix="unpack the images into this folder",
        )


def find_published(root: Path) -> Published | None:
    """Return the published set whose lists are in `root`; class folders or tars of splits take precedence."""
    if any((root / name).exists() for name in ("train", "val", "train.tar", "val.tar")):
        return None
    for published in PUBLISHED:
        if any(published.find_list(root, split) for split in ("train", "val")):
            return published
    return None


def index_listed(root: Path, published: Published, split: str) -> Index:
    """Index the images of a split in the order of its list.

    Images that no list contains are noted. Raises UserError if listed images are missing.
    """
    stamps: Stamps = {str(path): stamp(path) for path in published.find_files(root, split)}
    listing = published.read_listing(root, split)
    sizes = _find_sizes(root, listing.names, stamps)
    missing = [name for name in listing.names if name not in sizes]
    if missing:
        path = published.find_list(root, split)
        raise UserError(
            f"{path} lists {len(missing)} images that are not in {root}: {_join(missing)}",
            expected=f"each of its {len(listing.names)} images",
            fix="unpack the images again, or remove their lines from the list",
        )
    notes = _note_unlisted(root, published, split, sizes.keys() - set(listing.names), stamps)
    return build_index(
        listing.names,
        (sizes[name] for name in listing.names),
        listing.targets,
        listing.classes,
        stamps=stamps,
        notes=notes,
    )


def _find_sizes(root: Path, names: Iterable[str], stamps: Stamps) -> dict[str, int]:
    """Return the size of every image in the top-level folders that the names start with, by name."""
    sizes: dict[str, int] = {}
    for top in sorted({name.partition("/")[0] for name in names}):
        if not (root / top).is_dir():
            continue
        for parts, images in list_images(str(root / top), stamps).items():
            prefix = "/".join((top, *parts))
            sizes |= {f"{prefix}/{name}": size for name, size in images.items()}
    return sizes


def _note_unlisted(
    root: Path, published: Published, split: str, unlisted: set[str], stamps: Stamps
) -> list[str]:
    """Return a note on images in no list; if both splits share a folder, train's note covers both."""
    if published.folders["train"] == published.folders["val"]:
        if split == "val":
            return []
        if published.find_list(root, "val"):
            stamps |= {str(path): stamp(path) for path in published.find_files(root, "val")}
            unlisted = unlisted - set(published.read_listing(root, "val").names)
    if not unlisted:
        return []
    return [f"{len(unlisted)} images that are in no list are ignored: {_join(sorted(unlisted))}"]


def _find_first(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _join(names: Collection[Any]) -> str:
    shown = ", ".join(str(name) for name in list(names)[:MAX_SHOWN])
    return shown + (f", ... ({len(names)} in total)" if len(names) > MAX_SHOWN else "")


def _read_inaturalist(path: Path, class_file: Path | None) -> Listing:
    """Read iNaturalist's JSON; a label is the position of its category among the sorted category ids."""
    data = _read_json(path)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    positions = {category["id"]: i for i, category in enumerate(categories)}
    labels = _label_images(path, data["annotations"], positions)
    unlabelled = [image["file_name"] for image in data["images"] if image["id"] not in labels]
    if unlabelled:
        raise UserError(
            f"{path}: {len(unlabelled)} images without an annotation: {_join(unlabelled)}",
            expected="a category for every image",
            fix="download the file again, or remove their entries",
        )
    unknown = labels.keys() - {image["id"] for image in data["images"]}
    if unknown:
        raise UserError(
            f"{path}: annotations refer to unknown images: {_join(sorted(unknown))}",
            expected="ids of 'images'",
            fix="download the file again, or remove their entries",
        )
    names = [str(category["name"]) for category in categories]
    if len(set(names)) < len(names):
        names = [f"{category['name']} ({category['id']})" for category in categories]
    return Listing(
        [image["file_name"] for image in data["images"]],
        [labels[image["id"]] for image in data["images"]],
        names,
    )


def _label_images(path: Path, annotations: list[dict[str, Any]], positions: dict[Any, int]) -> dict[Any, int]:
    """Return the label of each annotated image, by image id."""
    labels: dict[Any, int] = {}
    for annotation in annotations:
        image, category = annotation["image_id"], annotation["category_id"]
        if category not in positions:
            raise UserError(
                f"{path}: image {image} has the unknown category_id {category}",
                expected="an id of 'categories'",
            )
        if labels.setdefault(image, positions[category]) != positions[category]:
            raise UserError(
                f"{path}: image {image} has annotations of several categories",
                expected="one category per image",
            )
    return labels


def _read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        data: dict[str, list[dict[str, Any]]] = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is not a JSON file: {error}",
            expected="iNaturalist's list",
            fix="download or unpack it again: it may be truncated",
        ) from error
    for part, keys in PARTS.items():
        items = data.get(part) if isinstance(data, dict) else None
        if not isinstance(items, list) or not items:
            raise UserError(f"{path} has no {part}", expected=f"a non-empty list {part!r}")
        for item in items:
            if not _has_keys(item, keys):
                raise UserError(
                    f"{path}: an entry of {part!r} is {str(item)[:80]}",
                    expected=f"{' and '.join(keys)} in each",
                )
    return data


def _has_keys(item: Any, keys: Mapping[str, type]) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), kind) for key, kind in keys.items())


def _read_places365(path: Path, class_file: Path | None) -> Listing:
    """Read Places365's lines `path label`, with the classes of categories_places365.txt."""
    if class_file is None:
        raise UserError(
            f"categories_places365.txt is missing; {path} needs it",
            expected="the file of classes next to the lists, as published",
            fix="unpack it from the archive of the lists",
        )
    numbered = _read_lines(class_file)
    names = {label: name for name, label in numbered}
    classes = [names.get(label, "") for label in range(len(numbered))]
    if "" in classes:
        raise UserError(
            f"{class_file} does not number its classes 0, 1, ...",
            expected="one line per class: name, number",
        )
    lines = _read_lines(path)
    invalid = [line for line in lines if line[1] >= len(classes)]
    if invalid:
        raise UserError(
            f"{path}: {len(invalid)} labels out of range: {invalid[0][0]} has {invalid[0][1]}",
            expected=f"0 to {len(classes) - 1}, the labels in {class_file}",
        )
    return Listing([name for name, _ in lines], [label for _, label in lines], classes)


def _read_places205(path: Path, class_file: Path | None) -> Listing:
    """Read Places205's lines `path label`; a class has the name of the folder of its images."""
    lines = _read_lines(path)
    folders: dict[int, str] = {}
    for name, label in lines:
        folder = name.rpartition("/")[0]
        if folders.setdefault(label, folder) != folder:
            raise UserError(
                f"{path}: label {label} is both {folders[label]} and {folder}",
                expected="one folder per label",
            )
    candidates = range(min(max(folders) + 1, len(folders) + MAX_SHOWN))  # a damaged label may be huge
    unused = [label for label in candidates if label not in folders]
    if unused:
        raise UserError(
            f"{path}: no image has the label {_join(unused)}", expected="labels 0, 1, ... without a gap"
        )
    return Listing(
        [name for name, _ in lines],
        [label for _, label in lines],
        [folders[label] for label in sorted(folders)],
    )


def _read_lines(path: Path) -> list[tuple[str, int]]:
    """Read (name without a leading slash, number) from each line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}", expected="a UTF-8 text file") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = LINE.fullmatch(line.strip())
        if not match:
            raise UserError(
                f"{path}, line {number}: {line.strip()[:80]!r}",
                expected="a name and a label: a/abbey/1.jpg 0",
            )
        found.append((match[1], int(match[2])))
    if not found:
        raise UserError(f"{path} is empty", expected="one line per image")
    return found


def _describe_inaturalist(year: int) -> Published:
    """Return the layout of one year; its file names include the image folder, such as train_val2018."""
    lists = {split: _locate(f"train_val{year}", f"{split}{year}.json") for split in ("train", "val")}
    return Published(f"iNaturalist {year}", lists, dict.fromkeys(("train", "val"), ("",)), _read_inaturalist)


def _locate(folder: str, name: str) -> tuple[str, str]:
    """Return the possible paths of a file of the archive of lists: in the root or in the archive's folder."""
    return name, f"{folder}/{name}"


LISTS_205, LISTS_365 = "trainvalsplit_places205", "filelist_places365-standard"
IMAGES_205 = (
    "data/vision/torralba/deeplearning/images256",
    "images256",
)  # as in its archive, or moved out of it
PUBLISHED = (
    _describe_inaturalist(2017),
    _describe_inaturalist(2018),
    _describe_inaturalist(2019),
    Published(
        "Places365",
        lists={
            "train": _locate(LISTS_365, "places365_train_standard.txt"),
            "val": _locate(LISTS_365, "places365_val.txt"),
        },
        folders={
            # The last two are the names that torchvision gives them.
            "train": ("data_256", "data_large", "data_256_standard", "data_large_standard"),
            "val": ("val_256", "val_large"),
        },
        read=_read_places365,
        class_files=_locate(LISTS_365, "categories_places365.txt"),
    ),
    Published(
        "Places205",
        lists={split: _locate(LISTS_205, f"{split}_places205.csv") for split in ("train", "val")},
        folders=dict.fromkeys(("train", "val"), IMAGES_205),
        read=_read_places205,
    ),
)
