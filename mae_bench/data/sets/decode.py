"""Image files and raw arrays as pixels: by Pillow, or by a faster decoder of the same pixels."""

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from mae_bench.data.sets.source import BadImage, ImageSource, decode, opened

JPEG, NUMPY = b"\xff\xd8\xff", b"\x93NUMPY"  # what such files begin with
END = b"\xff\xd9"  # of a JPEG
BASELINE, TABLES, SCAN = 0xC0, 0xC4, 0xDA  # markers of a JPEG: sizes, Huffman tables, the first scan
DTYPES = ("uint8", "uint16", "float32")  # of arrays; float16 and float64 are read as float32


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that is decoded when its rows are asked for, and no further down than that. shape: (height, width)."""

    data: bytes
    in_chans: int
    shape: tuple[int, int]
    place: int  # of the height in the header

    def rows(self, stop: int) -> np.ndarray:
        """(at least `stop`, W, in_chans), or all rows if there are fewer; BadImage.

        A lower height in the header ends the decoding early. Two rows more are decoded than are needed, as chroma is interpolated
        from neighbours, and whole blocks of 16.
        """
        height = (stop + 2 + 15) // 16 * 16
        if height >= self.shape[0]:
            return decode_pixels(self.data, self.in_chans)
        cut = self.data[: self.place] + height.to_bytes(2, "big") + self.data[self.place + 2 :]
        try:
            return _as_channels(
                simplejpeg.decode_jpeg(cut, "RGB", strict=False), self.in_chans
            )  # it warns of the rest
        except ValueError:
            return decode_pixels(self.data, self.in_chans, fast=False)


def read_pixels(images: ImageSource, i: int, in_chans: int = 3, *, fast: bool = True) -> np.ndarray | Jpeg:
    """(H, W, in_chans) of image i: raw pixels where the set stores them, else of its file. BadImage, OSError."""
    if (pixels := images.pixels(i)) is not None:
        return _as_channels(pixels, in_chans)
    data = images.read(i)
    return (_baseline_jpeg(data, in_chans) if fast else None) or decode_pixels(data, in_chans, fast=fast)


def probe(data: bytes) -> tuple[int, int]:
    """Height and width of a file that decodes, whatever its channels; BadImage if it does not."""
    if data.startswith(NUMPY):
        return _load_array(data).shape[:2]
    image = decode(data)
    return image.height, image.width


def _baseline_jpeg(data: bytes, in_chans: int) -> Jpeg | None:
    """None for what has to be decoded as a whole: it is no JPEG of one scan, or may be truncated, or only Pillow reads it."""
    if (
        in_chans != 3
        or not data.startswith(JPEG)
        or not data.endswith(END)
        or not (place := _place_of_height(data))
    ):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    known = colorspace in ("YCbCr", "Gray", "RGB") and height * width <= (
        Image.MAX_IMAGE_PIXELS or height * width
    )
    return Jpeg(data, in_chans, (height, width), place) if known else None


def _place_of_height(data: bytes) -> int:
    """Where the header of a baseline JPEG has its height; 0 if there is none."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == BASELINE:
            return at + 5
        if marker == SCAN or (0xC0 <= marker <= 0xCF and marker != TABLES):
            return 0
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


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
    with opened(data) as image:
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
        raise BadImage(
            f"{bands} channels ({image.mode}) in {pages} page{'s' * (pages > 1)}, the model takes {in_chans}"
        )
    return np.asarray(image)


def _load_array(data: bytes) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadImage(f"no whole .npy file: {error}") from error
    if array.dtype.name in ("float16", "float64"):
        array = array.astype(np.float32)
    if array.ndim not in (2, 3) or not array.size or array.dtype.name not in DTYPES:
        raise BadImage(
            f"an array of {array.dtype} {array.shape}, expected (height, width, channels) of {', '.join(DTYPES)}"
        )
    return array if array.ndim == 3 else array[..., None]


def _as_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
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
