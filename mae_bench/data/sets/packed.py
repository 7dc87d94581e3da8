"""Packed sets: one file of images a split with its index, made once, smaller or decoded if asked, and read by every loader."""

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image

from mae_bench.data.sets.decode import NUMPY, probe
from mae_bench.data.sets.index import IndexedImages, build_index, read_index, write_index
from mae_bench.data.sets.source import BadImage, ImageSource, decode
from mae_bench.errors import UserError
from mae_bench.files import file_digest, is_full, json_digest, write_atomic, write_json

VERSION = 1
HEADER = "packed.json"  # written last: without it there is no packed set
QUALITY = (
    90  # of a resized image, unless another one is given: see benchmarks/results for what it costs and brings
)
SUBSAMPLING = "4:2:0"
SUFFIXES = (".data", ".index", ".part", ".journal")
WINDOW = 256  # images between two entries of the journal, by which a stopped pack goes on

Row = tuple[int, int, int, int]  # index in the source, bytes, height, width
Progress = Callable[[str, int, int], None]  # split, images handled, of how many


@dataclass(frozen=True)
class How:
    """What becomes of each image. All None: its bytes are kept as they are.

    short_side: pixels that the shorter side is reduced to (bicubic, antialiased), never enlarged. quality: of the JPEG that it
    is written as, resized or not; None writes resized ones with 90 and keeps the bytes of the rest. raw: uint8 pixels instead.
    unchecked: the bytes are kept without decoding them once; images that do not decode are met when they are read.
    """

    short_side: int | None = None
    quality: int | None = None
    raw: bool = False
    unchecked: bool = False

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise UserError(f"short_side {self.short_side}", expected="a number of pixels")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(
                f"quality {self.quality}", expected="1 to 100 (above 95 a JPEG grows and gains little)"
            )
        if self.raw and self.quality is not None:
            raise UserError(f"raw pixels with quality {self.quality}", expected="one of the two")

    @property
    def label(self) -> str:
        """What is added to the name of a set whose images are not those of its source any more."""
        written = f"q{self.quality or QUALITY}" if (self.short_side or self.quality) and not self.raw else ""
        parts = [f"{self.short_side}px" if self.short_side else "", written, "raw" if self.raw else ""]
        return "".join(f"-{part}" for part in parts if part)

    def encode(self, data: bytes) -> tuple[bytes, int, int]:
        """What is stored of an encoded image, and its height and width; BadImage if it does not decode."""
        if self.unchecked:
            return data, 0, 0
        if not (self.short_side or self.quality or self.raw):
            return data, *probe(data)
        if data.startswith(NUMPY):
            raise BadImage("an array, which is packed as it is alone: --original")
        image = decode(data)
        resized = shrink(image, self.short_side) if self.short_side else image
        if self.raw:
            return np.asarray(resized).tobytes(), resized.height, resized.width
        if resized is image and self.quality is None:
            return data, image.height, image.width
        file = io.BytesIO()
        resized.save(file, "JPEG", quality=self.quality or QUALITY, subsampling=SUBSAMPLING, optimize=True)
        return file.getvalue(), resized.height, resized.width


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """The image with that shorter side (the longer one rounded down, as torchvision's Resize has it), or itself if not larger."""
    short = min(image.size)
    if short <= short_side:
        return image
    width, height = (short_side if side == short else int(short_side * side / short) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def is_packed(root: Path) -> bool:
    """Whether a packed set lies there, whole."""
    return (root / HEADER).is_file()


def read_header(root: Path) -> dict[str, Any]:
    """What the set says of itself; UserError if it cannot be read."""
    path = root / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        version = header["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no header of a packed set: {error!r}", fix="pack the images again"
        ) from error
    if version != VERSION:
        raise UserError(
            f"{path} is of version {version}", expected=f"version {VERSION}", fix="pack the images again"
        )
    return header


def open_packed(root: Path, split: str) -> IndexedImages:
    """One split of a packed set; UserError if a file of it is missing or has another size than it was made with."""
    header = read_header(root)
    if split not in header["splits"]:
        raise UserError(f"{root} has no split {split}", expected=f"one of {', '.join(header['splits'])}")
    known, data, index = header["splits"][split], root / f"{split}.data", read_index(root / f"{split}.index")
    size = data.stat().st_size if data.is_file() else None
    if index is None or len(index) != known["images"] or size != known["bytes"]:
        raise UserError(
            f"{data} or its index is missing or has another size ({size} bytes)",
            expected=f"{known['bytes']} bytes, as it was made",
            fix="pack or copy the images again",
        )
    return IndexedImages(index, root, raw=header["how"]["raw"], digest=_content(known))


def verify_packed(root: Path) -> None:
    """Reads every byte of the set; UserError if one is not as it was written."""
    for split, known in read_header(root)["splits"].items():
        for path, expected in (
            (root / f"{split}.data", known["sha256"]),
            (root / f"{split}.index", known["index_sha256"]),
        ):
            if (found := file_digest(path)) != expected:
                raise UserError(
                    f"{path} has SHA-256 {found}", expected=expected, fix="pack or copy the images again"
                )


def _content(entry: dict[str, Any]) -> str:
    """The digest of a split: its images, and their names and labels."""
    return json_digest([entry["sha256"], entry["index_sha256"]])


def pack_sources(
    sources: dict[str, ImageSource],
    out: Path,
    how: How,
    *,
    name: str,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Packs the splits into the folder `out` and returns the header; images that do not decode are left out and named there.

    A call that was stopped goes on where it was; a whole set of the same images made in the same way is left as it is.
    UserError: another set lies in `out`, no image decodes, or the disk is full (then what was written is removed).
    """
    made_of = {split: [source.digest, len(source)] for split, source in sources.items()}
    header: dict[str, Any] = {
        "version": VERSION,
        "source": made_of,
        "how": asdict(how),
        "pillow": PIL.__version__,
        "name": name + how.label,
    }
    if not how.raw:
        header["subsampling"] = SUBSAMPLING
    if is_packed(out):
        found = read_header(out)
        if any(found.get(key) != value for key, value in header.items() if key not in ("pillow", "name")):
            raise UserError(
                f"{out} holds a packed set of other images, or made otherwise", expected="an empty folder"
            )
        return found
    packs = {
        split: _Pack(source, out / split, header, num_workers, progress) for split, source in sources.items()
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        if strangers := [path.name for path in out.iterdir() if path.suffix not in SUFFIXES]:
            raise UserError(
                f"{out} is not empty: {', '.join(sorted(strangers)[:5])}",
                expected="a new folder for the packed set",
            )
        header["splits"] = {split: each.run(how) for split, each in packs.items()}
        for each in packs.values():
            each.part.replace(each.data)
        digest = json_digest({split: _content(entry) for split, entry in header["splits"].items()})
        write_json(out / HEADER, header | {"digest": digest})
        for each in packs.values():
            each.journal.unlink()
    except OSError as error:
        if is_full(error):
            for each in packs.values():
                each.discard()
        raise UserError(
            f"{out} cannot be written: {error}", expected="a folder with room for the packed images",
            fix="make room, or give another folder",
        ) from error  # fmt: skip
    return read_header(out)


class _Pack:
    """One split on its way: NAME.data.part grows, and NAME.journal says up to where it is whole."""

    def __init__(
        self,
        source: ImageSource,
        path: Path,
        header: dict[str, Any],
        num_workers: int,
        progress: Progress | None,
    ):
        self.source, self.split, self.num_workers, self.progress = source, path.name, num_workers, progress
        self.identity = json_digest([header, path.name])
        self.data, self.index = path.with_suffix(".data"), path.with_suffix(".index")
        self.part, self.journal = path.with_suffix(".data.part"), path.with_suffix(".journal")
        self.rows: list[Row] = []
        self.bad: list[list[str]] = []
        self.done = self.bytes = 0

    def run(self, how: How) -> dict[str, Any]:
        """Writes all but the last name of the data, and returns the split's entry in the header."""
        self._go_on()
        with open(self.part, "r+b") as file, open(self.journal, "ab") as journal:
            file.truncate(self.bytes)
            file.seek(0)
            sha = hashlib.file_digest(file, "sha256")
            for window in self._windows(how):
                self._write(window, file, journal, sha)
        return self._finish(sha.hexdigest())

    def discard(self) -> None:
        """Removes what was written."""
        for path in (self.part, self.journal, self.index):
            path.unlink(missing_ok=True)

    def _go_on(self) -> None:
        """Takes up what the journal says was written, if it is the same pack's."""
        entries: list[dict[str, Any]] = []
        with suppress(FileNotFoundError, ValueError):  # ValueError: the last line is cut short
            for line in self.journal.read_text(encoding="utf-8").splitlines():
                entries.append(json.loads(line))
        if self.data.is_file():  # it was stopped between the data's last name and the header
            self.data.replace(self.part)
        self.part.touch()
        if (
            not entries
            or entries[0] != {"pack": self.identity}
            or entries[-1].get("bytes", 0) > self.part.stat().st_size
        ):
            entries = [{"pack": self.identity}]
        for entry in entries[1:]:
            self.rows += [tuple(row) for row in entry["rows"]]
            self.bad += entry["bad"]
            self.done, self.bytes = entry["done"], entry["bytes"]
        write_atomic(self.journal, lambda file: file.writelines(_line(entry) for entry in entries))

    def _windows(self, how: How) -> Iterator[Iterable[Any]]:
        """Encoded images by the window; the next window is at work while the caller writes one."""
        starts = range(self.done, len(self.source), WINDOW)
        windows = [range(start, min(start + WINDOW, len(self.source))) for start in starts]
        if self.num_workers == 0:
            yield from ((_encode(self.source, how, i) for i in window) for window in windows)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            self.num_workers, context, initializer=_start, initargs=(self.source, how)
        ) as pool:
            ahead: Iterable[Any] = ()
            for window in windows:
                results, ahead = ahead, pool.map(_work, window, chunksize=16)
                yield results
            yield ahead

    def _write(self, window: Iterable[Any], file: BinaryIO, journal: BinaryIO, sha: Any) -> None:
        rows: list[Row] = []
        bad: list[list[str]] = []
        before = self.done
        for i, data, height, width in window:
            self.done = i + 1
            if isinstance(data, str):
                bad.append([self.source.name(i), data])
                continue
            file.write(data)
            sha.update(data)
            rows.append((i, len(data), height, width))
            self.bytes += len(data)
        if self.done == before:
            return
        file.flush()
        os.fsync(file.fileno())  # the journal must never be ahead of the data
        journal.write(_line({"done": self.done, "bytes": self.bytes, "rows": rows, "bad": bad}))
        journal.flush()
        self.rows += rows
        self.bad += bad
        if self.progress:
            self.progress(self.split, self.done, len(self.source))

    def _finish(self, digest: str) -> dict[str, Any]:
        if not self.rows:
            raise UserError(
                f"no image of {self.split} decodes: {self.bad[0][1] if self.bad else 'it is empty'}",
                expected="images",
            )
        chosen, sizes, *shapes = np.array(self.rows, np.int64).T
        index = build_index(
            [self.source.name(i) for i in chosen.tolist()], sizes, self.source.targets[chosen], self.source.classes,
            files=[self.data.name], shard=np.zeros(len(sizes)), starts=np.cumsum(sizes) - sizes, shapes=np.stack(shapes, 1),
        )  # fmt: skip
        content = write_index(index)
        write_atomic(self.index, lambda file: file.write(content))
        return {
            "images": len(index), "classes": len(index.classes), "bytes": self.bytes, "sha256": digest,
            "index_sha256": hashlib.sha256(content).hexdigest(), "left_out": self.bad,
        }  # fmt: skip


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _encode(source: ImageSource, how: How, i: int) -> tuple[int, bytes | str, int, int]:
    """An image, or why there is none."""
    try:
        return i, *how.encode(source.read(i))
    except (BadImage, OSError) as error:
        return i, str(error), 0, 0


_of_worker: list[Any] = []  # the source and how it is encoded, in a worker process


def _start(source: ImageSource, how: How) -> None:
    _of_worker[:] = [source, how]


def _work(i: int) -> tuple[int, bytes | str, int, int]:
    source, how = _of_worker
    return _encode(source, how, i)
