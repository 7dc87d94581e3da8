"""Hugging Face sets on disk: Arrow files are read in place, Parquet files are unpacked once into a packed set in the cache."""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mae_bench.data.sets.fetch import file_lock
from mae_bench.data.sets.index import Index, IndexedImages, build_index, cache_folder, stamp
from mae_bench.data.sets.packed import How, is_packed, open_packed, pack_sources
from mae_bench.data.sets.shards import spellings
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import NotInstalled, UserError
from mae_bench.files import json_digest

log = logging.getLogger(__name__)

IMAGE_NAMES = (
    "image",
    "img",
    "jpg",
    "png",
    "webp",
    "jpeg",
)  # of the column, where the set does not declare it
LABEL_NAMES = ("label", "labels", "cls", "fine_label")
IMAGE = "a column `image` of {bytes, path} or of bytes"


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise NotInstalled(
            f"Arrow and Parquet sets need pyarrow: {error}", fix='python -m pip install "mae_bench[arrow]"'
        ) from error
    return pyarrow


@dataclass(frozen=True)
class Columns:
    """What a set's schema says: the image column, the label's ("" if there is none) and the names of its classes, if given."""

    image: str
    label: str
    names: tuple[str, ...]


def arrow_files(root: Path, split: str) -> list[Path]:
    """The Arrow files of a split: a folder that `save_to_disk` wrote (root/SPLIT, or root itself as train); [] if none."""
    for place in (root / name for name in spellings(split)):
        if (place / "state.json").is_file():
            return _saved(place)
        if place.is_dir():  # whatever is beside the split's own folder is no part of it
            return sorted(place.glob("*.arrow"))
    if split == "train" and (root / "state.json").is_file():
        return _saved(root)
    return [
        path
        for path in sorted(root.glob("*.arrow"))
        if any(_is_named(path, name) for name in spellings(split))
    ]


def parquet_files(root: Path, split: str) -> list[Path]:
    """The Parquet files of a split: root/data/SPLIT-*.parquet, root/SPLIT-*.parquet or root/SPLIT/*.parquet; [] if none."""
    for name in spellings(split):
        if (root / name).is_dir():
            return sorted((root / name).glob("*.parquet"))
        beside = [
            path
            for place in (root / "data", root)
            for path in sorted(place.glob("*.parquet"))
            if _is_named(path, name)
        ]
        if beside:
            return beside
    return []


def _is_named(path: Path, split: str) -> bool:
    return re.search(rf"(^|[-_]){split}([-_.]|$)", path.stem) is not None


def _saved(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'state.json'} is not what save_to_disk writes: {error!r}", fix="save the set again"
        ) from error
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} was saved as a selection of rows", fix="call flatten_indices() before save_to_disk()"
        )
    if lacking := [path for path in files if not path.is_file()]:
        raise UserError(
            f"{lacking[0]} is missing", expected="each file that state.json names", fix="copy the set again"
        )
    return files


def index_arrow(files: Sequence[Path]) -> Index:
    """Where each image's bytes lie in the files; UserError if they are compressed, and so lie nowhere."""
    pa = _pyarrow()
    stamps = {str(path): stamp(path) for path in files}
    names: list[str] = []
    places: list[np.ndarray] = []
    labels: list[Any] = []
    for number, path in enumerate(files):
        with pa.memory_map(str(path)) as mapped:
            base, row = mapped.read_buffer(1).address, 0
            columns, batches = _batches(pa, mapped, path)
            for batch in batches:
                found = _places(pa, batch.column(columns.image), base, mapped.size(), path)
                places.append(np.insert(found, 0, number, axis=1))
                names += _names(pa, batch.column(columns.image), path.name, row)
                labels += batch.column(columns.label).to_pylist() if columns.label else [None] * len(batch)
                row += len(batch)
    shard, starts, sizes = np.concatenate(places).T if places else np.empty((3, 0), np.int64)
    targets, classes = _targets(labels, columns, files[0])
    return build_index(
        names, sizes, targets, classes, files=[str(path) for path in files], shard=shard, starts=starts, stamps=stamps
    )  # fmt: skip


def _batches(pa: ModuleType, mapped: Any, path: Path) -> tuple[Columns, Iterable[Any]]:
    """The columns and record batches of a file in the streaming format, or in the file format."""
    try:
        mapped.seek(0)
        if mapped.read(6) == b"ARROW1":
            mapped.seek(0)
            reader = pa.ipc.open_file(mapped)
            return columns_of(pa, reader.schema, path), [
                reader.get_batch(i) for i in range(reader.num_record_batches)
            ]
        mapped.seek(0)
        stream = pa.ipc.open_stream(mapped)
        return columns_of(pa, stream.schema, path), list(stream)
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as an Arrow file: {error}", fix="copy the set again: it may be cut short"
        ) from error


def columns_of(pa: ModuleType, schema: Any, path: Path) -> Columns:
    """Which columns hold images and labels: as the set's `features` declare them, else by name."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    beside = path.parent / "dataset_info.json"
    if not info and beside.is_file():
        info = json.loads(beside.read_text(encoding="utf-8"))
    features = {
        name: value for name, value in (info.get("features") or {}).items() if isinstance(value, dict)
    }
    kinds = {name: features.get(name, {}).get("_type") for name in schema.names}
    image = _first(schema.names, [name for name, kind in kinds.items() if kind == "Image"], IMAGE_NAMES)
    label = _first(schema.names, [name for name, kind in kinds.items() if kind == "ClassLabel"], LABEL_NAMES)
    if not image or not _holds_bytes(pa, schema.field(image).type):
        raise UserError(f"{path} has no column of images; found: {', '.join(schema.names)}", expected=IMAGE)
    return Columns(image, label, tuple(features.get(label, {}).get("names") or ()))


def _first(present: Sequence[str], declared: Sequence[str], usual: Sequence[str]) -> str:
    return next((name for name in (*declared, *usual) if name in present), "")


def _holds_bytes(pa: ModuleType, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(pa, field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _bytes_of(pa: ModuleType, column: Any) -> Any:
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _places(pa: ModuleType, column: Any, base: int, size: int, path: Path) -> np.ndarray:
    """(N, 2) first byte in the file and size of each value."""
    values = _bytes_of(pa, column)
    if len(values) and values.null_count == len(values):
        raise UserError(
            f"{path} holds paths of images and not the images", fix="save the set with its files embedded"
        )
    _, offsets, data = values.buffers()
    wide = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    ends = np.frombuffer(offsets, wide)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    start = (data.address if data is not None else base) - base
    if not 0 <= start <= size:
        raise UserError(
            f"{path} is compressed", expected="an Arrow file as save_to_disk() writes it, without compression"
        )
    return np.stack([start + ends[:-1], np.diff(ends)], axis=1)


def _names(pa: ModuleType, column: Any, file: str, row: int) -> list[str]:
    """`FILE:ROW`, and the image's own path where the set has it."""
    has_paths = pa.types.is_struct(column.type) and any(field.name == "path" for field in column.type)
    paths = column.field("path").to_pylist() if has_paths else [None] * len(column)
    return [f"{file}:{row + i}:{path}" if path else f"{file}:{row + i}" for i, path in enumerate(paths)]


def _targets(labels: list[Any], columns: Columns, path: Path) -> tuple[list[int], list[str]]:
    kinds = {type(label) for label in labels}
    if not columns.label or kinds <= {type(None)}:
        return [0] * len(labels), [""]
    if kinds == {str}:
        names = sorted(set(labels))
        number = {name: i for i, name in enumerate(names)}
        return [number[label] for label in labels], names
    if kinds != {int}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(
            f"{path}: the column {columns.label} holds {found}", expected="integers, or texts alone"
        )
    if set(labels) == {-1}:  # how the hub marks a split whose labels are kept back
        return [0] * len(labels), [""]
    names = list(columns.names) or [str(i) for i in range(max(labels) + 1)]
    if min(labels) < 0 or max(labels) >= len(names):
        raise UserError(
            f"{path}: labels from {min(labels)} to {max(labels)}",
            expected=f"0 to {len(names) - 1}, for its classes",
        )
    return labels, names


class ParquetImages(ImageSource):
    """The rows of Parquet files in their order. Reading forwards is fast; anything else reads a whole row group an image."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self._group: tuple[int, Any] = (-1, None)

    @cached_property
    def _opened(self) -> list[Any]:
        pa = _pyarrow()
        try:
            return [pa.parquet.ParquetFile(path, memory_map=True) for path in self.files]
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{self.files[0].parent}: a Parquet file cannot be read: {error}", fix="copy the set again"
            ) from error

    @cached_property
    def _columns(self) -> Columns:
        return columns_of(_pyarrow(), self._opened[0].schema_arrow, self.files[0])

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        """(file, row group) of every row group."""
        return [(n, group) for n, file in enumerate(self._opened) for group in range(file.num_row_groups)]

    @cached_property
    def _ends(self) -> np.ndarray:
        """The row behind each row group."""
        return np.cumsum([self._opened[n].metadata.row_group(group).num_rows for n, group in self._groups])

    @cached_property
    def _labelled(self) -> tuple[list[int], list[str]]:
        label = self._columns.label
        labels = (
            [v for file in self._opened for v in file.read([label])[label].to_pylist()]
            if label
            else [None] * len(self)
        )
        return _targets(labels, self._columns, self.files[0])

    @property
    def classes(self) -> list[str]:
        return self._labelled[1]

    @cached_property
    def targets(self) -> np.ndarray:
        return np.array(self._labelled[0], np.int32)

    @cached_property
    def digest(self) -> str:
        return json_digest([[path.name, path.stat().st_size] for path in self.files])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _row(self, i: int) -> tuple[Any, int, int]:
        """The image column of the row's group, the row in it, and the file's number."""
        place = int(np.searchsorted(self._ends, i, side="right"))
        if self._group[0] != place:
            number, group = self._groups[place]
            self._group = (
                place,
                self._opened[number].read_row_group(group, [self._columns.image])[0].combine_chunks(),
            )
        return self._group[1], i - int(self._ends[place - 1] if place else 0), self._groups[place][0]

    def name(self, i: int) -> str:
        column, row, number = self._row(i)
        before = int(np.searchsorted(self._ends, i, side="right"))
        first = next(n for n, (file, _) in enumerate(self._groups) if file == number)
        in_file = (
            row + int(self._ends[before - 1] if before else 0) - int(self._ends[first - 1] if first else 0)
        )
        return _names(_pyarrow(), column.slice(row, 1), self.files[number].name, in_file)[0]

    def read(self, i: int) -> bytes:
        column, row, _ = self._row(i)
        return _bytes_of(_pyarrow(), column)[row].as_py() or b""

    def pixels(self, i: int) -> np.ndarray | None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_group": (-1, None)}


def open_unpacked(source: ImageSource, key: str) -> IndexedImages:
    """The source as a packed set in the cache, its bytes unchanged; made by the first process that asks."""
    out = cache_folder() / "unpacked" / json_digest([key, source.digest])[:32]
    if not is_packed(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{out} cannot be made: {error}",
                expected="a cache folder with room for the set",
                fix="export MAE_BENCH_CACHE=FOLDER",
            ) from error
        log.info("unpacking %d images to %s, once", len(source), out)
        with file_lock(out):
            pack_sources({"all": source}, out, How(unchecked=True), name="unpacked")
    return open_packed(out, "all")
