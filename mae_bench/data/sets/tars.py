"""Images in uncompressed tar files: members CLASS/NAME, or shards of key.jpg with key.cls, key.txt or key.json (webdataset)."""

import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_bench.data.sets.index import Index, Stamps, build_index, by_folder, sort_key, stamp
from mae_bench.data.sets.source import is_image
from mae_bench.errors import UserError

LABELS = ("cls", "json", "txt")  # the first that an image has is its label
CLASS_FILES = (
    "classes.txt",
    "classnames.txt",
)  # beside the shards: a line a class, in the order of the integer labels
MOST_TEXTS = 1000  # more texts than this, nearly all different, are captions and no classes
WHOLE = "an uncompressed tar file"


@dataclass
class Members:
    """images: name -> (first byte, size), in the tar's order. labels: extension -> key -> content."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=lambda: {kind: {} for kind in LABELS})


def read_members(path: Path) -> Members:
    """What a tar holds; UserError if it is none, is compressed or cut short."""
    found = Members()
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                name = member.name.removeprefix("./")
                if member.isreg():
                    _take(found, name, member, file)
            need_end(file)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as a tar file: {_reason(path, error)}", expected=WHOLE, fix=_fix(path)
        ) from error
    return found


def need_end(file: tarfile.TarFile) -> None:
    """ReadError unless an archive that was read through ends with the mark of its end; tarfile takes any odd block for it."""
    stream: Any = file.fileobj
    stream.seek(file.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it ends without the mark of a tar's end")


def _take(found: Members, name: str, member: tarfile.TarInfo, file: tarfile.TarFile) -> None:
    folder, _, base = name.rpartition("/")
    key, _, kind = base.rpartition(".")
    if is_image(base):
        found.images[name] = (member.offset_data, member.size)
    elif kind.lower() in LABELS and key and not base.startswith("."):
        content = file.extractfile(member)
        assert content is not None  # it is a regular file
        text = content.read().decode("utf-8", "replace").strip()
        found.labels[kind.lower()][f"{folder}/{key}" if folder else key] = text


def _is_compressed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))


def _reason(path: Path, error: Exception) -> str:
    return (
        "it is compressed, and a compressed file has no random access" if _is_compressed(path) else str(error)
    )


def _fix(path: Path) -> str:
    return (
        f"decompress it, as with gunzip {path}"
        if _is_compressed(path)
        else "copy or fetch it again: it may be cut short"
    )


def index_tar(path: Path) -> Index:
    """One tar of `CLASS/NAME`, in the order of (class, name): the same images in the same order as its folders."""
    stamps = {str(path): stamp(path)}
    images = {name: place for name, place in read_members(path).images.items() if name.count("/") == 1}
    names = sorted(images, key=sort_key)
    targets, classes = by_folder(names)
    places = [images[name] for name in names]
    return build_index(
        names, (size for _, size in places), targets, classes, files=[path.name], shard=[0] * len(names),
        starts=[start for start, _ in places], stamps=stamps,
    )  # fmt: skip


def has_classes(path: Path) -> bool:
    """Whether the tar's images lie in class folders, by the first of them."""
    try:
        with tarfile.open(path, "r:") as file:
            first = next(
                (
                    m.name.removeprefix("./")
                    for m in file
                    if m.isreg() and is_image(m.name.rpartition("/")[2])
                ),
                "",
            )
    except (tarfile.TarError, OSError, EOFError):
        return True  # what is wrong with it is said where it is indexed
    return first.count("/") == 1


def index_shards(paths: Sequence[Path]) -> Index:
    """All images of the shards, in the order of the shards and of the members in them; names are `SHARD/MEMBER`."""
    stamps: Stamps = {str(path): stamp(path) for path in paths}
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[Any] = []
    for number, path in enumerate(paths):
        members = read_members(path)
        names += [f"{path.name}/{name}" for name in members.images]
        places += [(number, *place) for place in members.images.values()]
        labels += [_label(name, members.labels, path) for name in members.images]
    labelled = next((i for i, label in enumerate(labels) if label is not None), None)
    if labelled is not None and None in labels:
        raise UserError(
            f"{names[labels.index(None)]} has no label, and {names[labelled]} has one",
            expected="a label (.cls, .json or .txt) for every image, or for none",
        )
    listed = _listed_classes(paths[0].parent, stamps)
    targets, classes = _classes(labels, listed)
    return build_index(
        names, (size for *_, size in places), targets, classes, files=[str(path) for path in paths],
        shard=[number for number, *_ in places], starts=[start for _, start, _ in places], stamps=stamps,
    )  # fmt: skip


def _label(name: str, labels: dict[str, dict[str, str]], shard: Path) -> int | str | None:
    """The label of an image; its key is its name up to the last dot, or as webdataset has it up to the first."""
    folder, _, base = name.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    keys = (prefix + base.rpartition(".")[0], prefix + base.partition(".")[0])
    for kind in LABELS:
        for key in keys:
            if key in labels[kind]:
                return PARSERS[kind](labels[kind][key], f"{shard}: {key}.{kind}")
    return None


def _integer(text: str, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{place} holds {text[:40]!r}", expected="the number of the image's class") from None


def _from_json(text: str, place: str) -> int | str | None:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{place} is not JSON: {error}", expected='{"label": ...}, or metadata without a label'
        ) from None
    found = (
        next((value[key] for key in ("label", "cls") if key in value), None)
        if isinstance(value, dict)
        else value
    )
    return found if isinstance(found, int | str) and not isinstance(found, bool) else None


PARSERS: dict[str, Callable[[str, str], Any]] = {
    "cls": _integer,
    "json": _from_json,
    "txt": lambda text, place: int(text) if text.isdecimal() else text,
}


def _listed_classes(folder: Path, stamps: Stamps) -> list[str]:
    for path in (folder / name for name in CLASS_FILES):
        if path.is_file():
            stamps[str(path)] = stamp(path)
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return []


def _classes(labels: list[Any], listed: list[str]) -> tuple[list[int], list[str]]:
    """Targets and class names: integers are targets themselves, texts are sorted, captions and nothing are the one class ""."""
    kinds = {type(label) for label in labels}
    distinct = set(labels)
    if kinds == {int}:
        if min(distinct) < 0 or (listed and max(distinct) >= len(listed)):
            raise UserError(
                f"labels from {min(distinct)} to {max(distinct)}"
                + f" with {len(listed)} listed classes" * bool(listed),
                expected="labels 0, 1, ... of the listed classes",
            )
        return labels, listed or [str(number) for number in range(max(distinct) + 1)]
    if kinds == {str} and not (len(distinct) > MOST_TEXTS and len(distinct) > len(labels) // 10):
        classes = listed or sorted(distinct)
        if unknown := distinct - set(classes):
            raise UserError(
                f"the label {sorted(unknown)[0]!r} is not among the listed classes",
                expected=", ".join(classes[:10]),
            )
        number = {name: i for i, name in enumerate(classes)}
        return [number[label] for label in labels], classes
    if len(kinds - {type(None)}) > 1:
        raise UserError(
            "labels that are numbers and labels that are texts in one set", expected="one kind of label"
        )
    return [0] * len(labels), [""]
