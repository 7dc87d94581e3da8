"""The fast decoder agrees with Pillow on every kind of file; images with other than three channels."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mae_bench.data.sets.decode import Jpeg, decode_pixels, read_pixels
from mae_bench.data.sets.source import BadImage, decode


def photo(height: int = 90, width: int = 120, seed: int = 0) -> Image.Image:
    """Return noise of many scales with clipped highlights and shadows, like photographs, not gradients."""
    draw, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for scale in (1, 2, 4, 8, 16, 32):
        small = draw.normal(size=(height // scale + 2, width // scale + 2, 3)) * scale**0.7
        channels = [Image.fromarray(small[..., c].astype(np.float32)) for c in range(3)]
        resized = [np.asarray(c.resize((width, height), Image.Resampling.BICUBIC)) for c in channels]
        total += np.stack(resized, axis=2)
    return Image.fromarray(np.clip(128 + 22 * total, 0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photo(), "JPEG", exif=exif)


FILES: dict[str, Callable[[], bytes]] = {
    "4:2:0": lambda: saved(photo(), "JPEG", quality=90, subsampling=2),
    "4:2:2, odd size": lambda: saved(photo(91, 123), "JPEG", quality=75, subsampling=1),
    "4:4:4": lambda: saved(photo(), "JPEG", quality=97, subsampling=0),
    "progressive": lambda: saved(photo(), "JPEG", progressive=True),
    "stored as RGB": lambda: saved(photo(), "JPEG", keep_rgb=True),
    "grey": lambda: saved(photo().convert("L"), "JPEG"),
    "CMYK": lambda: saved(photo().convert("CMYK"), "JPEG"),
    "EXIF-rotated": rotated,
    "bytes after the end": lambda: saved(photo(), "JPEG") + b"trailer",
    "PNG": lambda: saved(photo(), "PNG"),
    "alpha": lambda: saved(photo().convert("RGBA"), "PNG"),
    "palette": lambda: saved(photo().convert("P"), "PNG"),
    "16-bit PNG": lambda: saved(
        Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"
    ),
    "WebP": lambda: saved(photo(), "WEBP"),
    "one pixel": lambda: saved(photo(1, 1), "JPEG"),
}


@pytest.mark.parametrize("kind", FILES)
def test_fast_equals_pillow(kind: str) -> None:
    data = FILES[kind]()
    want = np.asarray(decode(data))
    np.testing.assert_array_equal(decode_pixels(data, fast=True), want)
    np.testing.assert_array_equal(decode_pixels(data, fast=False), want)
    np.testing.assert_array_equal(decode_pixels(data, 1, fast=True), decode_pixels(data, 1, fast=False))


class One:
    """A source of one file."""

    def __init__(self, data: bytes):
        self.data = data

    def pixels(self, _: int) -> None:
        """Return None."""

    def read(self, _: int) -> bytes:
        """Return the file."""
        return self.data


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind not in ("PNG", "WebP")])
def test_the_upper_rows_of_a_jpeg_are_pillows(kind: str) -> None:
    data = FILES[kind]()
    want, found = np.asarray(decode(data)), read_pixels(One(data), 0)  # type: ignore[arg-type]
    if not isinstance(found, Jpeg):
        np.testing.assert_array_equal(found, want)
        return
    assert found.shape == want.shape[:2]
    for stop in range(1, len(want) + 1):
        rows = found.rows(stop)
        np.testing.assert_array_equal(rows[:stop], want[:stop])
        assert len(rows) <= max(stop + 18, 0) or len(rows) == len(want)


def test_baseline_jpegs_are_decoded_from_the_top_alone() -> None:
    for kind in ("4:2:0", "4:2:2, odd size", "4:4:4", "grey", "EXIF-rotated", "stored as RGB"):
        assert isinstance(read_pixels(One(FILES[kind]()), 0), Jpeg), kind  # type: ignore[arg-type]
    for kind in ("progressive", "CMYK", "bytes after the end", "PNG"):
        assert isinstance(read_pixels(One(FILES[kind]()), 0), np.ndarray), kind  # type: ignore[arg-type]


@pytest.mark.parametrize("subsampling", ["420", "422", "444", "440", "411"])
def test_rows_are_whole_whatever_the_subsampling(subsampling: str) -> None:
    data = simplejpeg.encode_jpeg(np.asarray(photo(130, 60)), colorsubsampling=subsampling)
    want, found = np.asarray(decode(data)), read_pixels(One(data), 0)  # type: ignore[arg-type]
    assert isinstance(found, Jpeg)
    for stop in (1, 13, 14, 15, 16, 30, 31, 32, 77, 100, 130):
        np.testing.assert_array_equal(found.rows(stop)[:stop], want[:stop])


@pytest.mark.parametrize("end", [0, 3, 200, -300])
@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "grey", "PNG"])
def test_a_truncated_file_is_bad_on_both_routes(kind: str, end: int) -> None:
    for fast in (True, False):
        with pytest.raises(BadImage):
            decode_pixels(FILES[kind]()[:end], fast=fast)
        with pytest.raises(BadImage):
            read_pixels(One(FILES[kind]()[:end]), 0, fast=fast)  # type: ignore[arg-type]


def test_damage_is_judged_by_pillow() -> None:
    data = bytearray(FILES["4:2:0"]())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff\xd9" * 20  # the image ends early

    def outcome(fast: bool) -> str:
        try:
            return str(int(decode_pixels(bytes(data), fast=fast).sum()))
        except BadImage as error:
            return str(error)

    assert outcome(True) == outcome(False)


def test_a_decompression_bomb_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="exceeds limit"):
        decode_pixels(FILES["4:2:0"]())


def test_grey_is_pillows_grey() -> None:
    image = photo()
    want = np.asarray(Image.fromarray(decode_pixels(saved(image, "JPEG"))).convert("L"))
    np.testing.assert_array_equal(decode_pixels(saved(image, "JPEG"), 1)[..., 0], want)


def stored(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_arrays_keep_their_channels_and_depth(dtype: str, channels: int) -> None:
    array = np.random.default_rng(0).integers(0, 250, (5, 6, channels)).astype(dtype)
    found = decode_pixels(stored(array), channels)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


def test_arrays_of_other_shapes() -> None:
    assert decode_pixels(stored(np.ones((5, 6), np.uint8)), 1).shape == (5, 6, 1)
    assert decode_pixels(stored(np.ones((5, 6, 2), np.float64)), 2).dtype == np.float32
    for array in (
        np.ones((5, 6, 2, 2), np.uint8),
        np.ones((5, 6, 2), np.int64),
        np.ones((0, 6, 2), np.uint8),
    ):
        with pytest.raises(BadImage, match="expected .height, width, channels."):
            decode_pixels(stored(array), 2)
    with pytest.raises(BadImage, match="not a complete .npy file"):
        decode_pixels(stored(np.ones((5, 6, 2)))[:-9], 2)


def test_an_array_of_objects_is_not_unpickled() -> None:
    with pytest.raises(BadImage, match="not a complete .npy file"):
        decode_pixels(stored(np.array([[object()]], dtype=object)), 1)


def test_another_number_of_channels_is_named() -> None:
    with pytest.raises(BadImage, match=r"3 channels \(RGB\) in 1 page, the model takes 5"):
        decode_pixels(saved(photo(), "PNG"), 5)
    with pytest.raises(BadImage, match=r"\(5, 6, 4\) of uint8, the model takes 3 channels"):
        decode_pixels(stored(np.ones((5, 6, 4), np.uint8)), 3)


def test_bands_and_pages_are_channels() -> None:
    rgba = photo().convert("RGBA")
    np.testing.assert_array_equal(decode_pixels(saved(rgba, "PNG"), 4), np.asarray(rgba))
    pages = [Image.fromarray(np.full((5, 6), 1000 * page, np.uint16)) for page in range(5)]
    found = decode_pixels(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]), 5)
    assert found.dtype == np.uint16
    assert found[2, 3].tolist() == [0, 1000, 2000, 3000, 4000]


def test_a_deep_grey_image_keeps_its_depth() -> None:
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    np.testing.assert_array_equal(decode_pixels(saved(Image.fromarray(deep), "PNG"), 1)[..., 0], deep)
