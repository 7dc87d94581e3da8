"""Variants of image files: each is read as known pixels, or refused with its name and what to do.

Pixels are drawn with numpy and written without loss, PNG and TIFF byte by byte. What a model takes is written
down here by the rules of docs/imagenet.md, without the decoder under test.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.checks.verify import find_bad_images
from mae_bench.data.sets.decode import Jpeg, read_pixels
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.packing import PackOptions
from mae_bench.data.sets.source import BadImage, BadImages
from mae_bench.errors import UserError
from tests.mae_bench.data.sets.image_files import (
    HEIGHT,
    WIDTH,
    encode_png,
    encode_tiff,
    make_chunk,
    pack_12_bits,
    pack_bits,
    save,
    save_array,
    states_shape,
    turn,
)


def draw(num_channels: int, dtype: Any = np.uint8) -> np.ndarray:
    """Return values of the whole range of an integer type, (H, W, C)."""
    info = np.iinfo(dtype)
    shape = (HEIGHT, WIDTH, num_channels)
    return np.random.default_rng(0).integers(info.min, info.max, shape, dtype, endpoint=True)


GREY, PAIR, RGB, RGBA = (draw(channels) for channels in (1, 2, 3, 4))
GREY16, PAIR16, RGB16, RGBA16 = (draw(channels, np.uint16) for channels in (1, 2, 3, 4))
FLOATS = draw(3).astype(np.float64) / 7 - 9
BLOCKS = np.kron(draw(1)[:2, :3, 0], np.ones((8, 8), np.uint8))  # blocks of one value are exact in a JPEG
FRAMES = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]


def keep_upper_bits(values: np.ndarray) -> np.ndarray:
    return (values // 256).astype(np.uint8)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.reshape(*grey.shape[:2], 1), 3, axis=2)


def as_grey(colour: np.ndarray) -> np.ndarray:
    """Return the luma of ITU-R 601 in Pillow's arithmetic of 16 bits."""
    red, green, blue = np.moveaxis(colour.astype(np.int64), 2, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[..., None]


def with_palette(**options: Any) -> bytes:
    image = Image.fromarray(GREY[..., 0], "L").convert("P")
    image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    return save(image, "PNG", **options)


PALETTE = np.concatenate([GREY, 255 - GREY, GREY // 2], axis=2)


def add_nan(array: np.ndarray) -> np.ndarray:
    return np.where(np.arange(array.size).reshape(array.shape) == 5, np.nan, array)


def save_12_bit_jpeg() -> bytes:
    """Return a JPEG whose header states 12 bits."""
    data = save(BLOCKS, "JPEG", quality=100)
    at = data.index(b"\xff\xc0")
    return data[:at] + b"\xff\xc1" + data[at + 2 : at + 4] + b"\x0c" + data[at + 5 :]


@dataclass(frozen=True)
class Variant:
    """A file; `pixels` that a model of `in_chans` channels takes, or `words` of the error that refuses it."""

    name: str
    make: Callable[[], bytes]
    pixels: np.ndarray | None = None
    words: tuple[str, ...] = ()
    in_chans: int = 3

    def __str__(self) -> str:
        return self.name


PNG_FILES = [
    Variant("png-1-bit", lambda: encode_png(pack_bits(GREY, 1), 1, 0), as_rgb(GREY % 2 * 255)),
    Variant("png-2-bits", lambda: encode_png(pack_bits(GREY, 2), 2, 0), as_rgb(GREY % 4 * 85)),
    Variant("png-4-bits", lambda: encode_png(pack_bits(GREY, 4), 4, 0), as_rgb(GREY % 16 * 17)),
    Variant("png-grey", lambda: encode_png(GREY, 8, 0), as_rgb(GREY)),
    Variant("png-rgb", lambda: encode_png(RGB, 8, 2), RGB),
    Variant("png-grey-alpha", lambda: encode_png(PAIR, 8, 4), as_rgb(PAIR[..., :1])),
    Variant("png-alpha-dropped", lambda: encode_png(RGBA, 8, 6), RGBA[..., :3]),
    Variant("png-palette", with_palette, PALETTE),
    Variant("png-palette-transparent", lambda: with_palette(transparency=bytes(range(256))), PALETTE),
    Variant(
        "png-grey-transparent", lambda: encode_png(GREY, 8, 0, make_chunk(b"tRNS", b"\0\7")), as_rgb(GREY)
    ),
    Variant("png-grey-16", lambda: encode_png(GREY16.astype(">u2"), 16, 0), as_rgb(keep_upper_bits(GREY16))),
    Variant("png-rgb-16", lambda: encode_png(RGB16.astype(">u2"), 16, 2), keep_upper_bits(RGB16)),
    Variant(
        "png-grey-alpha-16",
        lambda: encode_png(PAIR16.astype(">u2"), 16, 4),
        as_rgb(keep_upper_bits(PAIR16[..., :1])),
    ),
    Variant("png-rgba-16", lambda: encode_png(RGBA16.astype(">u2"), 16, 6), keep_upper_bits(RGBA16[..., :3])),
    Variant(
        "png-8-bits-in-16", lambda: encode_png((GREY * np.uint16(257)).astype(">u2"), 16, 0), as_rgb(GREY)
    ),
    Variant("png-grey-16-as-stored", lambda: encode_png(GREY16.astype(">u2"), 16, 0), GREY16, in_chans=1),
    Variant("png-all-bands", lambda: encode_png(RGBA, 8, 6), RGBA, in_chans=4),
    Variant("png-grey-and-alpha-bands", lambda: encode_png(PAIR, 8, 4), PAIR, in_chans=2),
    Variant("png-rgb-to-grey", lambda: encode_png(RGB, 8, 2), as_grey(RGB), in_chans=1),
    Variant("png-palette-to-grey", with_palette, as_grey(PALETTE), in_chans=1),
    Variant(
        "png-rgb-16-to-grey",
        lambda: encode_png(RGB16.astype(">u2"), 16, 2),
        as_grey(keep_upper_bits(RGB16)),
        in_chans=1,
    ),
    Variant("png-alpha-to-grey", lambda: encode_png(RGBA, 8, 6), as_grey(RGBA[..., :3]), in_chans=1),
    Variant("png-1-bit-to-grey", lambda: encode_png(pack_bits(GREY, 1), 1, 0), GREY % 2 * 255, in_chans=1),
    Variant("png-of-other-bands", lambda: encode_png(RGB, 8, 2), words=("the model takes 5",), in_chans=5),
    Variant("png-gamma", lambda: encode_png(RGB, 8, 2, make_chunk(b"gAMA", struct.pack(">I", 10000))), RGB),
    Variant("png-turned", lambda: turn(RGB, "PNG"), RGB),
    Variant("png-animated", lambda: save(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), RGB),
]
TIFF_FILES = [
    Variant("tiff-grey", lambda: encode_tiff(GREY.tobytes(), 8, 1), as_rgb(GREY)),
    Variant("tiff-white-is-0", lambda: encode_tiff(GREY.tobytes(), 8, 0), as_rgb(255 - GREY)),
    Variant("tiff-rgb", lambda: encode_tiff(RGB.tobytes(), 8, 2, 3), RGB),
    Variant("tiff-lzw", lambda: save(RGB, "TIFF", compression="tiff_lzw"), RGB),
    Variant("tiff-first-page", lambda: save(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), RGB),
    Variant("tiff-grey-16", lambda: encode_tiff(GREY16.tobytes(), 16, 1), as_rgb(keep_upper_bits(GREY16))),
    Variant(
        "tiff-grey-16-big-endian",
        lambda: encode_tiff(GREY16.astype(">u2").tobytes(), 16, 1, order=">"),
        as_rgb(keep_upper_bits(GREY16)),
    ),
    Variant("tiff-rgb-16", lambda: encode_tiff(RGB16.tobytes(), 16, 2, 3), keep_upper_bits(RGB16)),
    Variant(
        "tiff-grey-12",
        lambda: encode_tiff(pack_12_bits(GREY16 // 16), 12, 1),
        as_rgb(keep_upper_bits(GREY16)),
    ),
    Variant("tiff-grey-16-as-stored", lambda: encode_tiff(GREY16.tobytes(), 16, 1), GREY16, in_chans=1),
    Variant(
        "tiff-floats-as-stored",
        lambda: encode_tiff(FLOATS[..., 0].astype("<f4").tobytes(), 32, 1, kind=3),
        FLOATS[..., :1].astype(np.float32),
        in_chans=1,
    ),
    Variant(
        "tiff-cmyk",
        lambda: encode_tiff(np.concatenate([RGB, 0 * GREY], axis=2).tobytes(), 8, 5, 4),
        255 - RGB,
    ),
    Variant("tiff-cmyk-bands", lambda: encode_tiff(RGBA.tobytes(), 8, 5, 4), RGBA, in_chans=4),
    Variant(
        "tiff-pages-are-channels",
        lambda: save(GREY16[..., 0], "TIFF", save_all=True, append_images=[Image.fromarray(PAIR16[..., 0])]),
        np.concatenate([GREY16, PAIR16[..., :1]], axis=2),
        in_chans=2,
    ),
    Variant(
        "tiff-16-white-is-0", lambda: encode_tiff(GREY16.tobytes(), 16, 0), words=("0 is white", "invert it")
    ),
    Variant(
        "tiff-signed-16",
        lambda: encode_tiff(draw(1, np.int16).tobytes(), 16, 1, kind=2),
        words=("signed, 32-bit or floating-point", "mode I", "scale them to 8 or 16 bits"),
    ),
    Variant(
        "tiff-int-32",
        lambda: encode_tiff(draw(1, np.int32).tobytes(), 32, 1, kind=2),
        words=("mode I", "scale them to 8 or 16 bits", "in_chans=1"),
    ),
    Variant("tiff-unsigned-32", lambda: encode_tiff(draw(1, np.uint32).tobytes(), 32, 1), words=("mode I",)),
    Variant(
        "tiff-floats",
        lambda: encode_tiff(FLOATS[..., 0].astype("<f4").tobytes(), 32, 1, kind=3),
        words=("mode F", "scale them to 8 or 16 bits"),
    ),
    Variant(
        "tiff-nan",
        lambda: encode_tiff(add_nan(FLOATS[..., 0]).astype("<f4").tobytes(), 32, 1, kind=3),
        words=("infinite values or NaN", "replace them"),
        in_chans=1,
    ),
]
JPEG_FILES = [
    Variant("jpeg-grey", lambda: save(BLOCKS, "JPEG", quality=100), as_rgb(BLOCKS)),
    Variant("jpeg-ycbcr", lambda: save(as_rgb(BLOCKS), "JPEG", quality=100), as_rgb(BLOCKS)),
    Variant("jpeg-progressive", lambda: save(BLOCKS, "JPEG", quality=100, progressive=True), as_rgb(BLOCKS)),
    Variant("jpeg-turned", lambda: turn(as_rgb(BLOCKS), "JPEG"), as_rgb(BLOCKS)),
    Variant(
        "jpeg-profile", lambda: save(as_rgb(BLOCKS), "JPEG", quality=100, icc_profile=b"any"), as_rgb(BLOCKS)
    ),
    Variant(
        "jpeg-cmyk",
        lambda: save(Image.fromarray(np.stack([0 * BLOCKS] * 3 + [BLOCKS], 2), "CMYK"), "JPEG", quality=100),
        as_rgb(255 - BLOCKS),
    ),
    Variant("jpeg-of-12-bits", save_12_bit_jpeg, words=("save it as JPEG or PNG",)),
]
OTHER_FILES = [
    Variant("webp", lambda: save(RGB, "WEBP", lossless=True), RGB),
    Variant(
        "webp-alpha-dropped",
        lambda: save(np.maximum(RGBA, 1), "WEBP", lossless=True),
        np.maximum(RGBA, 1)[..., :3],
    ),
    Variant(
        "webp-first-frame",
        lambda: save(FRAMES[0], "WEBP", lossless=True, save_all=True, append_images=FRAMES[1:]),
        RGB,
    ),
    Variant("bmp", lambda: save(RGB, "BMP"), RGB),
    Variant(
        "bmp-1-bit",
        lambda: save(Image.fromarray(GREY[..., 0] > 99), "BMP"),
        as_rgb((GREY > 99) * np.uint8(255)),
    ),
    Variant(
        "gif-first-frame",
        lambda: save(GREY[..., 0], "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY[..., 0])]),
        as_rgb(GREY),
    ),
    Variant("npy-rgb", lambda: save_array(RGB), RGB),
    Variant("npy-grey", lambda: save_array(GREY[..., 0]), as_rgb(GREY)),
    Variant("npy-columns-first", lambda: save_array(np.asfortranarray(RGB)), RGB),
    Variant("npy-16-as-stored", lambda: save_array(RGB16), RGB16),
    Variant("npy-16-big-endian", lambda: save_array(RGB16.astype(">u2")), RGB16),
    Variant("npy-float-64", lambda: save_array(FLOATS), FLOATS.astype(np.float32)),
    Variant("npy-float-16", lambda: save_array(RGB.astype(np.float16)), RGB.astype(np.float32)),
    Variant("npy-five-channels", lambda: save_array(draw(5)), draw(5), in_chans=5),
    Variant("npy-of-4-channels", lambda: save_array(RGBA), words=("(10, 12, 4)", "takes 3 channels")),
    Variant("npy-16-grey", lambda: save_array(GREY16), words=("of uint16", "takes 3 channels")),
    Variant(
        "npy-of-integers", lambda: save_array(RGB.astype(np.int64)), words=("int64", "uint8, uint16, float32")
    ),
    Variant("npy-nan", lambda: save_array(add_nan(FLOATS)), words=("NaN", "replace them")),
    Variant("npy-beyond-float-32", lambda: save_array(FLOATS * 1e300), words=("infinite", "replace them")),
    Variant("npy-torn", lambda: save_array(RGB)[:-1], words=("not a complete .npy", "write it again")),
    Variant(
        "npy-of-273-tib", lambda: states_shape((10**7, 10**7, 3)), words=("takes 300000000000000 bytes",)
    ),
    Variant("npy-of-objects", lambda: save_array(np.array([[{}]])), words=("not a complete .npy",)),
    Variant("empty", lambda: b"", words=("not an image format", "save it as JPEG or PNG")),
    Variant("text", lambda: b"<html>404</html>" * 9, words=("not an image format",)),
    Variant("vector-graphics", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', words=("not an image",)),
    Variant("torn-jpeg", lambda: save(RGB, "JPEG")[:-40], words=("truncated", "copy it again")),
    Variant("torn-png", lambda: encode_png(RGB, 8, 2)[:-60], words=("copy it again",)),
    Variant(
        "png-damaged-header", lambda: encode_png(RGB, 8, 2).replace(b"IHDR", b"IHDS"), words=("not an image",)
    ),
    Variant(
        "bomb", lambda: encode_png(GREY, 8, 0, width=2**31 - 1), words=("exceeds limit", "reduce its size")
    ),
]
VARIANTS = PNG_FILES + TIFF_FILES + JPEG_FILES + OTHER_FILES


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variant(variant: Variant, tmp_path: Path) -> None:
    path = tmp_path / "train" / "ant" / f"{variant.name}.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(variant.make())
    images = open_images(tmp_path, "train")
    for fast in (True, False):
        if variant.pixels is None:
            with pytest.raises(BadImage) as bad:
                read_pixels(images, 0, variant.in_chans, fast=fast)
            with pytest.raises(UserError) as caught:
                BadImages(0, 1).add(images.name(0), str(bad.value))
            for word in (variant.name, *variant.words):
                assert word in str(caught.value)
            continue
        found = read_pixels(images, 0, variant.in_chans, fast=fast)
        pixels = found.rows(found.shape[0]) if isinstance(found, Jpeg) else found
        assert pixels.dtype == variant.pixels.dtype
        np.testing.assert_array_equal(pixels, variant.pixels)
    if variant.pixels is None:
        return
    assert find_bad_images(images, 0) == {}
    if variant.in_chans == 3 and not variant.name.startswith("npy"):
        stored, height, width = PackOptions(raw=True).encode(path.read_bytes())
        assert (height, width, stored) == (*variant.pixels.shape[:2], variant.pixels.tobytes())


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (make_pipe, "is a named pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "broken-link": (make_broken_link, "No such file"),
    "link-to-itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("place", ["train/ant/1.jpg", "train-0.tar", "set-train.arrow", "train.parquet"])
def test_what_is_no_file_is_not_opened(name: str, place: str, tmp_path: Path) -> None:
    make, words = PLACES[name]
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    with pytest.raises(UserError) as caught:
        check_layout("images", tmp_path)
    assert path.name in str(caught.value)
    assert words in str(caught.value)


def test_links_in_circles_and_empty_folders_are_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "ant"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encode_png(RGB, 8, 2))
    (folder / "up").symlink_to(folder.parent)
    (tmp_path / "train" / "empty").mkdir()
    assert check_layout("images", tmp_path).splits == {"train": 1}


def test_class_folders_without_a_split_are_offered_one(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encode_png(RGB, 8, 2))
    with pytest.raises(UserError) as caught:
        check_layout("imagenet", tmp_path)
    assert f"a tenth of {tmp_path}/CLASS to {tmp_path}/val/CLASS" in caught.value.fix
    assert caught.value.fix.endswith(f"mae-bench data check images {tmp_path}")
    assert check_layout("images", tmp_path).splits == {"train": 2}
