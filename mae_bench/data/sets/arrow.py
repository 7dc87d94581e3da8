"""Read Hugging Face sets: Arrow files in place, Parquet files unpacked once to a packed set in the cache."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mae_bench.data.sets.folders import file_size
from mae_bench.data.sets.index import Index, IndexedImages, build_index, cache_folder, name_numbers, stamp
from mae_bench.data.sets.packed import HEADER, is_packed, open_packed
from mae_bench.data.sets.packing import PackOptions, pack_sources
from mae_bench.data.sets.shards import split_names
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import NotInstalled, UserError
from mae_bench.files import json_digest
from mae_bench.locks import file_lock
from mae_bench.seal import BrokenSeal

log = logging.getLogger(__name__)

# Usual names of the columns, for sets that do not declare them.
IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "jpeg")
LABEL_NAMES = ("label", "labels", "cls", "fine_label")
IMAGE = "a column `image` of {bytes, path} or of bytes"


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise NotInstalled(
            f"Arrow and Parquet sets need pyarrow: {error}", fix='python -m pip install "mae_bench[arrow]"'
        ) from error
    return pyarrow


@contextmanager
def _explain_errors(pa: Any, path: Path, kind: str) -> Iterator[None]:
    """Turn the errors that pyarrow raises for a damaged file into UserErrors."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} cannot be read as {kind} file: {error}",
            fix="copy the set again: it may be truncated or damaged",
        ) from error


def _read_column(batch: Any, name: str) -> Any:
    """Return a column of a record batch or table, checked: pyarrow trusts offsets, also those beyond it."""
    column = batch.column(name)
    column.validate(full=True)
    return column


@dataclass(frozen=True)
class Columns:
    """Columns of a set by its schema.

    image: the image column.
    label: the label column; "" if there is none.
    names: class names, if the schema declares them.
    """

    image: str
    label: str
    names: tuple[str, ...]


def find_arrow_files(root: Path, split: str) -> list[Path]:
    """Return the Arrow files of a split: in root/SPLIT, in root saved as train, or named after the split."""
    for folder in (root / name for name in split_names(split)):
        if (folder / "state.json").is_file():
            return _read_state(folder)
        if folder.is_dir():  # files outside the split's own folder are not part of it
            return sorted(folder.glob("*.arrow"))
    if split == "train" and (root / "state.json").is_file():
        return _read_state(root)
    names = split_names(split)
    return [path for path in sorted(root.glob("*.arrow")) if any(_is_named(path, name) for name in names)]


def find_parquet_files(root: Path, split: str) -> list[Path]:
    """Return the Parquet files of a split: [root/data/]SPLIT-*.parquet or root/SPLIT/*.parquet."""
    for name in split_names(split):
        if (root / name).is_dir():
            return sorted((root / name).glob("*.parquet"))
        candidates = sorted((root / "data").glob("*.parquet")) + sorted(root.glob("*.parquet"))
        found = [path for path in candidates if _is_named(path, name)]
        if found:
            return found
    return []


def _is_named(path: Path, split: str) -> bool:
    return re.search(rf"(^|[-_]){split}([-_.]|$)", path.stem) is not None


def _read_state(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'state.json'} was not written by save_to_disk(): {error!r}", fix="save the set again"
        ) from error
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} was saved as a selection of rows", fix="call flatten_indices() before save_to_disk()"
        )
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing", expected="each file listed in state.json", fix="copy the set again"
        )
    return files


def index_arrow(files: Sequence[Path]) -> Index:
    """Index the bytes of each image within the files; raise UserError if the files are compressed."""
    pa = _import_pyarrow()
    stamps = {str(path): stamp(path) for path in files}
    names: list[str] = []
    places: list[np.ndarray] = []
    labels: list[Any] = []
    for number, path in enumerate(files):
        file_size(path)
        with _explain_errors(pa, path, "an Arrow"), pa.memory_map(str(path)) as mapped:
            base, row = mapped.read_buffer(1).address, 0
            columns, batches = _read_batches(pa, mapped, path)
            for batch in batches:
                images = _read_column(batch, columns.image)
                found = _locate_values(pa, images, base, mapped.size(), path)
                places.append(np.insert(found, 0, number, axis=1))
                names += _name_rows(pa, images, path.name, row)
                labels += (
                    _read_column(batch, columns.label).to_pylist() if columns.label else [None] * len(batch)
                )
                row += len(batch)
    shard, starts, sizes = np.concatenate(places).T if places else np.empty((3, 0), np.int64)
    targets, classes = _classify(labels, columns, files[0])
    return build_index(
        names,
        sizes,
        targets,
        classes,
        files=[str(path) for path in files],
        shard=shard,
        starts=starts,
        stamps=stamps,
    )


def _read_batches(pa: Any, mapped: Any, path: Path) -> tuple[Columns, Iterable[Any]]:
    """Return the columns and record batches of a file in the streaming format or the file format."""
    mapped.seek(0)
    is_file_format = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    if is_file_format:
        reader = pa.ipc.open_file(mapped)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        return find_columns(pa, reader.schema, path), batches
    stream = pa.ipc.open_stream(mapped)
    return find_columns(pa, stream.schema, path), list(stream)


def find_columns(pa: Any, schema: Any, path: Path) -> Columns:
    """Find the image and label columns: those declared in the set's `features`, else by name."""
    features = _read_features(schema, path)
    kinds = {name: features.get(name, {}).get("_type") for name in schema.names}
    image = _find_column(schema.names, [name for name, kind in kinds.items() if kind == "Image"], IMAGE_NAMES)
    label = _find_column(
        schema.names, [name for name, kind in kinds.items() if kind == "ClassLabel"], LABEL_NAMES
    )
    if not image or not _holds_bytes(pa, schema.field(image).type):
        raise UserError(f"{path} has no image column; found: {', '.join(schema.names)}", expected=IMAGE)
    names = features.get(label, {}).get("names") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path}: the class names of {label} are {str(names)[:80]}", expected="a list of texts"
        )
    return Columns(image, label, tuple(names))


def _read_features(schema: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Return the features that a set declares, by column, in its schema or its dataset_info.json."""
    info_file = path.parent / "dataset_info.json"
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        if not info and info_file.is_file():
            info = json.loads(info_file.read_text(encoding="utf-8"))
        declared = (info.get("features") or {}).items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: its metadata, or {info_file.name} next to it, cannot be read: {error!r}",
            expected="JSON with the features of the set",
            fix="copy the set again: it may be damaged",
        ) from error
    return {name: value for name, value in declared if isinstance(value, dict)}


def _find_column(present: Sequence[str], declared: Sequence[str], usual: Sequence[str]) -> str:
    return next((name for name in (*declared, *usual) if name in present), "")


def _holds_bytes(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(pa, field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _get_bytes(pa: Any, column: Any) -> Any:
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _locate_values(pa: Any, column: Any, base: int, size: int, path: Path) -> np.ndarray:
    """Return the first byte in the file and the size of each value, (N, 2)."""
    values = _get_bytes(pa, column)
    if len(values) and values.null_count == len(values):
        raise UserError(
            f"{path} contains paths of images instead of images",
            expected=IMAGE,
            fix="save the set with its files embedded",
        )
    _, offsets, data = values.buffers()
    wide = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    ends = np.frombuffer(offsets, wide)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    start = (data.address if data is not None else base) - base
    if not 0 <= start <= size:
        raise UserError(
            f"{path} is compressed", expected="an uncompressed Arrow file, as written by save_to_disk()"
        )
    return np.stack([start + ends[:-1], np.diff(ends)], axis=1)


def _name_rows(pa: Any, column: Any, file: str, row: int) -> list[str]:
    """Return `FILE:ROW` for each row, followed by the image's own path if the set has one."""
    has_paths = pa.types.is_struct(column.type) and any(field.name == "path" for field in column.type)
    paths = column.field("path").to_pylist() if has_paths else [None] * len(column)
    return [f"{file}:{row + i}:{path}" if path else f"{file}:{row + i}" for i, path in enumerate(paths)]


def _classify(labels: list[Any], columns: Columns, path: Path) -> tuple[list[int], list[str]]:
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
            f"{path}: the column {columns.label} contains {found}", expected="only integers, or only texts"
        )
    if set(labels) == {-1}:  # how the Hugging Face Hub marks a split whose labels are withheld
        return [0] * len(labels), [""]
    names = list(columns.names) or name_numbers(labels, path)
    if min(labels) < 0 or max(labels) >= len(names):
        raise UserError(
            f"{path}: labels from {min(labels)} to {max(labels)}",
            expected=f"0 to {len(names) - 1}, the labels of its classes",
        )
    return labels, names


class ParquetImages(ImageSource):
    """Rows of Parquet files in order; only sequential reads are fast, others read a row group per image."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self._group: tuple[int, Any] = (-1, None)

    @cached_property
    def _readers(self) -> list[Any]:
        pa = _import_pyarrow()
        readers = []
        for path in self.files:
            file_size(path)
            with _explain_errors(pa, path, "a Parquet"):
                reader = pa.parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
                readers.append(reader)
        return readers

    @cached_property
    def _columns(self) -> Columns:
        return find_columns(_import_pyarrow(), self._readers[0].schema_arrow, self.files[0])

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        """(file number, row group) of every row group."""
        groups: list[tuple[int, int]] = []
        for number, reader in enumerate(self._readers):
            groups += [(number, group) for group in range(reader.num_row_groups)]
        return groups

    @cached_property
    def _ends(self) -> np.ndarray:
        """Index of the first row after each row group."""
        sizes = [self._readers[number].metadata.row_group(group).num_rows for number, group in self._groups]
        return np.cumsum(sizes)

    @cached_property
    def _labelled(self) -> tuple[list[int], list[str]]:
        label = self._columns.label
        labels: list[Any] = []
        if not label:
            labels = [None] * len(self)
        else:
            for path, reader in zip(self.files, self._readers, strict=True):
                with _explain_errors(_import_pyarrow(), path, "a Parquet"):
                    labels += _read_column(reader.read([label]), label).to_pylist()
        return _classify(labels, self._columns, self.files[0])

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

    def _read_row(self, i: int) -> tuple[Any, int, int]:
        """Return the image column of the row's group, the row within it, and the file number."""
        position = int(np.searchsorted(self._ends, i, side="right"))
        number, group = self._groups[position]
        if self._group[0] != position:
            with _explain_errors(_import_pyarrow(), self.files[number], "a Parquet"):
                table = self._readers[number].read_row_group(group, [self._columns.image])
                images = _read_column(table, self._columns.image).combine_chunks()
                stated = int(self._ends[position]) - self._first_row(position)
                if len(images) != stated:
                    raise EOFError(f"row group {group} has {len(images)} of {stated} rows")
            self._group = (position, images)
        return self._group[1], i - self._first_row(position), number

    def _first_row(self, position: int) -> int:
        """Return the index of the first row of a row group."""
        return int(self._ends[position - 1]) if position else 0

    def name(self, i: int) -> str:
        column, row, number = self._read_row(i)
        first_group = next(n for n, (file, _) in enumerate(self._groups) if file == number)
        row_in_file = i - self._first_row(first_group)
        return _name_rows(_import_pyarrow(), column.slice(row, 1), self.files[number].name, row_in_file)[0]

    def read(self, i: int) -> bytes:
        column, row, _ = self._read_row(i)
        return _get_bytes(_import_pyarrow(), column)[row].as_py() or b""

    def pixels(self, i: int) -> np.ndarray | None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_group": (-1, None)}


def open_unpacked(source: ImageSource, key: str) -> IndexedImages:
    """Open the source as a packed set in the cache, with unchanged bytes; one process writes it."""
    out = cache_folder() / "unpacked" / json_digest([key, source.digest])[:32]
    if is_packed(out):
        try:
            return open_packed(out, "all")
        except BrokenSeal as error:
            log.warning("%s; it is unpacked again", error.given)
            (out / HEADER).unlink(missing_ok=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be created: {error}",
            expected="a cache folder with enough space for the set",
            fix="export MAE_BENCH_CACHE=FOLDER",
        ) from error
    log.info("unpacking %d images to %s (once)", len(source), out)
    with file_lock(out):
        pack_sources({"all": source}, out, PackOptions(unchecked=True), name="unpacked")
    return open_packed(out, "all")
