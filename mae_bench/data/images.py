"""Images of the ImageNet layout, read from class folders or from a tar file, and the account of those that do not decode."""

import io
import logging
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from mae_bench.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class BadImage(Exception):
    """Bytes that are not a whole image."""


def decode(data: bytes) -> Image.Image:
    """The image as RGB, whatever its mode (grey, palette, CMYK, alpha); BadImage if it is truncated or no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadImage("no image format that Pillow knows") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(str(error) or type(error).__name__) from error


class ImageSource(Protocol):
    """Images that are read by their index, in an order that is the same on every machine.

    classes: names; "" alone where the images have none. targets: an index into `classes` for each image.
    It is cheap to pickle and to fork: what is large is memory-mapped, and every process opens its own files.
    """

    classes: list[str]
    targets: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        """Number of images."""

    def name(self, i: int) -> str:
        """What messages call the image."""

    def read(self, i: int) -> bytes:
        """The image as an encoded file (JPEG, PNG ...), not decoded; OSError if it cannot be read."""

    def pixels(self, i: int) -> np.ndarray | None:
        """(H, W, 3) uint8 where the set stores raw pixels, without a copy; None where it stores encoded files."""


def open_images(root: str | Path, split: str) -> ImageSource:
    """The images of one split ("train", "val") of whatever kind of set lies at `root`; UserError where there is none."""
    return ImageSet(root, split)


class ImageSet:
    """The images of one split in a fixed order: by class, then by name. `targets[i]` is an index into `classes`.

    `root/split/CLASS/NAME.JPEG`, or `root/split.tar` with members `CLASS/NAME.JPEG`; UserError when neither holds an image.
    It may be pickled and forked: every process opens the tar for itself.
    """

    def __init__(self, root: str | Path, split: str):
        self._folder = Path(root) / split
        self._tar = self._folder.with_name(f"{split}.tar")
        self._offsets: list[tuple[int, int]] = []  # (first byte, size) of a tar's members
        self._handle, self._pid = -1, -1
        if self._folder.is_dir():
            self._names = sorted(_scan(self._folder), key=_order)
        elif self._tar.is_file():
            members = scan_tar(self._tar)
            self._names = sorted(members, key=_order)
            self._offsets = [members[name] for name in self._names]
        else:
            raise UserError(
                f"neither {self._folder} nor {self._tar} exists",
                expected="class folders, or a tar file of them",
                fix=f"mae-bench data check imagenet {root}",
            )
        if not self._names:
            raise UserError(
                f"no images below {self._folder}", expected="CLASS/NAME.JPEG", fix=f"mae-bench data check imagenet {root}"
            )
        self.classes = sorted({name.split("/")[0] for name in self._names})
        index = {name: number for number, name in enumerate(self.classes)}
        self.targets = [index[name.split("/")[0]] for name in self._names]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        """`CLASS/NAME.JPEG`."""
        return self._names[i]

    def read(self, i: int) -> bytes:
        """The file's bytes, not decoded."""
        if not self._offsets:
            return (self._folder / self._names[i]).read_bytes()
        if self._pid != os.getpid():  # a forked worker must not share its parent's handle, nor an unpickled copy a stale one
            self._handle, self._pid = os.open(self._tar, os.O_RDONLY | os.O_CLOEXEC), os.getpid()
        offset, size = self._offsets[i]
        return os.pread(self._handle, size, offset)

    def pixels(self, i: int) -> np.ndarray | None:
        """None: the files are encoded."""
        return None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": -1, "_pid": -1}

    def __del__(self) -> None:
        if getattr(self, "_pid", -1) == os.getpid():
            os.close(self._handle)


def is_image(name: str) -> bool:
    """Whether the name is an image's; hidden files are none."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def scan_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Members `CLASS/NAME` of an uncompressed tar that are images: their first byte and size. UserError if it is no such tar."""
    try:
        with tarfile.open(path, "r:") as file:
            members = [(member.name.removeprefix("./"), member) for member in file if member.isreg()]
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as a tar file: {error}", expected="an uncompressed tar of CLASS/NAME.JPEG"
        ) from error
    return {
        name: (member.offset_data, member.size)
        for name, member in members
        if name.count("/") == 1 and is_image(name.split("/")[1])
    }


def _scan(folder: Path) -> list[str]:
    classes = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return [f"{name}/{entry.name}" for name in classes for entry in os.scandir(folder / name) if is_image(entry.name)]


def _order(name: str) -> tuple[str, ...]:
    return tuple(name.split("/"))


class BadImages:
    """Counts the images that did not decode, each once; UserError when they are more than `limit` (a share) of `total` images.

    names: why each of them did not decode, by name.
    """

    def __init__(self, limit: float, total: int):
        self._limit, self._total = limit, total
        self.names: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self.names)

    def add(self, name: str, reason: str) -> None:
        """Counts and logs one image, which the caller skips."""
        if name in self.names:
            return
        self.names[name] = reason
        log.warning("image %s does not decode and is skipped: %s", name, reason)
        if self.count > self._limit * self._total:
            share = 1.2 * self.count / max(self._total, 1)
            raise UserError(
                f"{self.note()} (the last: {reason})",
                expected=f"at most {self._limit:.3%} of the images (max_bad_images={self._limit:g})",
                fix=f"replace or remove them, or set max_bad_images={share:.2g} or more",
            )

    def note(self) -> str:
        """For the record: how many and which; empty if all decoded."""
        if not self.names:
            return ""
        shown = ", ".join(list(self.names)[:5]) + (", ..." if self.count > 5 else "")
        return f"{self.count} of {self._total} images did not decode: {shown}"
