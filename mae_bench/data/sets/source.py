"""Define the interface of an image set, decode images with Pillow and count the images that do not decode."""

import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from mae_bench.errors import UserError

log = logging.getLogger(__name__)

# .npy holds images whose number of channels is not that of an RGB or grey image.
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".npy")


class BadImage(Exception):
    """Truncated or undecodable image data."""


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image without decoding it; raise BadImage for any error that Pillow raises inside the block."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:
        raise BadImage("not an image format that Pillow supports") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(str(error) or type(error).__name__) from error


def decode(data: bytes) -> Image.Image:
    """Decode an image of any mode (grey, palette, CMYK, alpha) to RGB; raise BadImage if that fails."""
    with open_image(data) as image:
        return image.convert("RGB")


class ImageSource(ABC):
    """Images addressed by index, in an order that is the same on every machine.

    A source is cheap to pickle and to fork: large arrays are memory-mapped, and every process opens its own
    files.
    """

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Class names; [""] if the images have no classes."""

    @property
    @abstractmethod
    def targets(self) -> np.ndarray:
        """Index into `classes` for each image, (N,) int32."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Digest of the split, 64 hex digits: over names and sizes, or over its content."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Return the name of image i, as messages show it."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """Return image i as an encoded file (JPEG, PNG, ...); raise OSError if it cannot be read."""

    @abstractmethod
    def pixels(self, i: int) -> np.ndarray | None:
        """Return a view of the raw pixels, (H, W, 3) uint8; None if the set stores encoded files."""

    def stored(self, i: int, length: int | None = None) -> bytes:
        """Return the first `length` bytes (None: all) stored of image i; raise OSError on failure."""
        return self.read(i)[:length]

    def stored_sizes(self) -> np.ndarray:
        """Return the number of bytes stored for each image, (N,); 0 for an image that cannot be read."""
        return np.array([self._stored_size(i) for i in range(len(self))], np.int64)

    def _stored_size(self, i: int) -> int:
        try:
            return len(self.stored(i))
        except OSError:
            return 0


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files are ignored."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


class BadImages:
    """Count the images that do not decode, each once; raise UserError above `limit`, a fraction of `total`.

    names: the reason why an image did not decode, by image name.
    """

    def __init__(self, limit: float, total: int):
        self._limit, self._total = limit, total
        self.names: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self.names)

    def add(self, name: str, reason: str) -> None:
        """Count and log an image that the caller skips."""
        if name in self.names:
            return
        self.names[name] = reason
        log.warning("image %s does not decode and is skipped: %s", name, reason)
        if self.count > self._limit * self._total:
            fraction = 1.2 * self.count / max(self._total, 1)
            raise UserError(
                f"{self.note()} (the last: {reason})",
                expected=f"at most {self._limit:.3%} of the images (max_bad_images={self._limit:g})",
                fix=f"replace or remove them, or set max_bad_images={fraction:.2g} or more",
            )

    def note(self) -> str:
        """Return a note for the record with the number and first names of bad images; "" if none."""
        if not self.names:
            return ""
        shown = ", ".join(list(self.names)[:5]) + (", ..." if self.count > 5 else "")
        return f"{self.count} of {self._total} images did not decode: {shown}"
