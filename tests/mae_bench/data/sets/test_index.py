"""The index of a folder: its content, when it is rebuilt, and that it is pickled as a path."""

import hashlib
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.sets import index
from mae_bench.data.sets import open as formats
from mae_bench.data.sets.index import (
    Index,
    IndexedImages,
    build_index,
    digest_indexes,
    read_index,
    write_index,
)
from mae_bench.data.sets.open import open_images
from mae_bench.errors import UserError

NAMES = ["a/1.png", "a/é.jpg", "a-b/2.jpg", "b/x.JPEG"]


@pytest.fixture
def root(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            path = tmp_path / "set" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
    return tmp_path / "set"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list of indexed folders."""
    walked: list[Path] = []
    original = formats.index_folder

    def walk(folder: Path) -> Index:
        walked.append(folder)
        return original(folder)

    monkeypatch.setattr(formats, "index_folder", walk)
    return walked


def names(images: object) -> list[str]:
    assert isinstance(images, IndexedImages)
    return [images.name(i) for i in range(len(images))]


def test_an_index_survives_its_file(tmp_path: Path) -> None:
    made = build_index(
        NAMES,
        [5, 6, 7, 8],
        [0, 0, 1, 2],
        ["a", "a-b", "b"],
        files=["x"],
        shard=[0] * 4,
        starts=[0, 5, 11, 18],
        shapes=[(1, 2), (3, 4), (5, 6), (7, 8)],
        stamps={"p": [1, 2, 3]},
    )
    (tmp_path / "index").write_bytes(write_index(made))
    found = read_index(tmp_path / "index")
    assert found is not None
    assert [found.name(i) for i in range(-1, 4)] == [NAMES[-1], *NAMES]
    assert (found.classes, found.files, found.stamps) == (made.classes, made.files, made.stamps)
    for name in index.ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
        assert getattr(found, name).dtype == getattr(made, name).dtype
    assert found.targets.dtype == np.int32
    with pytest.raises(IndexError):
        found.name(4)


def test_the_digest_is_that_of_sorted_paths_and_sizes(root: Path) -> None:
    names = [f"{split}/{name}" for split in ("train", "val") for name in NAMES]
    lines = sorted(f"{name}\0{(root / name).stat().st_size}\n" for name in names)
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest_indexes({split: open_images(root, split).index for split in ("val", "train")}) == expected  # type: ignore[attr-defined]


def test_the_digest_of_a_set_tells_other_content_of_the_same_size(tmp_path: Path) -> None:
    digests = []
    for folder, values in (("zeros", 0), ("ones", 1), ("more-zeros", 0)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "image.npy", np.full((4, 4, 5), values, np.uint8))
        digests.append(check_layout("images", tmp_path / folder).digest)
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.usefixtures("keeps")
def test_a_known_tree_is_not_walked_again_but_for_its_changes(
    root: Path, scans: list[Path], picture: Callable[..., bytes]
) -> None:
    first = check_layout("imagenet", root)
    assert len(scans) == 2
    assert check_layout("imagenet", root) == first
    images = open_images(root, "train")
    assert len(scans) == 2, "both the check and the source take it from the cache"
    assert names(images) == sorted(NAMES, key=lambda name: name.split("/"))
    (root / "train" / "b" / "new.jpg").write_bytes(picture(9))
    assert len(open_images(root, "train")) == 5
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "1.jpg").write_bytes(picture(9))
    assert open_images(root, "train").classes == ["a", "a-b", "b", "c"]
    (root / "train" / "a" / "1.png").rename(root / "train" / "a" / "0.png")
    assert "a/0.png" in names(open_images(root, "train"))
    assert scans.count(root / "train") == 4
    assert scans.count(root / "val") == 1


@pytest.mark.usefixtures("keeps")
def test_a_file_overwritten_in_place_is_seen_when_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "NUM_SAMPLED", 0)  # as if it were not in the sample
    before = check_layout("imagenet", root).digest
    path = root / "train" / "a" / "1.png"
    path.write_bytes(path.read_bytes() + b" ")
    assert check_layout("imagenet", root).digest == before, (
        "its folder does not change: the price of not asking a million files"
    )
    assert check_layout("imagenet", root, thorough=True).digest != before
    assert check_layout("imagenet", root).digest != before, "and is known from then on"


def test_small_and_unsettled_sets_are_not_kept(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_images(root, "train")
    monkeypatch.setattr(index, "MIN_CACHED", 1)
    open_images(root, "train")
    assert not list(cache.rglob("*.*")), "its folders changed within the clock's tick"
    monkeypatch.setattr(index, "SETTLED_SECONDS", 0.0)
    open_images(root, "train")
    assert len(list(cache.rglob("*.index"))) == 1


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, None])
def test_a_damaged_index_is_made_again(
    root: Path, keeps: Path, scans: list[Path], damage: bytes | None
) -> None:
    open_images(root, "train")
    (path,) = keeps.rglob("*.index")
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    assert len(open_images(root, "train")) == 4
    open_images(root, "train")
    assert len(scans) == 2


@pytest.mark.parametrize("place", [20, 0.5, -30, -1])
def test_an_index_with_a_changed_byte_is_made_again(
    root: Path, keeps: Path, scans: list[Path], place: float
) -> None:
    """Also of a name, a size or a label, which would be read as well."""
    intact = names(open_images(root, "train"))
    (path,) = keeps.rglob("*.index")
    written = path.read_bytes()
    flipped = bytearray(written)
    flipped[int(place * len(written)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(flipped)
    assert names(open_images(root, "train")) == intact
    assert len(scans) == 2
    assert path.read_bytes() == written


def test_a_cache_entry_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    assert index.read_cached(path) is None
    index.try_to_cache(path, b"value")
    assert index.read_cached(path) == b"value"
    written = path.read_bytes()
    for i in range(len(written)):
        path.write_bytes(written[:i] + bytes([written[i] ^ 64]) + written[i + 1 :])
        assert index.read_cached(path) is None
        path.write_bytes(written[:i])
        assert index.read_cached(path) is None


def test_without_a_cache_that_can_be_written_all_works(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MIN_CACHED", 1)
    monkeypatch.setattr(index, "SETTLED_SECONDS", 0.0)
    (tmp_path / "file").write_text("no folder can be made below it")
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "file" / "cache"))
    images = open_images(root, "train")
    assert check_layout("imagenet", root).splits == {"train": 4, "val": 4}
    assert names(pickle.loads(pickle.dumps(images))) == names(images)


def test_the_cache_lies_where_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("MAE_BENCH_CACHE", "~/own")
    assert index.cache_folder() == Path.home() / "own"
    monkeypatch.delenv("MAE_BENCH_CACHE")
    assert index.cache_folder() == Path("/x/mae_bench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert index.cache_folder() == Path.home() / ".cache" / "mae_bench"


@pytest.mark.usefixtures("keeps")
def test_a_kept_index_is_mapped_and_travels_as_its_path(root: Path) -> None:
    open_images(root, "train")
    images = open_images(root, "train")
    assert isinstance(images, IndexedImages)
    base: object = images.index.sizes
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap), "no process holds a copy"
    sent = pickle.dumps(images)
    assert len(sent) < 2000
    copy = pickle.loads(sent)
    assert names(copy) == names(images)
    assert [copy.read(i) for i in range(4)] == [
        (root / "train" / name).read_bytes() for name in names(images)
    ]
    assert images.index.path is not None
    os.unlink(images.index.path)
    with pytest.raises(UserError, match="changed while it was in use"):
        pickle.loads(sent)


@pytest.mark.usefixtures("keeps")
def test_many_writers_leave_one_whole_index(root: Path) -> None:
    found: list[list[str]] = []

    def open_again() -> None:
        found.append(names(open_images(root, "train", refresh=True)))

    threads = [threading.Thread(target=open_again) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(each == found[0] for each in found)


def test_links_in_a_circle_end(root: Path) -> None:
    (root / "train" / "a" / "up").symlink_to(root / "train")
    assert len(open_images(root, "train")) == 4
