"""Indexes of sets of images: names, places and labels as arrays, found once, kept in a cache and memory-mapped from there."""

import hashlib
import io
import json
import logging
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError
from mae_bench.files import json_digest, write_atomic

log = logging.getLogger(__name__)

VERSION = 1
MIN_KEPT = 10_000  # images; a smaller set is indexed anew in less time than its staleness could ever cost
SETTLED_SECONDS = 2.0  # a folder changed this recently may change again within the file system's clock tick
MOST_OPEN = 64  # files that a process holds open
SEPARATOR = b"\0"  # the one character that no file name has

Stamps = dict[str, list[int]]  # path -> what the system says of it


def _empty(dtype: type, *shape: int) -> np.ndarray:
    return np.empty(shape or (0,), dtype)


@dataclass(frozen=True)
class Index:
    """Where N images lie. Folders and tars are in the order of (class, name); shards and tables in their own.

    names: the names one after another in UTF-8, each followed by a zero byte (uint8). ends: (N,) where each name ends.
    sizes: (N,) bytes. targets: (N,) int32 indices into `classes`. files: paths that hold many images; empty if each image is
    a file. shard, starts: (N,) the image's file and its first byte there. shapes: (N, 2) height and width, of raw pixels alone.
    stamps: what was looked at, with the state that the index describes. notes: oddities that were met. path: the file that it
    is memory-mapped from.
    """

    classes: list[str]
    names: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    targets: np.ndarray
    files: list[str] = field(default_factory=list)
    shard: np.ndarray = field(default_factory=lambda: _empty(np.int32))
    starts: np.ndarray = field(default_factory=lambda: _empty(np.int64))
    shapes: np.ndarray = field(default_factory=lambda: _empty(np.int32, 0, 2))
    stamps: Stamps = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, i: int) -> str:
        """The name as the file system has it."""
        i = range(len(self))[i]
        start = int(self.ends[i - 1]) + 1 if i else 0
        return self.names[start : int(self.ends[i])].tobytes().decode("utf-8", "surrogateescape")

    def all_names(self) -> list[bytes]:
        """Every name, in UTF-8."""
        return self.names.tobytes().split(SEPARATOR)[:-1]

    def __getstate__(self) -> dict[str, Any]:
        """A mapped index travels as its path: a spawned worker maps the same pages."""
        return {"path": self.path, "of": json_digest(self.stamps)} if self.path else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "classes" not in state:
            index = read_index(state["path"])
            if index is None or json_digest(index.stamps) != state["of"]:
                raise UserError(
                    f"the index {state['path']} changed while it was in use", fix="start the command again"
                )
            state = index.__dict__
        self.__dict__.update(state)


ARRAYS = ("names", "ends", "sizes", "targets", "shard", "starts", "shapes")


def build_index(
    names: Sequence[str], sizes: Iterable[int], targets: Iterable[int], classes: Sequence[str], **rest: Any
) -> Index:
    """An Index from lists."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    blob = b"".join(name + SEPARATOR for name in encoded)
    arrays: dict[str, Any] = {
        "shard": np.asarray(rest.pop("shard", ()), np.int32),
        "starts": np.asarray(rest.pop("starts", ()), np.int64),
        "shapes": np.asarray(rest.pop("shapes", ()), np.int32).reshape(-1, 2),
    }
    return Index(
        list(classes), np.frombuffer(blob, np.uint8), np.cumsum(lengths + 1) - 1, np.fromiter(sizes, np.int64),
        np.fromiter(targets, np.int32), **arrays, **rest,
    )  # fmt: skip


def sort_key(name: str) -> tuple[str, ...]:
    """Orders by folder, then by name."""
    return tuple(name.split("/"))


def by_folder(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Targets and classes of names `CLASS/NAME`; one class "" where the names are not all of that form."""
    if not all(name.count("/") == 1 for name in names):
        return [0] * len(names), [""]
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders))
    number = {name: i for i, name in enumerate(classes)}
    return [number[name] for name in folders], classes


def digest_of(indexes: Mapping[str, Index]) -> str:
    """SHA-256 over the sorted lines `SPLIT/NAME, zero byte, size` of a set: the same for its folders and for its tars."""
    try:  # an index that is made again is another file, with another stamp
        files = {
            split: [str(index.path), *stamp(index.path)] for split, index in indexes.items() if index.path
        }
    except OSError:
        files = {}
    if len(files) < len(indexes):
        return _digest_lines(indexes)
    known = kept("digests", json_digest(files), ".txt")
    try:
        return known.read_text(encoding="ascii")
    except (OSError, ValueError):
        digest = _digest_lines(indexes)
        try_to_keep(known, digest.encode())
        return digest


def _digest_lines(indexes: Mapping[str, Index]) -> str:
    lines = [
        b"%b/%b\0%d\n" % (split.encode(), name, size)
        for split, index in indexes.items()
        for name, size in zip(index.all_names(), index.sizes.tolist(), strict=True)
    ]
    lines.sort()
    return hashlib.sha256(b"".join(lines)).hexdigest()


def cache_folder() -> Path:
    """$MAE_BENCH_CACHE, or mae_bench in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if own := os.environ.get("MAE_BENCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mae_bench"


def kept(what: str, key: str, suffix: str) -> Path:
    """Where the cache keeps what `key` stands for."""
    return cache_folder() / what / f"{hashlib.sha256(f'{VERSION}:{key}'.encode()).hexdigest()[:32]}{suffix}"


def try_to_keep(path: Path, data: bytes) -> bool:
    """Whether the cache took it: it may be full or closed to this user, and everything works without it."""
    try:
        write_atomic(path, lambda file: file.write(data))
    except OSError as error:
        log.info("%s is not kept for the next start: %s", path, error)
        return False
    return True


def stamp(path: str | Path) -> list[int]:
    """Size and times of change of a file or folder. A folder's times change with its entries, not with what is in them."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def is_fresh(stamps: Stamps) -> bool:
    """Whether everything that was looked at is still as it was."""
    try:
        return all(stamp(path) == known for path, known in stamps.items())
    except OSError:
        return False


def known_index(key: str) -> Index | None:
    """The index that the cache keeps under `key`, if nothing that it was made from has changed."""
    found = read_index(kept("indexes", key, ".safetensors"))
    return found if found and is_fresh(found.stamps) else None


def find_index(key: str, build: Callable[[], Index], refresh: bool = False) -> Index:
    """The index that the cache keeps under `key`, if nothing that it was made from has changed; else `build()`, kept.

    Seen as a change: files added, removed or renamed, and a tar or table that was written again. Not seen: an image that
    was overwritten in place, for only folders are looked at and not a million files; `refresh` builds in any case.
    """
    if not refresh and (known := known_index(key)):
        return known
    path = kept("indexes", key, ".safetensors")
    began = time.time_ns()
    index = build()
    settled = all(max(times) < began - SETTLED_SECONDS * 1e9 for _, *times in index.stamps.values())
    if len(index) >= MIN_KEPT and settled and try_to_keep(path, write_index(index)):
        return read_index(path) or index
    return index


def write_index(index: Index) -> bytes:
    """The index as a safetensors file: its arrays, and all else as JSON in the header's metadata."""
    header = {"version": VERSION, "classes": index.classes, "files": index.files, "stamps": index.stamps}
    header |= {"notes": index.notes} if index.notes else {}
    arrays = {
        name: np.ascontiguousarray(getattr(index, name)) for name in ARRAYS
    }  # safetensors writes a strided view wrongly
    return save(arrays, metadata={"index": json.dumps(header)})


def read_index(path: Path) -> Index | None:
    """The index in a file, memory-mapped; None where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("it is no safetensors file")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length)
        meta = json.loads(header.pop("__metadata__")["index"])
        if meta.pop("version") != VERSION:
            return None
        arrays: dict[str, Any] = {name: _view(data, header[name]) for name in ARRAYS}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        log.info("%s cannot be read and is made again: %s", path, error)
        return None
    return Index(**meta, **arrays, path=path)


DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}


def _view(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if stop > len(data):
        raise ValueError("it is cut short")
    return np.asarray(data[start:stop]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


class IndexedImages(ImageSource):
    """The images of an index, whose names and files are relative to `folder`.

    raw: pixels are stored instead of files. digest: of the content, or of what names and sizes do not tell, where it is known.
    """

    def __init__(self, index: Index, folder: str | Path, raw: bool = False, digest: str = ""):
        self.index, self.folder, self.raw, self.content_digest = index, str(folder), raw, digest
        self._open: dict[int, io.FileIO] = {}
        self._maps: dict[int, np.memmap] = {}

    @property
    def classes(self) -> list[str]:
        return self.index.classes

    @property
    def targets(self) -> np.ndarray:
        return self.index.targets

    @property
    def digest(self) -> str:
        return self.content_digest or digest_of({"": self.index})

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        return self.index.name(i)

    def read(self, i: int) -> bytes:
        return _png(self._pixels(i)) if self.raw else self.stored(i)

    def stored_sizes(self) -> np.ndarray:
        return self.index.sizes

    def stored(self, i: int, length: int | None = None) -> bytes:
        if not self.index.files:
            with open(f"{self.folder}/{self.index.name(i)}", "rb", buffering=0) as file:
                return file.read(-1 if length is None else length)
        size = int(self.index.sizes[i])
        size = size if length is None else min(length, size)
        data = os.pread(self._file(int(self.index.shard[i])).fileno(), size, int(self.index.starts[i]))
        if len(data) != size:
            raise OSError(f"{self.index.files[self.index.shard[i]]} ends before the image does")
        return data

    def pixels(self, i: int) -> np.ndarray | None:
        return self._pixels(i) if self.raw else None

    def _pixels(self, i: int) -> np.ndarray:
        number, start = int(self.index.shard[i]), int(self.index.starts[i])
        if number not in self._maps:
            self._maps[number] = np.memmap(Path(self.folder, self.index.files[number]), np.uint8, "r")
        height, width = self.index.shapes[i].tolist()
        return np.asarray(self._maps[number][start : start + height * width * 3]).reshape(height, width, 3)

    def _file(self, number: int) -> io.FileIO:
        """Open files are left to the reference count, so that a thread that still reads from one never sees it closed."""
        file = self._open.get(number)
        if file is None:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open)), None)
            file = self._open[number] = io.FileIO(Path(self.folder, self.index.files[number]))
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_maps": {}}


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
