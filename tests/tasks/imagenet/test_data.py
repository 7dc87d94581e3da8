"""The data of a protocol: the expected set, a set that is nearly ImageNet-1k, splits that share images."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mae_bench.config import build
from mae_bench.data.checks import overlap
from mae_bench.data.checks.layouts import LayoutReport, check_layout
from mae_bench.errors import UserError
from mae_bench.files import json_digest
from mae_bench.progress import Progress
from tasks.imagenet import knn
from tasks.imagenet.config import KnnConfig
from tasks.imagenet.data import (
    IMAGENET_CLASSES,
    IMAGENET_SIZES,
    TRANSFER_SETS,
    describe_near_imagenet,
    load_imagenet_classes,
    open_data,
    require_imagenet,
    require_set,
)
from tests.tasks.imagenet.toy import job, write_images

KNOWN = load_imagenet_classes()
WHOLE = dict(IMAGENET_SIZES)


def report(classes: tuple[str, ...] | list[str], splits: dict[str, int] | None = None) -> LayoutReport:
    return LayoutReport(
        "imagenet", "set", Path("/data/set"), WHOLE if splits is None else splits, tuple(classes), "0" * 64
    )


def config(data: Path, **changes: Any) -> KnnConfig:
    return build(
        KnnConfig, {"kind": "knn", "protocol": "toy", "data": str(data), "ks": [1], "k": 1, **changes}, "test"
    )


def test_the_known_digest_is_that_of_the_sorted_wordnet_ids() -> None:
    assert list(KNOWN) == sorted(set(KNOWN))
    assert (len(KNOWN), KNOWN[0], KNOWN[-1]) == (1000, "n01440764", "n15075141")
    assert json_digest(list(KNOWN)) == IMAGENET_CLASSES


@pytest.mark.parametrize(
    ("classes", "splits", "words"),
    [
        (
            KNOWN[:-1],
            None,
            ["has 999 classes: 1 of ImageNet-1k are missing (n15075141), 0 are not in it (none)"],
        ),
        ((*KNOWN[:5], "n00000000", *KNOWN[6:]), None, [f"missing ({KNOWN[5]})", "not in it (n00000000)"]),
        ((*KNOWN[:7], KNOWN[8], KNOWN[7], *KNOWN[9:]), None, [f"differently, from label 7 ({KNOWN[8]}) on"]),
        ([str(i) for i in range(1000)], None, ["1000 of ImageNet-1k are missing"]),
        (KNOWN, WHOLE | {"train": 1_281_166}, ["1281166", "1281167"]),
        (KNOWN, {"val": 50_000}, ["{'val': 50000}"]),
    ],
)
def test_what_is_not_imagenet_is_refused_with_the_difference(
    classes: tuple[str, ...], splits: dict[str, int] | None, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        require_imagenet(report(classes, splits))
    for word in ["/data/set", "expect=null", *words]:
        assert word in str(caught.value)


def test_imagenet_passes_without_a_note() -> None:
    require_imagenet(report(KNOWN))
    require_set("imagenet-1k", report(KNOWN, {"val": 50_000}), ("val",))
    assert (
        describe_near_imagenet(report(KNOWN)) == describe_near_imagenet(report(KNOWN, {"val": 50_000})) == ""
    )


@pytest.mark.parametrize("name", TRANSFER_SETS)
def test_transfer_sets_are_recognised_by_their_counts(name: str) -> None:
    num_classes, splits = TRANSFER_SETS[name]
    classes = [f"class {i}" for i in range(num_classes)]
    require_set(name, report(classes, splits))
    require_set(name, report(classes, {"val": splits["val"]}), ("val",))
    assert describe_near_imagenet(report(classes, splits)) == ""
    for wrong in (report(classes[1:], splits), report(classes, splits | {"train": 1})):
        with pytest.raises(UserError, match=f"(?s)/data/set has .*those of {name}: {num_classes} classes"):
            require_set(name, wrong)


@pytest.mark.parametrize(
    ("classes", "splits", "words"),
    [
        (KNOWN[:-1], None, ["nearly ImageNet-1k", "999 classes", "missing (n15075141)"]),
        ((*KNOWN, "n99999999"), None, ["1001 classes", "not in it (n99999999)"]),
        ((*KNOWN[:5], "zebra", *KNOWN[6:]), None, [f"missing ({KNOWN[5]})", "not in it (zebra)"]),
        (KNOWN[::-1], None, [f"differently, from label 0 ({KNOWN[-1]}) on"]),
        (sorted(str(i) for i in range(1000)), None, ["sorted as text", "label 2 is class 10"]),
        (sorted(str(i) for i in range(1, 1001)), None, ["sorted as text", "label 0 is class 1"]),
        (
            KNOWN,
            {"train": 12_811, "val": 50_000},
            ["number of images is not", "12811 in train instead of 1281167"],
        ),
    ],
)
def test_what_is_nearly_imagenet_is_noted(
    classes: tuple[str, ...], splits: dict[str, int] | None, words: list[str]
) -> None:
    note = describe_near_imagenet(report(classes, splits))
    for word in words:
        assert word in note


@pytest.mark.parametrize(
    "classes",
    [
        KNOWN[:100],
        [f"{i:04}" for i in range(1000)],
        [str(i) for i in range(1000)],
        [f"species {i}" for i in range(1010)],
        [f"n{i:08}" for i in range(21_841)],
    ],
    ids=["a hundred", "padded numbers", "numbers in order", "species", "ImageNet-21k"],
)
def test_another_set_is_not_nearly_imagenet(classes: list[str]) -> None:
    assert describe_near_imagenet(report(classes, {"train": 10, "val": 10})) == ""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """24 training and 9 validation images, one of which is also a training image under another name."""
    root = write_images(tmp_path / "shared")
    shutil.copy(root / "train" / "class0" / "3.png", root / "val" / "class0" / "0.png")
    return root


NOTE = "1 of 9 images of val are also in train, byte for byte: class0/0.png is class0/3.png"


def test_shared_images_are_noted_in_the_record(shared: Path, tmp_path: Path, backbone: str) -> None:
    outcome = knn.run(config(shared), job(tmp_path / "cell", backbone), Progress())
    assert NOTE in outcome.notes


def test_a_set_as_its_publisher_lists_it_is_scored_under_its_name(tmp_path: Path, backbone: str) -> None:
    """Places365's files with the toy's images and three classes, not in alphabetical order."""
    root, classes = write_images(tmp_path / "set"), ["class2", "class0", "class1"]
    (root / "categories_places365.txt").write_text(
        "".join(f"/c/{name} {i}\n" for i, name in enumerate(classes))
    )
    for split, folder, file in (
        ("train", "data_256", "places365_train_standard.txt"),
        ("val", "val_256", "places365_val.txt"),
    ):
        (root / split).rename(root / folder)
        images = sorted((root / folder).rglob("*.png"))
        lines = [
            f"/{path.relative_to(root / folder).as_posix()} {classes.index(path.parent.name)}\n"
            for path in images
        ]
        (root / file).write_text("".join(lines))
    outcome = knn.run(config(root), job(tmp_path / "cell", backbone), Progress())
    assert (outcome.dataset, outcome.num_samples, outcome.metrics["top1"].value) == ("Places365", 9, 100)
    assert outcome.data_digest == check_layout("imagenet", root).digest


def test_disjoint_splits_give_no_note(data: Path) -> None:
    assert open_data(config(data)).notes == []
    assert open_data(config(data, overlap="refuse")).notes == []


def test_shared_images_are_refused_if_the_config_says_so(shared: Path) -> None:
    assert open_data(config(shared)).notes == [NOTE]
    with pytest.raises(UserError, match=f"(?s){NOTE}.*overlap=note"):
        open_data(config(shared, overlap="refuse"))


def test_every_cell_of_a_set_is_served_by_one_search(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_data(config(shared))
    monkeypatch.setattr(overlap, "find_overlap", lambda *_: pytest.fail("searched again"))
    assert open_data(config(shared)).notes == [NOTE]


def test_changed_images_are_searched_again(shared: Path) -> None:
    assert open_data(config(shared)).notes == [NOTE]
    image = shared / "val" / "class0" / "0.png"
    image.write_bytes(image.read_bytes() + b" ")
    assert open_data(config(shared)).notes == []


def test_notes_of_the_layout_are_in_the_record_too(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.imagenet.data.ABOUT_A_THOUSAND", (3, 3))
    for split in ("train", "val"):
        for number in range(3):
            (shared / split / f"class{number}").rename(shared / split / str((2, 10, 1)[number]))
    assert check_layout("imagenet", shared).classes == ("1", "10", "2")
    numbers, same = open_data(config(shared)).notes
    assert "label 0 is class 1" in numbers
    assert "2/0.png is 2/3.png" in same
