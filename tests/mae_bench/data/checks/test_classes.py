"""Invalid classes are rejected in every form of a set, and the message names the difference."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.pack import pack_set
from mae_bench.errors import UserError

Picture = Callable[..., bytes]
Given = dict[str, list[str]]  # split -> the class of each image


def folders(root: Path, given: Given, picture: Picture) -> Path:
    for split, classes in given.items():
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            (root / split / name / f"{number}.jpg").write_bytes(picture(number))
    return root


def packed(root: Path, given: Given, picture: Picture) -> Path:
    pack_set(folders(root / "plain", given, picture), root / "packed", num_workers=0)
    return root / "packed"


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tars(root: Path, given: Given, picture: Picture) -> Path:
    for split, classes in given.items():
        write_tar(root / f"{split}.tar", {f"{name}/{i}.jpg": picture(i) for i, name in enumerate(classes)})
    return root


def shards(root: Path, given: Given, picture: Picture) -> Path:
    """Write each split to a folder of shards, with text labels."""
    for split, classes in given.items():
        members = {f"{i}.jpg": picture(i) for i in range(len(classes))}
        write_tar(
            root / split / "0.tar", members | {f"{i}.txt": name.encode() for i, name in enumerate(classes)}
        )
    return root


def listed(root: Path, given: Given, picture: Picture) -> Path:
    """Write iNaturalist's lists, each with the categories of its own split."""
    for split, classes in given.items():
        names = [f"train_val2018/Aves/{name}/{split}{i}.jpg" for i, name in enumerate(classes)]
        for i, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(picture(i))
        known = sorted(set(classes))
        content = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": known.index(name)} for i, name in enumerate(classes)
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(known)],
        }
        (root / f"{split}2018.json").write_text(json.dumps(content))
    return root


each_form = pytest.mark.parametrize("form", [folders, packed, tars, shards, listed])


def refused(root: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout("imagenet", root)
    for word in words:
        assert word in str(caught.value)


@each_form
def test_like_classes_pass(form: Callable[..., Path], tmp_path: Path, picture: Picture) -> None:
    report = check_layout(
        "imagenet", form(tmp_path / "set", {"train": ["b", "a", "b"], "val": ["a", "b"]}, picture)
    )
    assert (report.classes, report.splits, report.notes) == (("a", "b"), {"train": 3, "val": 2}, ())


@each_form
def test_other_classes_in_val_are_named(form: Callable[..., Path], tmp_path: Path, picture: Picture) -> None:
    root = form(tmp_path / "set", {"train": ["ant", "bee", "cat"], "val": ["ant", "dog", "eel"]}, picture)
    refused(root, "only in train: bee, cat", "only in val: dog, eel")


@each_form
def test_a_class_without_images_in_val_is_named(
    form: Callable[..., Path], tmp_path: Path, picture: Picture
) -> None:
    root = form(tmp_path / "set", {"train": ["ant", "bee", "cat"], "val": ["ant", "bee"]}, picture)
    refused(root, "only in train: cat", "only in val: none")


@each_form
def test_one_class_is_refused_with_its_name(
    form: Callable[..., Path], tmp_path: Path, picture: Picture
) -> None:
    root = form(tmp_path / "set", {"train": ["ant", "ant"], "val": ["ant"]}, picture)
    refused(root, str(root), "only one class: ant")


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_folder_is_named(split: str, tmp_path: Path, picture: Picture) -> None:
    root = folders(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]}, picture)
    (root / split / "cat").mkdir()
    refused(root, f"no images in {root / split / 'cat'}")


@pytest.mark.parametrize("pack_it", [False, True])
@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (["ant", "cat"], ["ant", "bee", "cat"], "no image of train with the class bee"),
        (["ant", "bee", "cat"], ["bee"], "no image of val with the class ant, cat"),
    ],
)
def test_a_listed_class_without_an_image_is_named(
    train: list[str], val: list[str], words: str, pack_it: bool, tmp_path: Path, picture: Picture
) -> None:
    root = shards(tmp_path / "set", {"train": train, "val": val}, picture)
    for split in ("train", "val"):
        (root / split / "classes.txt").write_text("ant\nbee\ncat\n")
    if pack_it:
        pack_set(root, tmp_path / "packed", num_workers=0)
    refused(tmp_path / "packed" if pack_it else root, words)


@pytest.mark.parametrize("pack_it", [False, True])
def test_another_numbering_in_val_is_named(pack_it: bool, tmp_path: Path, picture: Picture) -> None:
    root = shards(tmp_path / "set", {"train": ["ant", "bee", "cat"], "val": ["ant", "bee", "cat"]}, picture)
    (root / "train" / "classes.txt").write_text("ant\nbee\ncat\n")
    (root / "val" / "classes.txt").write_text("ant\ncat\nbee\n")
    if pack_it:
        pack_set(root, tmp_path / "packed", num_workers=0)
    refused(tmp_path / "packed" if pack_it else root, "label 1 is bee in train and cat in val")
