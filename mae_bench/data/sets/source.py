"""Define the interface of an image set, decode images with Pillow and count the images that do not decode."""

import io
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mae_bench.errors import UserError

log = logging.getLogger(__name__)

# .npy holds images whose number of channels is not that of an RGB or grey image.
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".npy")


DEEP = ("I", "F")  # how Pillow's modes of more than 8 bits begin; all of them are grey
DAMAGED = (  # raised by Pillow's decoders for damaged files
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    struct.error,
)
WHITE_IS_ZERO = 0  # of TIFF's PhotometricInterpretation


class BadImage(Exception):
    """Image data that is truncated, does not decode, or has no defined pixels.

    Args:
        reason: what was found.
        fix: what to do with such a file.
    """

    def __init__(self, reason: str, fix: str = ""):
        super().__init__(f"{reason}; {fix}" if fix else reason)


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image without decoding it; raise BadImage for any error that Pillow raises inside the block."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:
        raise BadImage("not an image format that Pillow supports", "save it as JPEG or PNG") from error
    except Image.DecompressionBombError as error:
        raise BadImage(str(error), "reduce its size") from error
    except DAMAGED as error:
        raise BadImage(str(error) or type(error).__name__, "copy it again, or remove it") from error


def decode(data: bytes) -> Image.Image:
    """Decode an image of any mode to RGB of 8 bits (see `convert_to_rgb`); raise BadImage if that fails."""
    with open_image(data) as image:
        return convert_to_rgb(image)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB of 8 bits; raise BadImage for values of an unknown range.

    The upper 8 of 16 bits are kept, as Pillow does for colour. Pillow itself clips grey values to 255.
    """
    if not image.mode.startswith(DEEP):
        return image.convert("RGB")
    values = read_deep(image)
    if values.dtype != np.uint16:
        raise BadImage(
            f"signed, 32-bit or floating-point values (mode {image.mode}), whose range no file states",
            "scale them to 8 or 16 bits, or take a model of one channel (in_chans=1)",
        )
    num_bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))[0]  # TIFF: 12 or 16
    return Image.fromarray((values >> (num_bits - 8)).astype(np.uint8)).convert("RGB")


def read_deep(image: Image.Image) -> np.ndarray:
    """Return the stored values of a grey image of more than 8 bits, (H, W) uint16 or float32."""
    if getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
        raise BadImage("a TIFF of more than 8 bits in which 0 is white", "invert it, so that 0 is black")
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    return require_finite(np.asarray(image, np.float32))


def require_finite(values: np.ndarray) -> np.ndarray:
    """Return the values; raise BadImage if one is infinite or not a number."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BadImage("infinite values or NaN", "replace them by numbers")
    return values


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
        """Return the name of image i, as messages show it: bytes that are not UTF-8 are escaped."""

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
