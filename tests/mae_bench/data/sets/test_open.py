"""Forms of image sets (class folders, plain images, tars), and the layouts `imagenet` and `images`."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mae_bench.data.batches.loader import TrainingOrder, load_training_batches
from mae_bench.data.batches.transforms import build_train_transform
from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.pack import pack_set
from mae_bench.data.sets.open import find_splits, open_images
from mae_bench.errors import UserError

Picture = Callable[..., bytes]


def fill(root: Path, names: list[str], picture: Picture) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))


def names(root: Path, split: str) -> list[str]:
    images = open_images(root, split)
    return [images.name(i) for i in range(len(images))]


def refused(layout: str, root: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(layout, root)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        ["b.jpg", "a.png"],
        ["2024/01/b.jpg", "2024/02/x/y/a.png", "c.webp"],
        ["x/a.jpg", "x/b.jpg", "x/deep/c.jpg"],
    ],
)
@pytest.mark.parametrize("inside", ["", "train/"])
@pytest.mark.usefixtures("keeps")
def test_ones_own_images_need_no_classes(
    tmp_path: Path, picture: Picture, given: list[str], inside: str
) -> None:
    fill(tmp_path, [inside + name for name in given], picture)
    (tmp_path / "notes.txt").write_text("no image")
    fill(tmp_path, [f"{inside}.thumbs/t.jpg", f"{inside}.hidden.jpg"], picture)
    for _ in range(2):  # the second is read from the cache
        images = open_images(tmp_path, "train")
    assert sorted(names(tmp_path, "train")) == sorted(given)
    assert (images.classes, set(images.targets.tolist())) == ([""], {0})
    assert {images.name(i): images.read(i) for i in range(len(images))} == {
        name: picture(number) for number, name in enumerate(given)
    }
    assert images.pixels(0) is None
    report = check_layout("images", tmp_path)
    assert (report.splits, report.classes) == ({"train": len(given)}, ("",))
    with pytest.raises(UserError, match="no images for val"):
        open_images(tmp_path, "val")


def test_a_validation_split_is_taken_where_it_is(tmp_path: Path, picture: Picture) -> None:
    fill(tmp_path, ["train/a.jpg", "train/b.jpg", "val/c.jpg"], picture)
    assert check_layout("images", tmp_path).splits == {"train": 2, "val": 1}
    assert names(tmp_path, "val") == ["c.jpg"]


def test_class_folders_are_images_too_with_one_digest(tmp_path: Path, picture: Picture) -> None:
    fill(tmp_path, [f"{split}/{name}/1.jpg" for split in ("train", "val") for name in "ab"], picture)
    images, imagenet = check_layout("images", tmp_path), check_layout("imagenet", tmp_path)
    assert (images.digest, images.classes, images.splits) == (
        imagenet.digest,
        imagenet.classes,
        imagenet.splits,
    )
    shutil.rmtree(tmp_path / "val")
    assert check_layout("images", tmp_path).splits == {"train": 2}
    refused("imagenet", tmp_path, "val is missing")


def test_images_beside_class_folders_are_named_where_classes_count(tmp_path: Path, picture: Picture) -> None:
    fill(tmp_path, [f"{split}/{name}/1.jpg" for split in ("train", "val") for name in "ab"], picture)
    fill(tmp_path, ["train/stray.jpg"], picture)
    refused("imagenet", tmp_path, "stray.jpg")
    assert check_layout("images", tmp_path).splits == {"train": 3, "val": 2}


def test_places_without_images_are_named(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "empty").mkdir()
    refused("images", tmp_path / "empty", "no images", "empty")
    refused("images", tmp_path / "nowhere", "missing")
    fill(tmp_path / "onlyval", ["val/a.jpg"], picture)
    refused("images", tmp_path / "onlyval", "train")
    (tmp_path / "bad").mkdir()
    for number in range(3):
        (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"no image")
    refused("images", tmp_path / "bad", "none of 3 images of train can be read", "2.jpg")
    (tmp_path / "bad" / "3.jpg").write_bytes(picture(0))
    assert check_layout("images", tmp_path / "bad").splits == {"train": 4}, (
        "what does not decode is counted by the job"
    )


def test_splits_are_found_by_name(tmp_path: Path, picture: Picture) -> None:
    fill(tmp_path, ["a/1.jpg"], picture)
    assert find_splits(tmp_path) == ["train"]
    assert find_splits(tmp_path, plain=False) == []
    fill(tmp_path, ["val/a/1.jpg"], picture)
    assert find_splits(tmp_path) == ["val"]
    with pytest.raises(UserError, match="no images for train"):
        open_images(tmp_path, "train")


def test_every_form_feeds_the_loader_the_same_batches(tmp_path: Path, picture: Picture) -> None:
    root = tmp_path / "folders"
    given = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in "ab" for i in range(5)]
    for number, name in enumerate(given):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number, (40, 30), "PNG"))
    for split in ("train", "val"):
        for form in ("tars", "shards"):
            (tmp_path / form).mkdir(exist_ok=True)
            with tarfile.open(
                tmp_path / form / (f"{split}.tar" if form == "tars" else f"{split}-000.tar"), "w"
            ) as tar:
                for path in sorted((root / split).rglob("*.png")):
                    tar.add(path, path.relative_to(root / split).as_posix())
                    if form == "shards":
                        label = tarfile.TarInfo(path.relative_to(root / split).with_suffix(".cls").as_posix())
                        label.size = 1
                        tar.addfile(label, io.BytesIO(b"%d" % "ab".index(path.parent.name)))
    pack_set(root, tmp_path / "packed")
    pack_set(root, tmp_path / "raw", raw=True)
    found = {}
    for form in ("folders", "tars", "shards", "packed", "raw"):
        images = open_images(tmp_path / form, "train")
        order = TrainingOrder(len(images), 4, seed=3)
        transform = build_train_transform((16, 16), (0.2, 1.0))
        found[form] = list(load_training_batches(images, transform, order, 1, 4, num_workers=2))
        assert check_layout("imagenet", tmp_path / form).splits == {"train": 10, "val": 10}
    for form, batches in found.items():
        assert not [batch.bad for batch in batches if batch.bad], form
        for batch, expected in zip(batches, found["folders"], strict=True):
            assert torch.equal(batch.imgs, expected.imgs), form
            assert torch.equal(batch.targets, expected.targets), form
