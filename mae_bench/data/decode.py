"""Image files and raw arrays as pixels: by Pillow, or by a faster decoder of the same pixels."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mae_bench.data.images import BadImage, ImageSource

JPEG, NUMPY = b"\xff\xd8\xff", b"\x93NUMPY"  # what such files begin with
DTYPES = ("uint8", "uint16", "float32")  # of arrays; float16 and float64 are read as float32


def read_pixels(images: ImageSource, i: int, in_chans: int = 3, *, fast: bool = True) -> np.ndarray:
    """(H, W, in_chans) of image i: raw pixels where the set stores them, else its decoded file. BadImage, OSError."""
    pixels = images.pixels(i)
    return decode_pixels(images.read(i), in_chans, fast=fast) if pixels is None else _as_channels(pixels, in_chans)


def decode_pixels(data: bytes, in_chans: int = 3, *, fast: bool = True) -> np.ndarray:
    """(H, W, in_chans) of a file: uint8 RGB for 3 channels, grey for 1; other counts come from files with just so many.

    A .npy file holds (H, W, C) or (H, W) of uint8, uint16 or float32. A grey image of 16 bits or of floats keeps its depth where
    one channel is asked for. Pages of one channel each (TIFF) are channels. EXIF rotation is not applied, as in torchvision.
    `fast` decodes JPEG by simplejpeg, which gives Pillow's pixels bit for bit; what it does not take, Pillow decodes.
    BadImage if it is truncated, no image, or of another number of channels.
    """
    if data.startswith(NUMPY):
        return _as_channels(_load_array(data), in_chans)
    if fast and in_chans in (1, 3) and (pixels := _decode_jpeg(data, in_chans)) is not None:
        return pixels
    with _opened(data) as image:
        if in_chans == 3:
            return np.asarray(image.convert("RGB"))
        return _grey(image) if in_chans == 1 else _bands(image, in_chans)


def _decode_jpeg(data: bytes, in_chans: int) -> np.ndarray | None:
    """None for what only Pillow reads or judges: CMYK, damaged files, decompression bombs."""
    if not data.startswith(JPEG):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK") or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        if in_chans == 1 and colorspace == "Gray":
            return simplejpeg.decode_jpeg(data, "GRAY")
        return _as_channels(simplejpeg.decode_jpeg(data, "RGB"), in_chans)
    except ValueError:
        return None


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:
        raise BadImage("no image format that Pillow knows") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(str(error) or type(error).__name__) from error


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.asarray(image)[..., None].astype(np.uint16)
    if image.mode in ("I", "F"):
        return np.asarray(image, np.float32)[..., None]
    return np.asarray(image.convert("L"))[..., None]


def _bands(image: Image.Image, in_chans: int) -> np.ndarray:
    bands, pages = len(image.getbands()), getattr(image, "n_frames", 1)
    if pages == in_chans and bands == 1:
        channels = []
        for page in range(pages):
            image.seek(page)
            channels.append(_grey(image))
        return np.concatenate(channels, axis=2)
    if bands != in_chans:
        raise BadImage(f"{bands} channels ({image.mode}) in {pages} page{'s' * (pages > 1)}, the model takes {in_chans}")
    return np.asarray(image)


def _load_array(data: bytes) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadImage(f"no whole .npy file: {error}") from error
    if array.dtype.name in ("float16", "float64"):
        array = array.astype(np.float32)
    if array.ndim not in (2, 3) or not array.size or array.dtype.name not in DTYPES:
        raise BadImage(f"an array of {array.dtype} {array.shape}, expected (height, width, channels) of {', '.join(DTYPES)}")
    return array if array.ndim == 3 else array[..., None]


def _as_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    found = pixels.shape[2]
    if found == in_chans:
        return pixels
    if pixels.dtype == np.uint8 and (found, in_chans) == (3, 1):
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    if pixels.dtype == np.uint8 and (found, in_chans) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    raise BadImage(f"{found} channel{'s' * (found > 1)} of {pixels.dtype}, the model takes {in_chans}")
