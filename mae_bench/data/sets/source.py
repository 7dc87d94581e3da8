"""What every set of images offers, decoding by Pillow, and the account of the images that do not decode."""

import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from mae_bench.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (
    ".jpeg",
    ".jpg",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".npy",
)  # the last for other channels than RGB


class BadImage(Exception):
    """Bytes that are not a whole image."""


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """The image, not decoded yet; BadImage for whatever Pillow raises inside, at a file that is truncated or no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:
        raise BadImage("no image format that Pillow knows") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(str(error) or type(error).__name__) from error


def decode(data: bytes) -> Image.Image:
    """The image as RGB, whatever its mode (grey, palette, CMYK, alpha); BadImage if it is truncated or no image."""
    with opened(data) as image:
        return image.convert("RGB")


class ImageSource(ABC):
    """Images that are read by their index, in an order that is the same on every machine.

    It is cheap to pickle and to fork: what is large is memory-mapped, and every process opens its own files.
    """

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names; "" alone where the images have none."""

    @property
    @abstractmethod
    def targets(self) -> np.ndarray:
        """(N,) int32, an index into `classes` for each image."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """64 hex digits: what the split holds, by its names and sizes or by its content."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What messages call the image."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The image as an encoded file (JPEG, PNG ...), not decoded; OSError if it cannot be read."""

    @abstractmethod
    def pixels(self, i: int) -> np.ndarray | None:
        """(H, W, 3) uint8 where the set stores raw pixels, without a copy; None where it stores encoded files."""

    def stored(self, i: int, length: int | None = None) -> bytes:
        """The first `length` bytes (None: all) of what the set stores of an image; OSError if it cannot be read."""
        return self.read(i)[:length]

    def stored_sizes(self) -> np.ndarray:
        """(N,) bytes that the set stores of each image; an image that cannot be read has 0."""
        return np.array([self._stored_size(i) for i in range(len(self))], np.int64)

    def _stored_size(self, i: int) -> int:
        try:
            return len(self.stored(i))
        except OSError:
            return 0


def is_image(name: str) -> bool:
    """Whether the name is an image's; hidden files are none."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


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
