"""Read the size and depth of images from their headers, without decoding them."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

NUM_THREADS = 16  # they wait for the disk
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Header(NamedTuple):
    """Size in pixels as the image is shown, by its EXIF orientation; whether channels have 8 bits."""

    width: int
    height: int
    is_8_bit: bool


def read_headers(paths: Iterable[Path]) -> list[Header | None]:
    """Return the header of each image; None for a file that is no image."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(_read_header, paths))


def _read_header(path: Path) -> Header | None:
    try:
        with Image.open(path) as image:
            # Not the method of PNG, which decodes the image in search of a tag at its end.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            width, height = image.size[::-1] if orientation in TRANSPOSED else image.size
            return Header(width, height, not image.mode.startswith(("I", "F")))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return None
