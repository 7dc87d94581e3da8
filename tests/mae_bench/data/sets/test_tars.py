"""Tar shards: their images and labels, and errors of invalid tars."""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.sets.index import IndexedImages
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.shards import expand_braces, expand_pattern
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError

Picture = Callable[..., bytes]


def write_tar(path: Path, members: dict[str, bytes | None]) -> Path:
    """Write a tar; content None makes a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            file.addfile(member, io.BytesIO(content or b""))
    return path


def contents(images: ImageSource) -> list[tuple[str, bytes, str]]:
    return [(images.name(i), images.read(i), images.classes[images.targets[i]]) for i in range(len(images))]


@pytest.fixture
def root(tmp_path: Path, picture: Picture) -> Path:
    """Write two shards for training and one for validation, with labels 0 to 2."""
    for shard, first in (("train-000000", 0), ("train-000001", 3), ("val-000000", 6)):
        members: dict[str, bytes | None] = {}
        for number in range(first, first + 3):
            members[f"{number:04}.jpg"] = picture(number)
            members[f"{number:04}.cls"] = b"%d\n" % (number % 3)
        write_tar(tmp_path / f"{shard}.tar", members)
    return tmp_path


def forms(root: Path) -> list[str]:
    train, val = f"{root}/train-{{000000..000001}}.tar", f"{root}/val-*.tar"
    return [
        str(root),
        train,
        f"{root}/train-*.tar",
        f"{root}/train-00000[01].tar",
        f"train={train},val={val}",
    ]


def test_every_way_to_name_shards_opens_the_same(root: Path, picture: Picture) -> None:
    expected = [(f"train-00000{n // 3}.tar/{n:04}.jpg", picture(n), str(n % 3)) for n in range(6)]
    for given in forms(root):
        assert contents(open_images(given, "train")) == expected
    for given in (forms(root)[0], forms(root)[-1]):
        assert [image for _, image, _ in contents(open_images(given, "val"))] == [
            picture(n) for n in (6, 7, 8)
        ]
        report = check_layout("imagenet", given)
        assert (report.splits, report.classes, report.name) == (
            {"train": 6, "val": 3},
            ("0", "1", "2"),
            root.name,
        )
    assert check_layout("images", forms(root)[1]).splits == {"train": 6}
    assert len(open_images(root / "train-000001.tar", "train")) == 3, "one shard alone"
    with pytest.raises(UserError, match="no shards for val"):
        open_images(forms(root)[1], "val")


def test_shards_in_a_folder_of_the_split(root: Path) -> None:
    for split in ("train", "val"):
        (root / split).mkdir()
        for path in root.glob(f"{split}-*.tar"):
            path.rename(root / split / path.name.replace("train-", "part"))
    assert len(open_images(root, "train")) == 6
    assert len(open_images(root, "val")) == 3


def test_a_folder_of_the_split_comes_before_shards_beside_it(root: Path, picture: Picture) -> None:
    for name in ("a/1.jpg", "b/2.jpg"):
        (root / "train" / name).parent.mkdir(parents=True)
        (root / "train" / name).write_bytes(picture(1))
    assert open_images(root, "train").classes == ["a", "b"]
    write_tar(root / "train" / "n01440764.tar", {"left.jpg": picture(2)})
    assert len(open_images(root, "train")) == 2, "a tar left beside its class folders"


def test_braces_expand_as_in_a_shell() -> None:
    assert list(expand_braces("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(expand_braces("{9..10}/{x,y}")) == ["9/x", "9/y", "10/x", "10/y"]
    assert list(expand_braces("{0..1}")) == ["0", "1"]
    assert expand_pattern("https:/host/train-{0..1}.tar", "train") == [
        "https://host/train-0.tar",
        "https://host/train-1.tar",
    ]


def test_a_missing_shard_is_named(root: Path) -> None:
    with pytest.raises(UserError, match="train-000002.tar"):
        open_images(f"{root}/train-{{000000..000002}}.tar", "train")
    with pytest.raises(UserError, match="no shard"):
        open_images(f"{root}/nothing-*.tar", "train")


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"a.b.c.jpg": b"", "a.b.c.cls": b"0"}, "0"),  # a key with dots
        ({"k.left.png": b"", "k.cls": b"0"}, "0"),  # webdataset's key ends at the first dot
        ({"dir": None, "dir/k.webp": b"", "dir/k.cls": b"0", "k.cls": b"1"}, "0"),
        ({"./k.JPEG": b"", "./k.txt": b"tree frog\n"}, "tree frog"),
        ({"k.jpeg": b"", "k.json": b'{"label": 0, "width": 3}'}, "0"),
        ({"k.jpeg": b"", "k.json": b'{"label": "cat"}'}, "cat"),
        ({"k.jpeg": b"", "k.json": b'{"width": 3}'}, ""),
        ({"k.jpeg": b"", ".k.cls": b"x", "readme": b"x", "other.cls": b"5"}, ""),
    ],
)
def test_labels(tmp_path: Path, members: dict[str, bytes | None], label: str) -> None:
    write_tar(tmp_path / "train-0.tar", members)
    images = open_images(tmp_path, "train")
    assert len(images) == 1
    assert [images.classes[target] for target in images.targets] == [label]


def test_named_classes_give_the_numbers_their_names(root: Path) -> None:
    (root / "classnames.txt").write_text("ant\nbee\ncat\n")
    assert open_images(root, "train").classes == ["ant", "bee", "cat"]
    (root / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match="labels from 0 to 2 with 2 listed"):
        open_images(root, "train")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.jpg": b"", "b.jpg": b"", "b.cls": b"0"}, "a.jpg has no label"),
        ({"a.jpg": b"", "a.cls": b"cat"}, "a.cls contains 'cat'"),
        ({"a.jpg": b"", "a.json": b"{"}, "a.json is not JSON"),
        ({"a.jpg": b"", "a.cls": b"-1"}, "labels from -1"),
        ({"a.cls": b"1"}, "no images"),
    ],
)
def test_wrong_labels_are_named(tmp_path: Path, members: dict[str, bytes | None], words: str) -> None:
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=words):
        open_images(tmp_path, "train")


def test_captions_are_no_classes(tmp_path: Path) -> None:
    members: dict[str, bytes | None] = {}
    for number in range(1200):
        members |= {f"{number}.jpg": b"x", f"{number}.txt": b"a photograph, number %d" % number}
    write_tar(tmp_path / "train-0.tar", members)
    assert open_images(tmp_path, "train").classes == [""]


def test_a_compressed_or_cut_tar_is_named(root: Path) -> None:
    path = root / "train-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"train-000001.tar.*\n.*\n.*gunzip") as caught:
        open_images(root, "train")
    assert "compressed" in str(caught.value)
    second = whole.index(b"0003.cls")  # where a header starts
    for cut in (700, second, second + 100, second + 512, second + 700):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"train-000001.tar cannot be read(?s:.*)truncated"):
            open_images(root, "train")
    path.write_bytes(whole[:second] + b"x" * 512 + whole[second + 512 :])
    with pytest.raises(UserError, match="train-000001.tar cannot be read"):
        open_images(root, "train")


def test_a_shard_that_shrank_since_is_a_bad_image_not_garbage(root: Path) -> None:
    images = open_images(root, "train")
    with open(root / "train-000001.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(OSError, match="ends in the middle"):
        images.read(3)
    assert images.read(0)


@pytest.mark.usefixtures("keeps")
def test_shards_are_indexed_once_until_one_changes(
    root: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_images(root, "train")
    with monkeypatch.context() as patched:
        patched.setattr(
            "mae_bench.data.sets.tars.read_members", lambda path: pytest.fail(f"{path} is read again")
        )
        images = open_images(root, "train")
        assert contents(images) == contents(first)
        assert isinstance(images, IndexedImages)
        assert len(pickle.dumps(images)) < 3000
    write_tar(root / "train-000001.tar", {"n.jpg": picture(9), "n.cls": b"2"})
    assert len(open_images(root, "train")) == 4
    write_tar(root / "train-000002.tar", {"n.jpg": picture(9), "n.cls": b"2"})
    assert len(open_images(root, "train")) == 5


def test_one_tar_without_class_folders_is_a_shard(tmp_path: Path, picture: Picture) -> None:
    write_tar(tmp_path / "train.tar", {"a.jpg": picture(1), "a.json": json.dumps({"label": 0}).encode()})
    assert contents(open_images(tmp_path, "train")) == [("train.tar/a.jpg", picture(1), "0")]


def test_more_shards_than_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_bench.data.sets.index.MAX_OPEN", 2)
    for number in range(5):
        write_tar(tmp_path / f"train-{number}.tar", {"k.jpg": b"%d" % number})
    images = open_images(tmp_path, "train")
    assert [images.read(i) for i in (0, 1, 2, 3, 4, 0, 4)] == [b"0", b"1", b"2", b"3", b"4", b"0", b"4"]
