"""Packed sets: images are preserved, an interrupted pack resumes, and incomplete sets are not accepted."""

import errno
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.pack import pack_set
from mae_bench.data.sets import packing
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.packed import verify_packed
from mae_bench.data.sets.source import ImageSource, decode
from mae_bench.data.sets.subset import Subset
from mae_bench.errors import UserError
from mae_bench.seal import BrokenSeal

Picture = Callable[..., bytes]
NAMES = [f"{name}/{i}.jpg" for name in "ab" for i in range(4)]


@pytest.fixture
def source(tmp_path: Path, picture: Picture) -> Path:
    """Write 8 training images of 40 x 30 and 8 validation images of 20 x 50."""
    for split, size in (("train", (40, 30)), ("val", (20, 50))):
        for number, name in enumerate(NAMES):
            path = tmp_path / "source" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number, size))
    return tmp_path / "source"


def contents(images: ImageSource) -> list[tuple[str, bytes, str]]:
    return [(images.name(i), images.read(i), images.classes[images.targets[i]]) for i in range(len(images))]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unchanged_bytes_come_out_as_they_went_in(source: Path, tmp_path: Path, num_workers: int) -> None:
    header = pack_set(source, tmp_path / "out", num_workers=num_workers)
    for split in ("train", "val"):
        before, after = open_images(source, split), open_images(tmp_path / "out", split)
        assert contents(after) == contents(before)
        assert after.pixels(0) is None
        assert contents(pickle.loads(pickle.dumps(after))) == contents(before)
        assert len(pickle.dumps(after)) < 2000
    assert header["source"]["train"] == [open_images(source, "train").digest, 8]
    assert header["splits"]["train"]["left_out"] == []
    report = check_layout("imagenet", tmp_path / "out", thorough=True)
    assert (report.splits, report.classes) == ({"train": 8, "val": 8}, ("a", "b"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "packed.json",
        "train.checksums",
        "train.data",
        "train.index",
        "val.checksums",
        "val.data",
        "val.index",
    }


def test_resized_images_are_those_of_pillow(source: Path, tmp_path: Path) -> None:
    pack_set(source, tmp_path / "out", short_side=20, quality=90)
    before, after = open_images(source, "train"), open_images(tmp_path / "out", "train")
    image = Image.open(io.BytesIO(before.read(3))).resize((26, 20), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, subsampling="4:2:0", optimize=True)
    assert after.read(3) == file.getvalue()
    assert decode(open_images(tmp_path / "out", "val").read(0)).size == (20, 50), "never enlarged"


def test_images_that_need_no_resizing_keep_their_bytes_unless_a_quality_is_asked_for(
    source: Path, tmp_path: Path
) -> None:
    val = open_images(source, "val")
    pack_set(source, tmp_path / "kept", short_side=20)
    pack_set(source, tmp_path / "encoded", short_side=20, quality=50)
    assert open_images(tmp_path / "kept", "val").read(0) == val.read(0)
    assert len(open_images(tmp_path / "encoded", "val").read(0)) < len(val.read(0))


def test_raw_pixels_are_a_view_of_the_file(source: Path, tmp_path: Path) -> None:
    pack_set(source, tmp_path / "out", short_side=20, raw=True)
    for split, shape in (("train", (20, 26, 3)), ("val", (50, 20, 3))):
        before, after = open_images(source, split), open_images(tmp_path / "out", split)
        for i in range(8):
            pixels = after.pixels(i)
            assert pixels is not None
            assert (pixels.shape, pixels.dtype) == (shape, np.uint8)
            expected = packing.shrink(decode(before.read(i)), 20)
            np.testing.assert_array_equal(pixels, np.asarray(expected))
            np.testing.assert_array_equal(np.asarray(decode(after.read(i))), pixels)
        pixels = after.pixels(0)
        assert pixels is not None
        assert not pixels.flags.owndata
        assert not pixels.flags.writeable


def test_bad_images_are_left_out_by_name(source: Path, tmp_path: Path) -> None:
    (source / "train" / "a" / "1.jpg").write_bytes(b"no image")
    header = pack_set(source, tmp_path / "out")
    ((name, reason),) = header["splits"]["train"]["left_out"]
    assert name == "a/1.jpg"
    assert "Pillow" in reason
    images = open_images(tmp_path / "out", "train")
    assert [images.name(i) for i in range(7)] == [name for name in NAMES if name != "a/1.jpg"]
    assert images.targets.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert images.read(1) == (source / "train" / "a" / "2.jpg").read_bytes()
    for path in (source / "val").rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image of val decodes"):
        pack_set(source, tmp_path / "none")


class Stopped(BaseException):
    pass


@pytest.mark.parametrize(
    ("stop_at", "kept"), [(1, 0), (3, 3), (4, 3), (7, 6), (8, 8), (12, 11)]
)  # 3 + 3 + 2 images a split
@pytest.mark.parametrize("torn", [False, True])
def test_a_stopped_pack_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, kept: int, torn: bool
) -> None:
    monkeypatch.setattr(packing, "WINDOW", 3)
    pack_set(source, tmp_path / "whole", short_side=20)
    seen: list[int] = []
    original = packing._encode

    def encode(*given: Any) -> Any:
        if len(seen) == stop_at:
            raise Stopped
        seen.append(given[-1])
        return original(*given)

    monkeypatch.setattr(packing, "_encode", encode)
    with pytest.raises(Stopped):
        pack_set(source, tmp_path / "out", short_side=20)
    with pytest.raises(UserError):
        check_layout("imagenet", tmp_path / "out")
    if torn:  # the machine crashed: the last line and the last bytes are arbitrary
        for path in (tmp_path / "out").glob("*.journal"):
            path.write_bytes(path.read_bytes() + b'{"done": 9')
        for path in (tmp_path / "out").glob("*.part"):
            path.write_bytes(path.read_bytes() + b"garbage")
    seen.clear()
    stop_at = 100
    pack_set(source, tmp_path / "out", short_side=20)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    assert len(seen) == 16 - kept, "what was written is not encoded again"


def test_a_pack_stopped_before_its_header_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(packing, "write_json", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            pack_set(source, tmp_path / "out")
        patched.setattr(packing, "_encode", lambda *_: pytest.fail("it is encoded again"))
        with pytest.raises(Stopped):
            pack_set(source, tmp_path / "out")
    pack_set(source, tmp_path / "out")
    assert contents(open_images(tmp_path / "out", "val")) == contents(open_images(source, "val"))


def test_another_way_or_another_source_starts_anew_or_is_refused(
    source: Path, tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW", 3)
    with monkeypatch.context() as patched:
        original = packing._encode
        patched.setattr(
            packing, "_encode", lambda *g: original(*g) if g[-1] < 4 else (_ for _ in ()).throw(Stopped)
        )
        with pytest.raises(Stopped):
            pack_set(source, tmp_path / "out", short_side=10)
    pack_set(source, tmp_path / "out")
    assert contents(open_images(tmp_path / "out", "train")) == contents(open_images(source, "train"))
    before = (tmp_path / "out" / "packed.json").stat().st_mtime_ns
    pack_set(source, tmp_path / "out")
    assert (tmp_path / "out" / "packed.json").stat().st_mtime_ns == before, "a whole set is left as it is"
    pack_set(source, tmp_path / "raw", raw=True)
    for out, how in (("out", {"short_side": 10}), ("out", {"raw": True}), ("raw", {})):
        with pytest.raises(UserError, match="packed with other options"):
            pack_set(source, tmp_path / out, **how)
    (source / "train" / "a" / "9.jpg").write_bytes(picture(9))
    with pytest.raises(UserError, match="other images"):
        pack_set(source, tmp_path / "out")
    with pytest.raises(UserError, match="is not empty: out, raw, source"):
        pack_set(source, tmp_path)


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, window: Any, file: BinaryIO, journal: BinaryIO, sha: Any) -> None:
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing._Pack, "_write", full)
    with pytest.raises(UserError, match="No space left"):
        pack_set(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("raw", [False, True])
def test_a_damaged_image_is_not_read(source: Path, tmp_path: Path, raw: bool) -> None:
    out = tmp_path / "out"
    pack_set(source, out, raw=raw)
    intact = contents(open_images(out, "train"))
    flip(out / "train.data", 100)
    images = open_images(out, "train")
    assert contents(Subset(images, range(1, 8))) == intact[1:]
    for read in (images.read, images.stored, *([images.pixels] if raw else [])):
        with pytest.raises(OSError, match=r"train\.data are damaged; write .*out again"):
            read(0)
    for check in (lambda: verify_packed(out), lambda: check_layout("imagenet", out, thorough=True)):
        with pytest.raises(BrokenSeal, match=r"train\.data has SHA-256"):
            check()


def test_damage_to_any_other_file_is_found_when_a_set_is_opened(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_set(source, out)
    data = (out / "train.data").read_bytes()
    (out / "train.data").write_bytes(data[:-1])
    with pytest.raises(BrokenSeal, match="another size"):
        open_images(out, "train")
    for name in ("val.index", "val.checksums"):
        intact = (out / name).read_bytes()
        for place in (0, len(intact) // 2, -1):
            flip(out / name, place)
            with pytest.raises(BrokenSeal, match=f"{name} has SHA-256"):
                open_images(out, "val")
            (out / name).write_bytes(intact)
        (out / name).unlink()
        with pytest.raises(BrokenSeal, match=f"{name} cannot be read"):
            open_images(out, "val")
        (out / name).write_bytes(intact)
    header = json.loads((out / "packed.json").read_text())
    for changed, problem in (
        ({"version": 99}, "version 99"),
        ({"version": 1}, "digest"),
        ({"how": 1}, "digest"),
    ):
        (out / "packed.json").write_text(json.dumps(header | changed))
        with pytest.raises(BrokenSeal, match=problem):
            open_images(out, "train")
    (out / "packed.json").write_text("{")
    with pytest.raises(BrokenSeal, match="not the header"):
        open_images(out, "train")


def test_a_set_of_the_earlier_version_is_read_without_checksums(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    header = pack_set(source, out)
    for split in ("train", "val"):
        (out / f"{split}.checksums").unlink()
        del header["splits"][split]["checksums_sha256"]
    (out / "packed.json").write_text(json.dumps(header | {"version": 1}))
    assert contents(open_images(out, "train")) == contents(open_images(source, "train"))
    verify_packed(out)
    assert check_layout("imagenet", out).digest == header["digest"]
    pack_set(source, out)  # the same images: left as it is
    assert not list(out.glob("*.checksums"))


@pytest.mark.parametrize("name", ["train.data.part", "train.journal"])
def test_a_pack_does_not_go_on_from_what_is_damaged(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(packing, "WINDOW", 3)
    pack_set(source, tmp_path / "whole")
    with monkeypatch.context() as patched:
        original = packing._encode
        patched.setattr(
            packing, "_encode", lambda *g: original(*g) if g[-1] < 7 else (_ for _ in ()).throw(Stopped)
        )
        with pytest.raises(Stopped):
            pack_set(source, tmp_path / "out")
    path = tmp_path / "out" / name
    flip(path, path.stat().st_size // 2)
    pack_set(source, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({}, "toys"),
        ({"short_side": 20}, "toys-20px-q90"),
        ({"quality": 80}, "toys-q80"),
        ({"short_side": 20, "raw": True}, "toys-20px-raw"),
    ],
)
def test_the_name_says_what_was_done_to_the_images(
    source: Path, tmp_path: Path, how: dict[str, Any], name: str
) -> None:
    (source / "dataset.json").write_text('{"name": "toys"}')
    pack_set(source, tmp_path / "out", **how)
    assert check_layout("imagenet", tmp_path / "out").name == name


def test_the_digest_is_that_of_the_content(source: Path, tmp_path: Path) -> None:
    pack_set(source, tmp_path / "a")
    pack_set(source, tmp_path / "b")
    pack_set(source, tmp_path / "c", short_side=20)
    digests = [check_layout("imagenet", tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert json.loads((tmp_path / "a" / "packed.json").read_text())["digest"] == digests[0]
    for split in ("train", "val"):  # the same bytes in the same order under other labels
        (source / split / "a").rename(source / split / "0")
    pack_set(source, tmp_path / "d")
    assert (tmp_path / "d" / "train.data").read_bytes() == (tmp_path / "a" / "train.data").read_bytes()
    assert check_layout("imagenet", tmp_path / "d").digest != digests[0]


def test_images_without_classes_and_without_validation_are_packed(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    (tmp_path / "photos" / "deep" / "1.png").write_bytes(picture(1, form="PNG"))
    (tmp_path / "photos" / "2.jpg").write_bytes(picture(2))
    pack_set(tmp_path / "photos", tmp_path / "out", raw=True)
    assert check_layout("images", tmp_path / "out").splits == {"train": 2}
    with pytest.raises(UserError, match="no split val"):
        open_images(tmp_path / "out", "val")
    pixels = open_images(tmp_path / "out", "train").pixels(1)
    np.testing.assert_array_equal(pixels, np.asarray(decode(picture(1, form="PNG"))))


@pytest.mark.parametrize("how", [{"short_side": 0}, {"quality": 101}, {"raw": True, "quality": 90}])
def test_impossible_ways_are_refused(source: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="Expected"):
        pack_set(source, tmp_path / "out", **how)
