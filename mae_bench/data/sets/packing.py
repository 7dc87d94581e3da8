"""Write packed sets: one indexed file of images per split, optionally resized or re-encoded."""

import hashlib
import io
import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image

from mae_bench.data.sets.decode import NUMPY, decode_size
from mae_bench.data.sets.index import build_index, write_index
from mae_bench.data.sets.packed import HEADER, VERSION, digest_split, is_packed, read_header
from mae_bench.data.sets.source import BadImage, ImageSource, decode
from mae_bench.errors import UserError
from mae_bench.files import is_full, json_digest, write_atomic, write_json
from mae_bench.lifetime import end_with_parent
from mae_bench.seal import BrokenSeal, check_json_seal, seal_json, sync_folder

QUALITY = 90  # default JPEG quality of resized images: see benchmarks/results for its cost and benefit
SUBSAMPLING = "4:2:0"
SUFFIXES = (".data", ".index", ".checksums", ".part", ".journal")
WINDOW = 256  # images per journal entry; an interrupted pack resumes after the last entry

FREE = ("version", "pillow", "name")  # entries of the header that may differ between equal sets

Row = tuple[int, int, int, int, int]  # index in the source, bytes, height, width, CRC-32
ProgressCallback = Callable[[str, int, int], None]  # called with (stage, number done, total number)


@dataclass(frozen=True)
class PackOptions:
    """What to do with each image; by default its bytes are kept unchanged.

    short_side: length in pixels that the shorter side is reduced to (bicubic, antialiased), never enlarged.
    quality: JPEG quality of every image; None writes resized images with 90 and keeps the bytes of others.
    raw: store uint8 pixels instead of files.
    unchecked: keep the bytes without decoding them; bad images are found when they are read.
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
                f"quality {self.quality}",
                expected="1 to 100 (above 95, files grow with little gain in quality)",
            )
        if self.raw and self.quality is not None:
            raise UserError(f"raw pixels with quality {self.quality}", expected="one of the two")

    @property
    def label(self) -> str:
        """Suffix of the set's name that states how its images differ from the source's; "" if unchanged."""
        parts = []
        if self.short_side:
            parts.append(f"{self.short_side}px")
        if (self.short_side or self.quality) and not self.raw:
            parts.append(f"q{self.quality or QUALITY}")
        if self.raw:
            parts.append("raw")
        return "".join(f"-{part}" for part in parts)

    def encode(self, data: bytes) -> tuple[bytes, int, int]:
        """Return what to store of an image, and its height and width (0 if unchecked); raise BadImage."""
        if self.unchecked:
            return data, 0, 0
        if not (self.short_side or self.quality or self.raw):
            return data, *decode_size(data)
        if data.startswith(NUMPY):
            raise BadImage("an array, which can only be packed unchanged: --original")
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
    """Return the image with this shorter side, or unchanged if it is not larger.

    The longer side is rounded down, as in torchvision's Resize.
    """
    short = min(image.size)
    if short <= short_side:
        return image
    width, height = (short_side if side == short else int(short_side * side / short) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def pack_sources(
    sources: dict[str, ImageSource],
    out: Path,
    options: PackOptions,
    *,
    name: str,
    num_workers: int = 0,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Pack the splits into the folder `out` and return the header.

    Images that do not decode are left out and listed in the header. An interrupted call is resumed; a
    complete set of the same images and options is left unchanged.
    Raises UserError if `out` holds another set, no image decodes, or the disk is full (then partial files are
    removed).
    """
    digests = {split: [source.digest, len(source)] for split, source in sources.items()}
    header: dict[str, Any] = {
        "version": VERSION,
        "source": digests,
        "how": asdict(options),
        "pillow": PIL.__version__,
        "name": name + options.label,
    }
    if not options.raw:
        header["subsampling"] = SUBSAMPLING
    if is_packed(out):
        return _read_same(out, header)
    packs = {
        split: _Pack(source, out / split, header, num_workers, progress) for split, source in sources.items()
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_empty(out)
        header["splits"] = {split: pack.run(options) for split, pack in packs.items()}
        for pack in packs.values():
            pack.part.replace(pack.data)
        digest = json_digest({split: digest_split(entry) for split, entry in header["splits"].items()})
        write_json(out / HEADER, seal_json(header | {"digest": digest}))
        sync_folder(out)
        for pack in packs.values():
            pack.journal.unlink()
    except OSError as error:
        if is_full(error):
            for pack in packs.values():
                pack.discard()
        raise UserError(
            f"{out} cannot be written: {error}",
            expected="a folder with enough space for the packed images",
            fix="free some space, or give another folder",
        ) from error
    return read_header(out)


def _read_same(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Read the header of an existing set; raise UserError if its images or options are others."""
    found = read_header(out)
    if any(found.get(key) != value for key, value in header.items() if key not in FREE):
        raise UserError(
            f"{out} holds a packed set of other images, or packed with other options",
            expected="an empty folder",
            fix="give another folder",
        )
    return found


def _check_empty(out: Path) -> None:
    """Raise UserError if a folder holds files other than those of an interrupted pack."""
    others = sorted(path.name for path in out.iterdir() if path.suffix not in SUFFIXES)
    if others:
        raise UserError(
            f"{out} is not empty: {', '.join(others[:5])}",
            expected="a new folder for the packed set",
            fix="give another folder",
        )


class _Pack:
    """Packing of one split: NAME.data.part grows, and NAME.journal records how much of it is complete."""

    def __init__(
        self,
        source: ImageSource,
        path: Path,
        header: dict[str, Any],
        num_workers: int,
        progress: ProgressCallback | None,
    ):
        self.source, self.split, self.num_workers, self.progress = source, path.name, num_workers, progress
        self.identity = json_digest([header, path.name])
        self.data, self.index = path.with_suffix(".data"), path.with_suffix(".index")
        self.checksums = path.with_suffix(".checksums")
        self.part, self.journal = path.with_suffix(".data.part"), path.with_suffix(".journal")
        self.rows: list[Row] = []
        self.bad: list[list[str]] = []
        self.done = self.bytes = 0

    def run(self, options: PackOptions) -> dict[str, Any]:
        """Write the split, except for the final rename of its data, and return its entry in the header."""
        sha = self._resume()
        with open(self.part, "r+b") as file, open(self.journal, "ab") as journal:
            file.truncate(self.bytes)
            file.seek(self.bytes)
            for window in self._encode_windows(options):
                self._write(window, file, journal, sha)
        return self._finish(sha.hexdigest())

    def discard(self) -> None:
        """Remove the partial files."""
        for path in (self.part, self.journal, self.index, self.checksums):
            path.unlink(missing_ok=True)

    def _resume(self) -> Any:
        """Restore the state recorded in the journal, if it belongs to the same images and options.

        Return the running SHA-256 of the data. Damaged data is packed again from the start.
        """
        if self.data.is_file():  # interrupted between the final rename and the header
            self.data.replace(self.part)
        self.part.touch()
        entries = self._read_journal()
        sha = self._hash_data([row for entry in entries[1:] for row in entry["rows"]])
        if sha is None:
            entries, sha = entries[:1], hashlib.sha256()
        for entry in entries[1:]:
            self.rows += [tuple(row) for row in entry["rows"]]
            self.bad += entry["bad"]
            self.done, self.bytes = entry["done"], entry["bytes"]
        write_atomic(self.journal, lambda file: file.writelines(map(_encode_line, entries)))
        return sha

    def _read_journal(self) -> list[dict[str, Any]]:
        """Return the entries before one that is damaged or truncated; the first alone for another pack."""
        entries: list[dict[str, Any]] = []
        with suppress(FileNotFoundError, ValueError, BrokenSeal):
            for line in self.journal.read_text(encoding="utf-8").splitlines():
                entries.append(check_json_seal(json.loads(line), self.journal))
        first = {"pack": self.identity}
        return entries if entries[:1] == [first] else [first]

    def _hash_data(self, rows: list[Row]) -> Any:
        """Return the running SHA-256 of the images of `rows`; None if one differs from its checksum."""
        sha = hashlib.sha256()
        with open(self.part, "rb") as file:
            for _, size, _, _, checksum in rows:
                data = file.read(size)
                if len(data) != size or zlib.crc32(data) != checksum:
                    return None
                sha.update(data)
        return sha

    def _encode_windows(self, options: PackOptions) -> Iterator[Iterable[Any]]:
        """Yield the encoded images of each window; workers encode the next one while the caller writes."""
        starts = range(self.done, len(self.source), WINDOW)
        windows = [range(start, min(start + WINDOW, len(self.source))) for start in starts]
        if self.num_workers == 0:
            for window in windows:
                yield (_encode(self.source, options, i) for i in window)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            self.num_workers, context, initializer=_init_worker, initargs=(self.source, options, os.getpid())
        ) as pool:
            ahead: Iterable[Any] = ()
            for window in windows:
                results, ahead = ahead, pool.map(_encode_in_worker, window, chunksize=16)
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
            rows.append((i, len(data), height, width, zlib.crc32(data)))
            self.bytes += len(data)
        if self.done == before:
            return
        file.flush()
        os.fsync(file.fileno())  # the journal must never be ahead of the data
        journal.write(_encode_line({"done": self.done, "bytes": self.bytes, "rows": rows, "bad": bad}))
        journal.flush()
        self.rows += rows
        self.bad += bad
        if self.progress:
            self.progress(self.split, self.done, len(self.source))

    def _finish(self, digest: str) -> dict[str, Any]:
        if not self.rows:
            reason = self.bad[0][1] if self.bad else "the split is empty"
            raise UserError(f"no image of {self.split} decodes: {reason}", expected="images")
        indices, sizes, height, width, checksums = np.array(self.rows, np.int64).T
        index = build_index(
            [self.source.name(i) for i in indices.tolist()],
            sizes,
            self.source.targets[indices],
            self.source.classes,
            files=[self.data.name],
            shard=np.zeros(len(sizes)),
            starts=np.cumsum(sizes) - sizes,
            shapes=np.stack([height, width], 1),
        )
        content, sums = write_index(index), checksums.astype("<u4").tobytes()
        write_atomic(self.index, lambda file: file.write(content))
        write_atomic(self.checksums, lambda file: file.write(sums))
        return {
            "images": len(index),
            "classes": len(index.classes),
            "bytes": self.bytes,
            "sha256": digest,
            "index_sha256": hashlib.sha256(content).hexdigest(),
            "checksums_sha256": hashlib.sha256(sums).hexdigest(),
            "left_out": self.bad,
        }


def _encode_line(entry: dict[str, Any]) -> bytes:
    return json.dumps(seal_json(entry), separators=(",", ":")).encode() + b"\n"


def _encode(source: ImageSource, options: PackOptions, i: int) -> tuple[int, bytes | str, int, int]:
    """Return (i, stored bytes or the reason why the image does not decode, height, width)."""
    try:
        return i, *options.encode(source.read(i))
    except (BadImage, OSError) as error:
        return i, str(error), 0, 0


_worker_state: list[Any] = []  # the source and the options, in a worker process


def _init_worker(source: ImageSource, options: PackOptions, parent: int) -> None:
    end_with_parent(parent)
    _worker_state[:] = [source, options]


def _encode_in_worker(i: int) -> tuple[int, bytes | str, int, int]:
    source, options = _worker_state
    return _encode(source, options, i)
