"""iNaturalist and Places as published: images, labels and classes of the lists, and errors in a list."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.pack import pack_set
from mae_bench.data.sets.index import Index
from mae_bench.data.sets.open import find_splits, open_images
from mae_bench.data.sets.source import ImageSource
from mae_bench.errors import UserError

Picture = Callable[..., bytes]
SPECIES = [
    "Zonotrichia leucophrys",
    "Acer rubrum",
    "Danaus plexippus",
]  # in the order of their ids, which is not alphabetical
SCENES = ["a/airfield", "a/apartment_building/outdoor", "z/zen_garden"]
TRAIN, VAL = [2, 0, 1, 1, 0, 2, 0], [1, 0, 2, 0]  # labels in the order of the lists


def write(root: Path, names: list[str], picture: Picture, first: int = 0) -> None:
    for number, name in enumerate(names, first):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))


def inaturalist(root: Path, picture: Picture, year: int) -> Path:
    """Write a set as published: image ids are not positions, and categories are not in the order of ids."""
    folder = "train_val_images" if year == 2017 else f"train_val{year}"
    for split, labels, first in (("train", TRAIN, 0), ("val", VAL, len(TRAIN))):
        names = [
            f"{folder}/Animalia/{SPECIES[label] if year == 2017 else label}/{first + i:032x}.jpg"
            for i, label in enumerate(labels)
        ]
        write(root, names, picture, first)
        ids = [7 * (first + i) + 3 for i in range(len(labels))]
        categories = [{"id": i, "name": name, "supercategory": "Animalia"} for i, name in enumerate(SPECIES)]
        content = {
            "info": {"year": year},
            "images": [
                {"id": n, "file_name": name, "width": 16, "height": 12, "license": 1, "rights_holder": "x"}
                for n, name in zip(ids, names, strict=True)
            ],
            "licenses": [],
            "annotations": [
                {"id": n, "image_id": n, "category_id": label}
                for n, label in reversed(list(zip(ids, labels, strict=True)))
            ],
            "categories": [categories[2], categories[0], categories[1]],
        }
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return root


def places365(root: Path, picture: Picture, size: str = "256") -> Path:
    train = [f"/{SCENES[label]}/{i + 1:08}.jpg" for i, label in enumerate(TRAIN)]
    val = [f"Places365_val_{i + 1:08}.jpg" for i in range(len(VAL))]
    write(root / f"data_{size}", [name[1:] for name in train], picture)
    write(root / f"val_{size}", val, picture, len(TRAIN))
    (root / "categories_places365.txt").write_text("".join(f"/{name} {i}\n" for i, name in enumerate(SCENES)))
    for file, names, labels in (("train_standard", train, TRAIN), ("val", val, VAL)):
        lines = [f"{name} {label}\n" for name, label in zip(names, labels, strict=True)]
        (root / f"places365_{file}.txt").write_text("".join(lines))
    return root


def places205(root: Path, picture: Picture) -> Path:
    (root / "trainvalsplit_places205").mkdir(parents=True)
    for split, labels, first in (("train", TRAIN, 0), ("val", VAL, len(TRAIN))):
        names = [f"{SCENES[label]}/gsun_{first + i:032x}.jpg" for i, label in enumerate(labels)]
        write(root / "data/vision/torralba/deeplearning/images256", names, picture, first)
        lines = [f"{name} {label}\n" for name, label in zip(names, labels, strict=True)]
        (root / "trainvalsplit_places205" / f"{split}_places205.csv").write_text("".join(lines))
    return root


SETS: dict[str, tuple[Callable[[Path, Picture], Path], list[str]]] = {
    "iNaturalist 2017": (lambda root, picture: inaturalist(root, picture, 2017), SPECIES),
    "iNaturalist 2018": (lambda root, picture: inaturalist(root, picture, 2018), SPECIES),
    "iNaturalist 2019": (lambda root, picture: inaturalist(root, picture, 2019), SPECIES),
    "Places365": (places365, SCENES),
    "Places205": (places205, SCENES),
}
each_set = pytest.mark.parametrize("name", SETS)


def make(name: str, root: Path, picture: Picture) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return SETS[name][0](root, picture)


def contents(images: ImageSource) -> list[bytes]:
    return [images.read(i) for i in range(len(images))]


def refused(root: Path, *words: object) -> None:
    with pytest.raises(UserError) as caught:
        check_layout("imagenet", root)
    for word in words:
        assert str(word) in str(caught.value)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@each_set
def test_images_labels_and_classes_are_the_publishers(name: str, tmp_path: Path, picture: Picture) -> None:
    root = make(name, tmp_path / "set", picture)
    for split, labels, first in (("train", TRAIN, 0), ("val", VAL, len(TRAIN))):
        images = open_images(root, split)
        assert images.targets.tolist() == labels
        assert images.classes == SETS[name][1]
        assert contents(images) == [picture(first + i) for i in range(len(labels))]
    report = check_layout("imagenet", root)
    assert (report.name, report.splits, report.classes) == (
        name,
        {"train": 7, "val": 4},
        tuple(SETS[name][1]),
    )
    assert report.notes == ()
    assert find_splits(root) == ["train", "val"]
    assert check_layout("imagenet_val", root).splits == {"val": 4}
    assert check_layout("images", root).splits == {"train": 7, "val": 4}, "val is not pretrained on"


@each_set
def test_the_next_start_reads_no_list(
    name: str, tmp_path: Path, picture: Picture, keeps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(name, tmp_path / "set", picture)
    (next(root.rglob("*.jpg")).parent / "stray.jpg").write_bytes(picture(99))
    first = check_layout("imagenet", root)

    def build(*_: object) -> Index:
        raise AssertionError("the set is listed again")

    with monkeypatch.context() as patch:
        patch.setattr("mae_bench.data.sets.open.index_listed", build)
        assert check_layout("imagenet", root) == first, "with its notes"
        assert contents(open_images(root, "train")) == [picture(i) for i in range(len(TRAIN))]
        next(root.rglob("stray.jpg")).unlink()
        with pytest.raises(AssertionError, match="listed again"):
            check_layout("imagenet", root)
    assert check_layout("imagenet", root).notes == ()


@each_set
def test_the_digest_follows_labels_and_content_not_the_place(
    name: str, tmp_path: Path, picture: Picture
) -> None:
    root, moved = make(name, tmp_path / "a", picture), make(name, tmp_path / "b", picture)
    digest = check_layout("imagenet", root).digest
    assert check_layout("imagenet", moved).digest == digest
    image = next(moved.rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b" ")
    assert check_layout("imagenet", moved).digest != digest
    if name.startswith("iNat"):
        edit(root / f"val{name[-4:]}.json", lambda value: value["annotations"][0].update(category_id=1))
    elif name == "Places365":
        replace(root / "places365_val.txt", "00000001.jpg 1", "00000001.jpg 2")
        replace(root / "places365_val.txt", "00000002.jpg 0", "00000002.jpg 1")
    else:
        return  # a label of Places205 is that of its folder
    assert check_layout("imagenet", root).digest != digest


@each_set
def test_images_that_are_not_there_are_named(name: str, tmp_path: Path, picture: Picture) -> None:
    root = make(name, tmp_path, picture)
    absent = open_images(root, "train").name(3)
    (root / absent).unlink()
    refused(root, "1 images that are not in", absent, "each of its 7 images")


@each_set
def test_images_that_no_list_names_are_noted(name: str, tmp_path: Path, picture: Picture) -> None:
    root = make(name, tmp_path, picture)
    stray = (root / open_images(root, "train").name(0)).with_name("stray.jpg")
    stray.write_bytes(picture(50))
    report = check_layout("imagenet", root)
    assert report.notes == (
        f"1 images that are in no list are ignored: {stray.relative_to(root).as_posix()}",
    )
    assert report.splits == {"train": 7, "val": 4}


@each_set
def test_a_list_without_its_images_says_where_they_belong(
    name: str, tmp_path: Path, picture: Picture
) -> None:
    root = make(name, tmp_path, picture)
    for folder in [
        path for path in root.iterdir() if path.is_dir() and path.name != "trainvalsplit_places205"
    ]:
        shutil.rmtree(folder)
    refused(root, root, "7 images that are not in" if name.startswith("iNat") else "no images of it")


@each_set
def test_a_wrong_level_is_corrected(name: str, tmp_path: Path, picture: Picture) -> None:
    root = make(name, tmp_path / "above" / "set", picture)
    for wrong in (root.parent, next(path for path in sorted(root.iterdir()) if path.is_dir())):
        with pytest.raises(UserError, match=f"give {root}, which has the imagenet layout"):
            check_layout("imagenet", wrong)


@each_set
def test_it_packs_with_its_labels(name: str, tmp_path: Path, picture: Picture) -> None:
    pack_set(make(name, tmp_path / "set", picture), tmp_path / "packed", num_workers=0)
    images = open_images(tmp_path / "packed", "train")
    assert (images.targets.tolist(), images.classes) == (TRAIN, SETS[name][1])
    assert check_layout("imagenet", tmp_path / "packed").name == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value["annotations"].pop(), ["1 images without an annotation", f"{0:032x}.jpg"]),
        (lambda value: value["annotations"][0].update(category_id=3), ["unknown category_id 3", "image 45"]),
        (
            lambda value: value["annotations"].append({"image_id": 3, "category_id": 1}),
            ["image 3", "several categories"],
        ),
        (lambda value: value["annotations"].append({"image_id": 4, "category_id": 1}), ["unknown images: 4"]),
        (
            lambda value: value["images"].append(value["images"][0] | {"id": 3}),
            ["more than once", f"{0:032x}.jpg"],
        ),
        (lambda value: value["images"][0].pop("file_name"), ["'images'", "file_name"]),
        (lambda value: value["images"][0].update(id=[3]), ["'images'", "[3]"]),
        (lambda value: value.pop("categories"), ["no categories"]),
        (
            lambda value: value["categories"][0].update(name="Homo sapiens"),
            ["only in train: Homo sapiens", f"only in val: {SPECIES[2]}"],
        ),
        (
            lambda value: value["categories"].append({"id": 3, "name": "Homo sapiens"}),
            ["only in train: Homo sapiens"],
        ),
        (
            lambda value: [each.update(id=2 - each["id"]) for each in value["categories"]],
            ["label 0 is Danaus plexippus in train and Zonotrichia leucophrys in val"],
        ),
    ],
)
def test_what_is_wrong_with_inaturalists_list(
    change: Callable[[Any], Any], words: list[str], tmp_path: Path, picture: Picture
) -> None:
    root = inaturalist(tmp_path, picture, 2018)
    edit(root / "train2018.json", change)
    refused(root, *words)


def test_a_category_without_an_image_is_named(tmp_path: Path, picture: Picture) -> None:
    root = inaturalist(tmp_path, picture, 2019)
    for split in ("train", "val"):
        edit(
            root / f"{split}2019.json",
            lambda value: value["categories"].append({"id": 3, "name": "Homo sapiens"}),
        )
    refused(root, "no image of train with the class Homo sapiens")


def test_categories_of_one_name_stay_apart(tmp_path: Path, picture: Picture) -> None:
    root = inaturalist(tmp_path, picture, 2018)
    for split in ("train", "val"):
        edit(root / f"{split}2018.json", lambda value: value["categories"][0].update(name=SPECIES[0]))
    assert check_layout("imagenet", root).classes == (
        f"{SPECIES[0]} (0)",
        f"{SPECIES[1]} (1)",
        f"{SPECIES[0]} (2)",
    )


def test_a_cut_list_is_named(tmp_path: Path, picture: Picture) -> None:
    root = inaturalist(tmp_path, picture, 2017)
    path = root / "train2017.json"
    path.write_bytes(path.read_bytes()[:-20])
    refused(root, path, "not a JSON file")


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            "places365_train_standard.txt",
            "00000001.jpg 2",
            "00000001.jpg 3",
            ["1 labels out of range", "00000001.jpg has 3", "0 to 2"],
        ),
        ("places365_val.txt", "00000002.jpg 0", "00000002.jpg -1", ["line 2", "00000002.jpg -1"]),
        ("places365_val.txt", "00000002.jpg 0", "00000002.jpg", ["line 2", "00000002.jpg"]),
        ("places365_val.txt", "00000002.jpg", "00000001.jpg", ["more than once", "00000001.jpg"]),
        (
            "places365_val.txt",
            "00000003.jpg 2",
            "00000003.jpg 1",
            ["no image of val with the class z/zen_garden"],
        ),
        ("categories_places365.txt", "zen_garden 2", "zen_garden 3", ["does not number its classes"]),
        ("categories_places365.txt", "airfield 0", "airfield 1", ["does not number its classes"]),
    ],
)
def test_what_is_wrong_with_the_lists_of_places365(
    file: str, old: str, new: str, words: list[str], tmp_path: Path, picture: Picture
) -> None:
    root = places365(tmp_path, picture)
    replace(root / file, old, new)
    refused(root, root / file if "class z" not in words[0] else root, *words)


def test_places365_needs_its_classes_and_one_size_of_images(tmp_path: Path, picture: Picture) -> None:
    root = places365(tmp_path, picture, "large")
    assert check_layout("imagenet", root).splits == {"train": 7, "val": 4}
    shutil.copytree(root / "val_large", root / "val_256")
    refused(root, "the images of val twice: val_256, val_large")
    shutil.rmtree(root / "val_256")
    (root / "categories_places365.txt").unlink()
    refused(root, "categories_places365.txt")


def test_lists_may_lie_in_the_folder_of_their_archive(tmp_path: Path, picture: Picture) -> None:
    root = places365(tmp_path, picture)
    inside = root / "filelist_places365-standard"
    inside.mkdir()
    for path in list(root.glob("*.txt")):
        path.rename(inside / path.name)
    assert check_layout("imagenet", root).name == "Places365"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("a/airfield", "z/zen_garden", ["label 0 is both"]), (" 2\n", " 4\n", ["no image has the label 2, 3"])],
)
def test_what_is_wrong_with_the_lists_of_places205(
    old: str, new: str, words: list[str], tmp_path: Path, picture: Picture
) -> None:
    root = places205(tmp_path, picture)
    path = root / "trainvalsplit_places205" / "train_places205.csv"
    path.write_text(path.read_text().replace(old, new, 1 if "airfield" in old else -1))
    refused(root, path, *words)


def test_commas_part_as_well_as_blanks(tmp_path: Path, picture: Picture) -> None:
    root = places205(tmp_path, picture)
    for path in (root / "trainvalsplit_places205").iterdir():
        path.write_text(path.read_text().replace(" ", ","))
    assert open_images(root, "train").targets.tolist() == TRAIN


def test_class_folders_come_before_a_list_beside_them(tmp_path: Path, picture: Picture) -> None:
    root = inaturalist(tmp_path, picture, 2018)
    write(
        root,
        [f"{split}/{name}/{i}.jpg" for split in ("train", "val") for i, name in enumerate("ab")],
        picture,
    )
    assert check_layout("imagenet", root).splits == {"train": 2, "val": 2}


def test_a_list_of_one_split_gives_that_split_alone(tmp_path: Path, picture: Picture) -> None:
    root = inaturalist(tmp_path, picture, 2018)
    (root / "val2018.json").unlink()
    assert find_splits(root) == ["train"]
    refused(root, root / "val", "missing")
    note = check_layout("images", root).notes
    assert note[0].startswith("4 images that are in no list"), "val's are not trained on"
    with pytest.raises(UserError, match="no images for val"):
        open_images(root, "val")


def test_inaturalist_2021_is_class_folders_in_the_order_of_its_ids(tmp_path: Path, picture: Picture) -> None:
    folders = [
        "00000_Animalia_Annelida_Clitellata_Lumbricus_terrestris",
        "00001_Animalia_Aves_Abrornis",
        "00010_Plantae_Acer",
    ]
    for split in ("train", "val"):
        write(tmp_path, [f"{split}/{folder}/{i}.jpg" for i, folder in enumerate(folders)], picture)
        (tmp_path / f"{split}.json").write_text("{}")
    assert check_layout("imagenet", tmp_path).classes == tuple(folders)
    assert np.array_equal(open_images(tmp_path, "val").targets, [0, 1, 2])
