"""Decode image files and raw arrays to pixels, with Pillow or a faster decoder that gives the same pixels.

Dimensions: H height, W width, C channels.
"""

import io
import math
import tokenize
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from mae_bench.data.sets.source import (
    DEEP,
    BadImage,
    ImageSource,
    convert_to_rgb,
    open_image,
    read_deep,
    require_finite,
)

JPEG, NUMPY = b"\xff\xd8\xff", b"\x93NUMPY"  # first bytes of such files
END = b"\xff\xd9"  # last bytes of a JPEG
BASELINE, TABLES, SCAN = (
    0xC0,
    0xC4,
    0xDA,
)  # JPEG markers: frame header, Huffman tables, start of the first scan
DTYPES = ("uint8", "uint16", "float32")  # of arrays; float16 and float64 are read as float32


@dataclass(frozen=True)
class Jpeg:
    """A baseline JPEG that is decoded on demand, only down to the last row needed.

    shape: (H, W). height_at: offset of the height in the file.
    """

    data: bytes
    in_chans: int
    shape: tuple[int, int]
    height_at: int

    def rows(self, stop: int) -> np.ndarray:
        """Return at least `stop` rows, or all if there are fewer, as (rows, W, in_chans); raise BadImage.

        Writing a smaller height into the header ends decoding early. Two rows more than needed are decoded,
        as chroma is interpolated from neighbours, rounded up to whole blocks of 16.
        """
        height = (stop + 2 + 15) // 16 * 16
        if height >= self.shape[0]:
            return decode_pixels(self.data, self.in_chans)
        cut = self.data[: self.height_at] + height.to_bytes(2, "big") + self.data[self.height_at + 2 :]
        try:
            pixels = simplejpeg.decode_jpeg(cut, "RGB", strict=False)  # strict raises for the rows left over
            return _as_channels(pixels, self.in_chans)
        except ValueError:
            return decode_pixels(self.data, self.in_chans, fast=False)


def read_pixels(images: ImageSource, i: int, in_chans: int = 3, *, fast: bool = True) -> np.ndarray | Jpeg:
    """Return image i as (H, W, in_chans), from raw pixels or from its file; raise BadImage or OSError."""
    pixels = images.pixels(i)
    if pixels is not None:
        return _as_channels(pixels, in_chans)
    data = images.read(i)
    jpeg = _open_baseline_jpeg(data, in_chans) if fast else None
    return jpeg or decode_pixels(data, in_chans, fast=fast)


def holds_arrays(images: ImageSource) -> bool:
    """Return whether the set consists of .npy files, judged by the first bytes of its first image."""
    try:
        return len(images) > 0 and images.pixels(0) is None and images.stored(0, len(NUMPY)) == NUMPY
    except OSError:
        return False


def decode_size(data: bytes) -> tuple[int, int]:
    """Decode a file with any number of channels and return its (height, width); raise BadImage."""
    if data.startswith(NUMPY):
        height, width = _load_array(data).shape[:2]
        return height, width
    with open_image(data) as image:
        if image.mode.startswith(DEEP):
            read_deep(image)
        else:
            convert_to_rgb(image)
        return image.height, image.width


def _open_baseline_jpeg(data: bytes, in_chans: int) -> Jpeg | None:
    """Return None for files to decode whole: not a baseline JPEG, maybe truncated, or read by Pillow only."""
    if in_chans != 3 or not data.startswith(JPEG) or not data.endswith(END):
        return None
    height_at = _find_height(data)
    if not height_at:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "Gray", "RGB") or _is_too_large(height, width):
        return None
    return Jpeg(data, in_chans, (height, width), height_at)


def _find_height(data: bytes) -> int:
    """Return the offset of the height in the header of a baseline JPEG; 0 if there is none."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == BASELINE:
            return at + 5
        if marker == SCAN or (0xC0 <= marker <= 0xCF and marker != TABLES):
            return 0
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _is_too_large(height: int, width: int) -> bool:
    """Return whether Pillow would warn of a decompression bomb."""
    limit = Image.MAX_IMAGE_PIXELS or height * width
    return height * width > limit


def decode_pixels(data: bytes, in_chans: int = 3, *, fast: bool = True) -> np.ndarray:
    """Decode a file to (H, W, in_chans): uint8 RGB for 3 channels, grey for 1, else the channels of the file.

    Of 16 bits the upper 8 are kept, but a grey image keeps its values, uint16 or float32, if one channel is
    requested. The single-channel pages of a TIFF are its channels. Alpha is dropped for 3 channels and 1, and
    neither EXIF rotation nor a colour profile is applied, as in torchvision. A .npy file holds (H, W, C) or
    (H, W) of uint8, uint16 or floats, which are read as float32. docs/imagenet.md has the whole table.

    fast: decode JPEG with simplejpeg, which gives Pillow's pixels bit for bit; Pillow decodes what simplejpeg
    does not.
    Raises BadImage if the file is truncated, not an image, or has another number of channels.
    """
    if data.startswith(NUMPY):
        return _as_channels(_load_array(data), in_chans)
    if fast and in_chans in (1, 3):
        pixels = _decode_jpeg(data, in_chans)
        if pixels is not None:
            return pixels
    with open_image(data) as image:
        if in_chans == 3:
            return np.asarray(convert_to_rgb(image))
        return _to_grey(image) if in_chans == 1 else _to_bands(image, in_chans)


def _decode_jpeg(data: bytes, in_chans: int) -> np.ndarray | None:
    """Return None for files that are left to Pillow: CMYK, damaged files, decompression bombs."""
    if not data.startswith(JPEG):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK") or _is_too_large(height, width):
            return None
        if in_chans == 1 and colorspace == "Gray":
            grey: np.ndarray = simplejpeg.decode_jpeg(data, "GRAY")
            return grey
        return _as_channels(simplejpeg.decode_jpeg(data, "RGB"), in_chans)
    except ValueError:
        return None


def _to_grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(DEEP):
        return read_deep(image)[..., None]
    return np.asarray(image.convert("L"))[..., None]


def _to_bands(image: Image.Image, in_chans: int) -> np.ndarray:
    num_bands, num_pages = len(image.getbands()), getattr(image, "n_frames", 1)
    if num_pages == in_chans and num_bands == 1:
        channels = []
        for page in range(num_pages):
            image.seek(page)
            channels.append(_to_grey(image))
        return np.concatenate(channels, axis=2)
    if num_bands != in_chans:
        pages = f"{num_pages} page{'s' * (num_pages > 1)}"
        raise BadImage(f"{num_bands} channels ({image.mode}) in {pages}, the model takes {in_chans}")
    return np.asarray(image)


def _load_array(data: bytes) -> np.ndarray:
    """Load a .npy file as (H, W, C) of one of DTYPES."""
    try:
        _check_array_size(data)
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise BadImage(f"not a complete .npy file: {error}", "write it again with numpy.save") from error
    if array.dtype.name in ("float16", "float64"):
        with np.errstate(over="ignore"):  # infinity is refused below
            array = array.astype(np.float32)
    if array.ndim not in (2, 3) or not array.size or array.dtype.name not in DTYPES:
        expected = f"(height, width, channels) of {', '.join(DTYPES)}"
        raise BadImage(f"an array of {array.dtype} {array.shape}, expected {expected}", "convert it")
    array = require_finite(array.astype(array.dtype.newbyteorder("="), copy=False))  # torch reads no others
    return array if array.ndim == 3 else array[..., None]


def _check_array_size(data: bytes) -> None:
    """Raise ValueError if the header states more values than follow it: numpy would allocate them first."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    needed, found = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if needed > found:
        raise ValueError(f"{shape} of {dtype} takes {needed} bytes, it has {found}")


def _as_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """Convert (H, W, C) to (H, W, in_chans), between grey and RGB only."""
    found = pixels.shape[2]
    if found == in_chans:
        return pixels
    if pixels.dtype == np.uint8 and (found, in_chans) == (3, 1):
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    if pixels.dtype == np.uint8 and (found, in_chans) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    raise BadImage(
        f"(height, width, channels) {pixels.shape} of {pixels.dtype}, the model takes {in_chans} channels"
    )
