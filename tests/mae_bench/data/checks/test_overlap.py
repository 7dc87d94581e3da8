"""Images in both splits are found byte for byte in every form, mostly from first blocks, once per set."""

import shutil
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_bench.data.checks import overlap as module
from mae_bench.data.checks.overlap import find_overlap, load_or_find_overlap, note_overlap
from mae_bench.data.pack import pack_set
from mae_bench.data.sets import cache as cache_module
from mae_bench.data.sets.index import IndexedImages
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import ImageSource
from mae_bench.data.sets.subset import Subset

Picture = Callable[..., bytes]


@pytest.fixture
def root(tmp_path: Path, picture: Picture) -> Path:
    """Write train 0 to 7 and val 8 to 11; val's y/10 equals a/2, and val's x/9 equals b/5 and b/again."""
    root = tmp_path / "set"
    given = {f"train/{'ab'[i // 4]}/{i}.png": i for i in range(8)} | {"val/x/8.png": 8, "val/x/9.png": 5}
    given |= {"val/y/10.png": 2, "val/y/11.png": 11, "train/b/again.png": 5}
    for name, number in given.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number, form="PNG"))
    return root


EXPECTED = [("x/9.png", "b/5.png"), ("y/10.png", "a/2.png")]


def splits(root: Path) -> tuple[ImageSource, ImageSource]:
    return open_images(root, "train"), open_images(root, "val")


def to_tar(root: Path, out: Path) -> Path:
    out.mkdir()
    for split in ("train", "val"):
        with tarfile.open(out / f"{split}.tar", "w") as tar:
            for path in sorted((root / split).iterdir()):
                tar.add(path, path.name)
    return out


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "folders": lambda root, out: root,
    "tars": to_tar,
    "packed": lambda root, out: (pack_set(root, out, num_workers=0), out)[1],
    "raw": lambda root, out: (pack_set(root, out, raw=True, num_workers=0), out)[1],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_finds_the_same(form: str, root: Path, tmp_path: Path) -> None:
    train, val = splits(FORMS[form](root, tmp_path / form))
    assert find_overlap(train, val) == EXPECTED
    assert find_overlap(val, train) == [
        ("a/2.png", "y/10.png"),
        ("b/5.png", "x/9.png"),
        ("b/again.png", "x/9.png"),
    ]


def test_a_source_that_only_reads_is_enough(root: Path) -> None:
    class Plain(Subset):
        stored = ImageSource.stored
        stored_sizes = ImageSource.stored_sizes

    train, val = splits(root)
    assert find_overlap(Plain(train, range(len(train))), Plain(val, range(len(val)))) == EXPECTED
    assert find_overlap(Subset(train, [8, 5, 2]), Subset(val, [3, 2])) == EXPECTED[1:]


def test_disjoint_splits_have_none(root: Path) -> None:
    train, val = splits(root)
    assert find_overlap(Subset(train, [0, 1, 3]), Subset(val, [0, 3])) == []
    assert note_overlap([], 4) == ""


def test_images_of_one_size_and_one_beginning_are_told_apart(tmp_path: Path) -> None:
    """Their first block is the same, as in images of one program with a long header."""
    pixels = np.zeros((96, 96, 3), np.uint8)
    for name, last in (("train/a/1.bmp", 1), ("train/a/2.bmp", 2), ("val/a/3.bmp", 2)):
        pixels[0, -1] = last  # BMP ends with the first row
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    assert find_overlap(*splits(tmp_path)) == [("a/3.bmp", "a/2.bmp")]


def test_few_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read only images whose size occurs in the other split: a block, and whole files where blocks agree."""
    generator = np.random.default_rng(0)
    long, short = (generator.bytes(size) for size in (50_000, 30_000))
    given = {
        "train/a/1.jpg": long,
        "train/a/2.jpg": generator.bytes(50_000),
        "train/a/3.jpg": short,
        "val/a/4.jpg": long,
    }
    for name, content in given.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    read: dict[str, list[int]] = {}
    stored = IndexedImages.stored

    def counting(self: IndexedImages, i: int, length: int | None = None) -> bytes:
        data = stored(self, i, length)
        read.setdefault(self.name(i), []).append(len(data))
        return data

    monkeypatch.setattr(IndexedImages, "stored", counting)
    assert find_overlap(*splits(tmp_path)) == [("a/4.jpg", "a/1.jpg")]
    block = module.BLOCK
    assert read == {"a/1.jpg": [block, 50_000], "a/2.jpg": [block], "a/4.jpg": [block, 50_000]}


def test_images_that_cannot_be_read_are_like_no_other(root: Path) -> None:
    (root / "val/y/empty.png").touch()
    (root / "train/b/empty.png").touch()
    train, val = splits(root)
    (root / "train/a/2.png").unlink()
    assert find_overlap(train, val) == EXPECTED[:1]


def test_a_set_is_looked_through_once(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = splits(root)
    assert load_or_find_overlap(train, val, "this set") == EXPECTED
    monkeypatch.setattr(module, "find_overlap", lambda *_: [("a", "b")])
    assert load_or_find_overlap(train, val, "this set") == EXPECTED
    assert load_or_find_overlap(train, val, "another set") == [("a", "b")]
    for path in (cache / "overlap").glob("*.json"):
        path.write_text("[[")
    assert load_or_find_overlap(train, val, "this set") == [("a", "b")], "what the cache lost is found again"


def test_of_several_processes_one_looks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads represent the processes: each opens the lock on its own."""
    train, val = splits(root)
    calls = []

    def slow(*images: ImageSource) -> list[tuple[str, str]]:
        calls.append(1)
        time.sleep(0.2)
        return find_overlap(*images)

    monkeypatch.setattr(module, "find_overlap", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_or_find_overlap(train, val, "this set"), range(4)))
    assert found == [EXPECTED] * 4
    assert len(calls) == 1


def test_a_cache_that_locks_nothing_is_no_obstacle(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> None:
        raise OSError(f"{path}: no locks here")

    monkeypatch.setattr(cache_module, "file_lock", closed)
    assert load_or_find_overlap(*splits(root), "this set") == EXPECTED


def test_it_is_found_without_a_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "file"))
    assert load_or_find_overlap(*splits(root), "this set") == EXPECTED


def test_the_note_counts_images_of_val_and_names_some(root: Path) -> None:
    shutil.copytree(root / "train" / "a", root / "val" / "z")
    pairs = find_overlap(*splits(root))
    note = note_overlap(pairs, 8)
    assert note.startswith(
        "6 of 8 images of val are also in train, byte for byte: x/9.png is b/5.png, y/10.png is a/2.png, "
    )
    assert note.endswith(", ...")
    assert note_overlap(EXPECTED, 4) == (
        "2 of 4 images of val are also in train, byte for byte: x/9.png is b/5.png, y/10.png is a/2.png"
    )
