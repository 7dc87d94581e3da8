"""Index image sets: names, offsets and labels as arrays, built once, cached and memory-mapped from the cache.

Dimensions: N images.
"""

import hashlib
import io
import json
import logging
import os
import struct
import time
import zlib
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
CACHE_VERSION = 2  # of all entries of the cache
NUM_CHECKSUM_BYTES = 4  # at the end of an entry
MAX_CLASSES = 1_000_000  # that only their labels name: a damaged label would be a huge number of classes
MIN_CACHED = 10_000  # images; indexing a smaller set again is faster than a stale index is worth
SETTLED_SECONDS = 2.0  # a folder changed this recently may change again within the file system's clock tick
MAX_OPEN = 64  # files that a process keeps open
SEPARATOR = b"\0"  # the only character that no file name contains

Stamps = dict[str, list[int]]  # path -> its size and times of change


def _empty(dtype: type, *shape: int) -> np.ndarray:
    return np.empty(shape or (0,), dtype)


@dataclass(frozen=True)
class Index:
    """Names, places and labels of N images.

    Folders and tars are in the order of (class, name), shards and tables in their own order.

    classes: class names; [""] if the images have no classes.
    names: all names in UTF-8, each followed by a zero byte, uint8.
    ends: where each name ends, (N,).
    sizes: bytes of each image, (N,).
    targets: index into `classes` of each image, (N,) int32.
    files: paths of files that hold many images each; empty if each image is a file.
    shard, starts: index into `files` and first byte of each image, (N,) each.
    shapes: height and width of each image, (N, 2); of raw pixels only.
    stamps: state of the files and folders that the index was built from.
    notes: irregularities found while indexing.
    path: file that the index is memory-mapped from.
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
        """Return the name of image i as the file system spells it."""
        i = range(len(self))[i]
        start = int(self.ends[i - 1]) + 1 if i else 0
        return self.names[start : int(self.ends[i])].tobytes().decode("utf-8", "surrogateescape")

    def all_names(self) -> list[bytes]:
        """Return all names in UTF-8."""
        return self.names.tobytes().split(SEPARATOR)[:-1]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle a memory-mapped index as its path: a spawned worker maps the same pages."""
        return {"path": self.path, "of": json_digest(self.stamps)} if self.path else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "classes" not in state:
            index = read_index(state["path"])
            if index is None or json_digest(index.stamps) != state["of"]:
                raise UserError(
                    f"the index {state['path']} changed while it was in use", fix="re-run the command"
                )
            state = index.__dict__
        self.__dict__.update(state)


ARRAYS = ("names", "ends", "sizes", "targets", "shard", "starts", "shapes")


def build_index(
    names: Sequence[str], sizes: Iterable[int], targets: Iterable[int], classes: Sequence[str], **rest: Any
) -> Index:
    """Build an Index from lists. A zero byte in a name, which no file has, is escaped."""
    encoded = [name.replace("\0", r"\0").encode("utf-8", "surrogateescape") for name in names]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    blob = b"".join(name + SEPARATOR for name in encoded)
    return Index(
        classes=list(classes),
        names=np.frombuffer(blob, np.uint8),
        ends=np.cumsum(lengths + 1) - 1,
        sizes=np.fromiter(sizes, np.int64),
        targets=np.fromiter(targets, np.int32),
        shard=np.asarray(rest.pop("shard", ()), np.int32),
        starts=np.asarray(rest.pop("starts", ()), np.int64),
        shapes=np.asarray(rest.pop("shapes", ()), np.int32).reshape(-1, 2),
        **rest,
    )


def sort_key(name: str) -> tuple[str, ...]:
    """Return the key that sorts names by folder, then by file name."""
    return tuple(name.split("/"))


def classify_by_folder(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return (targets, classes) of names `CLASS/NAME`, or the single class "" unless all have that form."""
    if not all(name.count("/") == 1 for name in names):
        return [0] * len(names), [""]
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders))
    number = {name: i for i, name in enumerate(classes)}
    return [number[name] for name in folders], [escape_name(name) for name in classes]


def escape_name(name: str) -> str:
    """Return the name of a file or folder as printable UTF-8: other bytes become backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def name_numbers(labels: Sequence[int], place: str | Path) -> list[str]:
    """Return the classes 0 to max(labels), named by number; raise UserError for labels that number none."""
    if min(labels) < 0 or max(labels) >= MAX_CLASSES:
        raise UserError(
            f"{place}: labels from {min(labels)} to {max(labels)}",
            expected=f"0, 1, ... for at most {MAX_CLASSES} classes",
            fix="check the labels, or copy the set again: it may be damaged",
        )
    return [str(number) for number in range(max(labels) + 1)]


def digest_indexes(indexes: Mapping[str, Index]) -> str:
    """Return SHA-256 over the sorted lines `SPLIT/NAME, zero byte, size` of a set, in folders or in tars.

    The cache keeps the digest of cached indexes; a rebuilt index is another file with another stamp.
    """
    try:
        files = {
            split: [str(index.path), *stamp(index.path)] for split, index in indexes.items() if index.path
        }
    except OSError:
        files = {}
    if len(files) < len(indexes):
        return _digest_lines(indexes)
    path = cache_path("digests", json_digest(files), ".txt")
    cached = read_cached(path)
    if cached is None:
        cached = _digest_lines(indexes).encode()
        try_to_cache(path, cached)
    return cached.decode()


def _digest_lines(indexes: Mapping[str, Index]) -> str:
    lines: list[bytes] = []
    for split, index in indexes.items():
        sized_names = zip(index.all_names(), index.sizes.tolist(), strict=True)
        lines += [b"%b/%b\0%d\n" % (split.encode(), name, size) for name, size in sized_names]
    lines.sort()
    return hashlib.sha256(b"".join(lines)).hexdigest()


def cache_folder() -> Path:
    """Return $MAE_BENCH_CACHE, or mae_bench in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    folder = os.environ.get("MAE_BENCH_CACHE")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mae_bench"


def cache_path(kind: str, key: str, suffix: str) -> Path:
    """Return the path in the cache of the entry with this key."""
    name = hashlib.sha256(f"{CACHE_VERSION}:{key}".encode()).hexdigest()[:32]
    return cache_folder() / kind / f"{name}{suffix}"


def try_to_cache(path: Path, data: bytes) -> bool:
    """Write a cache entry and return whether that succeeded: the cache may be full or read-only.

    The entry ends with the CRC-32 of `data`.
    """
    checksum = zlib.crc32(data).to_bytes(NUM_CHECKSUM_BYTES)
    try:
        write_atomic(path, lambda file: file.writelines((data, checksum)))
    except OSError as error:
        log.info("%s could not be cached: %s", path, error)
        return False
    return True


def read_cached(path: Path) -> bytes | None:
    """Return the data of a cache entry; None if it is missing or damaged."""
    return path.read_bytes()[:-NUM_CHECKSUM_BYTES] if _is_intact(path) else None


def _is_intact(path: Path) -> bool:
    """Return whether a cache entry is there and ends with the CRC-32 of what precedes it."""
    try:
        data = np.memmap(path, np.uint8, "r").data
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: it is empty
        log.warning("%s cannot be read and is written again: %s", path, error)
        return False
    content, checksum = data[:-NUM_CHECKSUM_BYTES], data[-NUM_CHECKSUM_BYTES:]
    if zlib.crc32(content).to_bytes(NUM_CHECKSUM_BYTES) != checksum:
        log.warning("%s is damaged and is written again", path)
        return False
    return True


def stamp(path: str | Path) -> list[int]:
    """Return size and times of change; those of a folder reflect its entries, not their content."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def is_fresh(stamps: Stamps) -> bool:
    """Return whether all stamped files and folders are unchanged."""
    try:
        return all(stamp(path) == known for path, known in stamps.items())
    except OSError:
        return False


def load_cached_index(key: str) -> Index | None:
    """Load the index cached under `key`; None if there is none, or if what it was built from has changed."""
    path = cache_path("indexes", key, ".index")
    found = read_index(path) if _is_intact(path) else None
    return found if found and is_fresh(found.stamps) else None


def load_or_build_index(key: str, build: Callable[[], Index], refresh: bool = False) -> Index:
    """Load the index cached under `key`; if it is missing or out of date, call `build` and cache its result.

    Detected changes: files added, removed or renamed, and a tar or table written again. Not detected: an
    image overwritten in place, as only folders are checked and not a million files. refresh: build in any
    case.
    """
    cached = None if refresh else load_cached_index(key)
    if cached is not None:
        return cached
    path = cache_path("indexes", key, ".index")
    began = time.time_ns()
    index = build()
    settled = all(max(times) < began - SETTLED_SECONDS * 1e9 for _, *times in index.stamps.values())
    if len(index) >= MIN_CACHED and settled and try_to_cache(path, write_index(index)):
        return read_index(path) or index
    return index


def write_index(index: Index) -> bytes:
    """Return the index as a safetensors file: its arrays, and the rest as JSON in the header's metadata."""
    header = {"version": VERSION, "classes": index.classes, "files": index.files, "stamps": index.stamps}
    header |= {"notes": index.notes} if index.notes else {}
    # Contiguous, as safetensors writes a strided view incorrectly.
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in ARRAYS}
    return save(arrays, metadata={"index": json.dumps(header)})


def read_index(path: Path) -> Index | None:
    """Memory-map the index in a file; None if the file is missing, unreadable or of another version."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("not a safetensors file")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length)
        meta = json.loads(header.pop("__metadata__")["index"])
        if meta.pop("version") != VERSION:
            return None
        arrays: dict[str, Any] = {name: _view(data, header[name]) for name in ARRAYS}
        return Index(**meta, **arrays, path=path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        log.info("%s cannot be read and is built again: %s", path, error)
        return None


DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}


def _view(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if stop > len(data):
        raise ValueError("the file is truncated")
    return np.asarray(data[start:stop]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


class IndexedImages(ImageSource):
    """Images of an index, whose names and files are relative to `folder`.

    raw: the set stores pixels instead of encoded files.
    digest: digest of the content, or of more than names and sizes; "" to compute it from names and sizes.
    checksums: file with the CRC-32 of each image (N,), compared when an image is read; "" if there is none.
    """

    def __init__(
        self, index: Index, folder: str | Path, raw: bool = False, digest: str = "", checksums: str = ""
    ):
        self.index, self.folder, self.raw, self.content_digest = index, str(folder), raw, digest
        self.checksums = checksums
        self._open: dict[int, io.FileIO] = {}
        self._maps: dict[str, np.memmap] = {}

    @property
    def classes(self) -> list[str]:
        return self.index.classes

    @property
    def targets(self) -> np.ndarray:
        return self.index.targets

    @property
    def digest(self) -> str:
        return self.content_digest or digest_indexes({"": self.index})

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        return escape_name(self.index.name(i))

    def read(self, i: int) -> bytes:
        return _encode_png(self._pixels(i)) if self.raw else self.stored(i)

    def stored_sizes(self) -> np.ndarray:
        return self.index.sizes

    def stored(self, i: int, length: int | None = None) -> bytes:
        if not self.index.files:
            with open(f"{self.folder}/{self.index.name(i)}", "rb", buffering=0) as file:
                return file.read(-1 if length is None else length)
        whole = int(self.index.sizes[i])
        size = whole if length is None else min(length, whole)
        data = os.pread(self._open_file(int(self.index.shard[i])).fileno(), size, int(self.index.starts[i]))
        if len(data) != size:
            raise OSError(f"{self.index.files[self.index.shard[i]]} ends in the middle of an image")
        if size == whole:
            self._check(i, data)
        return data

    def pixels(self, i: int) -> np.ndarray | None:
        return self._pixels(i) if self.raw else None

    def _pixels(self, i: int) -> np.ndarray:
        file, start = self.index.files[self.index.shard[i]], int(self.index.starts[i])
        height, width = self.index.shapes[i].tolist()
        data = np.asarray(self._map(file, np.uint8)[start : start + height * width * 3])
        self._check(i, data.data)
        return data.reshape(height, width, 3)

    def _check(self, i: int, data: bytes | memoryview) -> None:
        """Raise OSError if the bytes of image i differ from those that its checksum was computed of."""
        if self.checksums and zlib.crc32(data) != self._map(self.checksums, np.uint32)[i]:
            file = Path(self.folder, self.index.files[self.index.shard[i]])
            raise OSError(f"its bytes in {file} are damaged; write {self.folder} again")

    def _map(self, file: str, dtype: type) -> np.memmap:
        if file not in self._maps:
            self._maps[file] = np.memmap(Path(self.folder, file), dtype, "r")
        return self._maps[file]

    def _open_file(self, number: int) -> io.FileIO:
        """Open a file of the index, or return it if it is open.

        Files are closed by reference counting, so that a thread that is still reading never sees its file
        closed.
        """
        file = self._open.get(number)
        if file is None:
            if len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open)), None)
            file = self._open[number] = io.FileIO(Path(self.folder, self.index.files[number]))
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_maps": {}}


def _encode_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
