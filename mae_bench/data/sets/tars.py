"""Index images in uncompressed tar files: members CLASS/NAME, or webdataset shards.

A shard holds key.jpg with its label in key.cls, key.txt or key.json.
"""

import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_bench.data.sets.folders import file_size
from mae_bench.data.sets.index import (
    Index,
    Stamps,
    build_index,
    classify_by_folder,
    name_numbers,
    sort_key,
    stamp,
)
from mae_bench.data.sets.source import is_image
from mae_bench.errors import UserError

LABELS = ("cls", "json", "txt")  # the first one that exists is the label of an image
# Next to the shards: one line per class, in the order of the integer labels.
CLASS_FILES = ("classes.txt", "classnames.txt")
MAX_TEXTS = 1000  # more than this, if nearly all differ, are captions rather than classes
MAX_DIGITS = 18  # of a label in a text
WHOLE = "an uncompressed tar file"
DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)  # raised for a damaged tar


@dataclass
class Members:
    """Images and labels of a tar.

    images: name -> (first byte, size), in the tar's order.
    labels: extension -> key -> content.
    """

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=lambda: {kind: {} for kind in LABELS})


def read_members(path: Path) -> Members:
    """List the images and labels of a tar; raise UserError if it is no tar, compressed or truncated."""
    found, size = Members(), file_size(path)
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                name = member.name.removeprefix("./")
                if member.isreg():
                    check_member(member, size)
                    _add_member(found, name, member, file)
            check_end(file)
    except DAMAGED as error:
        raise UserError(
            f"{path} cannot be read as a tar file: {_explain(path, error)}",
            expected=WHOLE,
            fix=_suggest_fix(path),
        ) from error
    return found


def check_member(member: tarfile.TarInfo, size: int) -> None:
    """Raise ReadError if a member does not lie within the `size` bytes of its archive."""
    if not 0 <= member.size <= size - member.offset_data:
        raise tarfile.ReadError(f"it ends in the middle of {member.name}")


def check_end(file: tarfile.TarFile) -> None:
    """Raise ReadError unless an archive ends with an end marker; tarfile also stops at an invalid block."""
    stream: Any = file.fileobj
    stream.seek(file.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it has no end-of-archive marker")


def _add_member(found: Members, name: str, member: tarfile.TarInfo, file: tarfile.TarFile) -> None:
    folder, _, base = name.rpartition("/")
    key, _, kind = base.rpartition(".")
    if is_image(base):
        found.images[name] = (member.offset_data, member.size)
    elif kind.lower() in LABELS and key and not base.startswith("."):
        content = file.extractfile(member)
        assert content is not None  # a regular file
        text = content.read().decode("utf-8", "replace").strip()
        found.labels[kind.lower()][f"{folder}/{key}" if folder else key] = text


def _is_compressed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))


def _explain(path: Path, error: Exception) -> str:
    return "it is compressed, which prevents random access" if _is_compressed(path) else str(error)


def _suggest_fix(path: Path) -> str:
    if _is_compressed(path):
        return f"decompress it, for example with gunzip {path}"
    return "copy or download it again: it may be truncated"


def index_tar(path: Path) -> Index:
    """Index a tar of members `CLASS/NAME` in the order of (class, name), the order of class folders."""
    stamps = {str(path): stamp(path)}
    images = {name: place for name, place in read_members(path).images.items() if name.count("/") == 1}
    names = sorted(images, key=sort_key)
    targets, classes = classify_by_folder(names)
    return build_index(
        names,
        (images[name][1] for name in names),
        targets,
        classes,
        files=[path.name],
        shard=[0] * len(names),
        starts=[images[name][0] for name in names],
        stamps=stamps,
    )


def has_classes(path: Path) -> bool:
    """Return whether the first image of the tar is in a class folder; True for a tar that cannot be read."""
    file_size(path)
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                if member.isreg() and is_image(member.name.rpartition("/")[2]):
                    return member.name.removeprefix("./").count("/") == 1
    except DAMAGED:
        return True  # indexing it reports the error
    return False


def index_shards(paths: Sequence[Path]) -> Index:
    """Index all images of the shards in the order of shards and members; names are `SHARD/MEMBER`."""
    stamps: Stamps = {str(path): stamp(path) for path in paths}
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[Any] = []
    for number, path in enumerate(paths):
        members = read_members(path)
        names += [f"{path.name}/{name}" for name in members.images]
        places += [(number, *place) for place in members.images.values()]
        labels += [_find_label(name, members.labels, path) for name in members.images]
    labelled = next((i for i, label in enumerate(labels) if label is not None), None)
    if labelled is not None and None in labels:
        raise UserError(
            f"{names[labels.index(None)]} has no label, but {names[labelled]} has one",
            expected="a label (.cls, .json or .txt) for every image, or for none",
        )
    targets, classes = _classify(labels, _read_class_file(paths[0].parent, stamps), paths[0].parent)
    return build_index(
        names,
        (size for _, _, size in places),
        targets,
        classes,
        files=[str(path) for path in paths],
        shard=[number for number, _, _ in places],
        starts=[start for _, start, _ in places],
        stamps=stamps,
    )


def _find_label(name: str, labels: dict[str, dict[str, str]], shard: Path) -> int | str | None:
    """Return the label of an image, whose key is its name up to the last dot or (webdataset) the first."""
    folder, _, base = name.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    keys = (prefix + base.rpartition(".")[0], prefix + base.partition(".")[0])
    for kind in LABELS:
        for key in keys:
            if key in labels[kind]:
                label: int | str | None = PARSERS[kind](labels[kind][key], f"{shard}: {key}.{kind}")
                return label
    return None


def _parse_integer(text: str, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{place} contains {text[:40]!r}", expected="the number of the image's class"
        ) from None


def _parse_json(text: str, place: str) -> int | str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place} is not JSON: {error}", expected='{"label": ...}, or metadata without a label'
        ) from None
    if isinstance(value, dict):
        value = next((value[key] for key in ("label", "cls") if key in value), None)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


PARSERS: dict[str, Callable[[str, str], Any]] = {
    "cls": _parse_integer,
    "json": _parse_json,
    "txt": lambda text, place: int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else text,
}


def _read_class_file(folder: Path, stamps: Stamps) -> list[str]:
    for path in (folder / name for name in CLASS_FILES):
        if path.is_file():
            stamps[str(path)] = stamp(path)
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise UserError(f"{path} cannot be read: {error}", expected="a UTF-8 text file") from error
            return [line.strip() for line in lines if line.strip()]
    return []


def _classify(labels: list[Any], listed: list[str], place: Path) -> tuple[list[int], list[str]]:
    """Return targets and class names.

    Integers are targets themselves, texts are sorted; captions and missing labels give the single class "".
    """
    kinds = {type(label) for label in labels}
    distinct = set(labels)
    if kinds == {int}:
        if listed and not 0 <= min(distinct) <= max(distinct) < len(listed):
            raise UserError(
                f"labels from {min(distinct)} to {max(distinct)} with {len(listed)} listed classes",
                expected="labels 0, 1, ... of the listed classes",
                fix=f"check the labels, and {' or '.join(CLASS_FILES)} next to the shards",
            )
        return labels, listed or name_numbers(labels, place)
    if kinds == {str} and not (len(distinct) > MAX_TEXTS and len(distinct) > len(labels) // 10):
        classes = listed or sorted(distinct)
        unknown = distinct - set(classes)
        if unknown:
            raise UserError(
                f"the label {sorted(unknown)[0]!r} is not one of the listed classes",
                expected=", ".join(classes[:10]),
            )
        number = {name: i for i, name in enumerate(classes)}
        return [number[label] for label in labels], classes
    if len(kinds - {type(None)}) > 1:
        raise UserError("a set with both integer labels and text labels", expected="one kind of label")
    return [0] * len(labels), [""]
