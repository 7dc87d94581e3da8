import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_bench.data.checks import ade20k
from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.demo.demo import DemoConfig, DemoSet, make_demo_data
from mae_bench.errors import UserError

PACKS = Path(__file__).resolve().parents[4].parent / "shared" / "data"
TINY = DemoConfig(
    imagenet=DemoSet(img_size=16, num_train=20, num_val=10),
    coco=DemoSet(img_size=48, num_train=3, num_val=2),
    ade20k=DemoSet(img_size=48, num_train=6, num_val=2),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(root, TINY)
    return root


@pytest.fixture
def data(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "data"))


def refused(layout, root, *words):
    with pytest.raises(UserError) as caught:
        check_layout(layout, root)
    for word in words:
        assert str(word) in str(caught.value)


def edit(data, change, split="train2017"):
    path = data / "coco" / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("layout", "pack", "splits", "num_classes"),
    [
        ("imagenet", "imagenet_small", {"train": 993, "val": 200}, 10),
        ("imagenet", "tiny_imagenet100", {"train": 20000, "val": 5000}, 100),
        ("coco", "coco_small", {"train2017": 78, "val2017": 47}, 80),
        ("ade20k", "ade20k_small", {"training": 367, "validation": 100}, 11),
    ],
)
def test_real_packs_pass(layout, pack, splits, num_classes):
    if not (PACKS / pack).is_dir():
        pytest.skip(f"the image pack {pack} is not beside the checkout")
    report = check_layout(layout, PACKS / pack)
    assert (report.splits, len(report.classes), report.name) == (splits, num_classes, pack)


@pytest.mark.parametrize("layout", ["imagenet", "coco", "ade20k"])
def test_the_digest_follows_content_not_place(layout, made, data):
    assert check_layout(layout, made / layout).digest == check_layout(layout, data / layout).digest
    image = next((data / layout).rglob("*.[jJ]*[gG]"))
    image.write_bytes(image.read_bytes() + b" ")
    assert check_layout(layout, made / layout).digest != check_layout(layout, data / layout).digest


@pytest.mark.parametrize(
    ("layout", "image", "split"),
    [
        ("imagenet", "val/*/*", "val"),
        ("imagenet", "train/*/*", "train"),
        ("coco", "val2017/*", "val2017"),
        ("coco", "annotations/instances_train2017.json", "train2017"),
        ("ade20k", "annotations/validation/*", "validation"),
        ("ade20k", "images/training/*", "training"),
    ],
)
def test_the_digest_of_a_split_follows_its_own_files(layout, image, split, made, data):
    path = next((data / layout).glob(image))
    path.write_bytes(path.read_bytes() + b" ")
    before, after = (check_layout(layout, root / layout).split_digests for root in (made, data))
    assert len(set(before.values())) == len(before) == 2
    assert [name for name in before if before[name] != after[name]] == [split]


def test_the_class_table_belongs_to_both_splits(made, data):
    (path,) = (data / "ade20k").glob("objectInfo*")
    path.write_text(path.read_text() + "\n")
    before, after = (check_layout("ade20k", root / "ade20k").split_digests for root in (made, data))
    assert all(before[split] != after[split] for split in before)


def test_annotations_count_by_content(made, data):
    path = next((data / "ade20k" / "annotations" / "training").iterdir())
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(path)
    edit(data, lambda c: c["annotations"][0].update(area=1.0))
    for layout in ("coco", "ade20k"):
        assert check_layout(layout, made / layout).digest != check_layout(layout, data / layout).digest


def test_a_tar_counts_as_its_folder(made, data):
    for split in ("train", "val"):
        with tarfile.open(data / "imagenet" / f"{split}.tar", "w") as tar:
            for entry in (data / "imagenet" / split).iterdir():
                tar.add(entry, entry.name)
        shutil.rmtree(data / "imagenet" / split)
    packed, folders = check_layout("imagenet", data / "imagenet"), check_layout("imagenet", made / "imagenet")
    assert (packed.digest, packed.splits, packed.classes) == (folders.digest, folders.splits, folders.classes)


def test_without_dataset_json_the_folder_gives_the_name(data):
    (data / "coco" / "dataset.json").unlink()
    assert check_layout("coco", data / "coco").name == "coco"


@pytest.mark.parametrize("layout", ["imagenet", "coco", "ade20k"])
def test_a_wrong_level_is_corrected(layout, data):
    refused(layout, data / "nowhere" / "at" / "all", "missing", "Expected")
    refused(layout, data, f"give {data / layout}", "found: ")
    inside = next(p for p in sorted((data / layout).iterdir()) if p.is_dir())
    refused(layout, inside, f"give {data / layout}")


@pytest.mark.parametrize(
    ("layout", "folder"),
    [
        ("imagenet", "val"),
        ("coco", "val2017"),
        ("ade20k", "images/validation"),
        ("ade20k", "annotations/training"),
    ],
)
def test_a_missing_or_empty_split_is_named(layout, folder, data):
    path = data / layout / folder
    shutil.rmtree(path)
    refused(layout, data / layout, path, "missing", "found")
    path.mkdir()
    refused(layout, data / layout, path)


def test_imagenet_faults(data):
    root = data / "imagenet"
    (root / "train" / "star" / "x").touch()
    (root / "val" / "zebra").mkdir()
    refused("imagenet", root, root / "val" / "zebra", "no images")
    shutil.copy(next((root / "val" / "star").iterdir()), root / "val" / "zebra")
    shutil.rmtree(root / "val" / "disc")
    refused("imagenet", root, "only in train: disc", "only in val: zebra")
    for split in ("train", "val"):
        for folder in (root / split).iterdir():
            if folder.name != "star":
                shutil.rmtree(folder)
    refused("imagenet", root, "only one class: star")


def test_a_link_to_nowhere_is_named(data):
    link = next((data / "imagenet" / "train").iterdir()) / "link.JPEG"
    link.symlink_to("nowhere")
    refused("imagenet", data / "imagenet", link, "cannot be read")


def test_an_unknown_layout_lists_the_known(data):
    refused("cocoa", data, "'cocoa'", "imagenet, coco, ade20k")


def test_flat_images_are_not_classes(data):
    root = data / "imagenet"
    image = next((root / "val" / "star").iterdir()).rename(root / "flat.JPEG")
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    image.rename(root / "val" / "flat.JPEG")
    refused("imagenet", root, "no class folders", "flat.JPEG")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), ["no categories"]),
        (lambda c: c["annotations"].clear(), ["no annotations"]),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), ["missing", "gone.jpg"]),
        (lambda c: c["annotations"][0].update(image_id=77), ["unknown images", "77"]),
        (lambda c: c["annotations"][0].update(category_id=77), ["unknown categories", "77"]),
        (lambda c: c["annotations"].append(c["annotations"][0]), ["more than once", "annotations"]),
        (lambda c: c["images"].append(c["images"][0]), ["more than once", "images"]),
        (lambda c: c["categories"][0].update(name="dart"), ["differ", "dart"]),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            ["annotations[0].bbox is wrong", "four finite numbers"],
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "4"]),
            ["annotations[0].bbox is wrong", "four finite numbers"],
        ),
    ],
)
def test_coco_faults(change, words, data):
    edit(data, change)
    refused("coco", data / "coco", *words)


def test_coco_file_that_is_missing_or_cut_short(data):
    path = data / "coco" / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:-50])
    refused("coco", data / "coco", path, "not a JSON file")
    path.unlink()
    refused("coco", data / "coco", path, "missing", "instances_train2017.json")
    path.write_text("[]")
    refused("coco", data / "coco", path, "no images")


def test_odd_boxes_are_a_note(data):
    edit(
        data,
        lambda c: (
            c["annotations"][0].update(bbox=[40, 40, 20, 20]),
            c["annotations"][1].update(bbox=[5, 5, 0, 3]),
        ),
    )
    notes = check_layout("coco", data / "coco").notes
    assert len(notes) == 1
    assert notes[0].startswith("2 of ")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((48, 40), np.uint8), ["40 x 48", "48 x 48"]),
        (np.zeros((48, 48, 3), np.uint8), ["mode RGB", "one channel"]),
        (np.full((48, 48), 16, np.uint8), ["label 16", "15"]),
    ],
)
def test_ade20k_wrong_label_maps(labels, words, data):
    path = data / "ade20k" / "annotations" / "validation" / "DEMO_val_00000002.png"
    Image.fromarray(labels).save(path)
    refused("ade20k", data / "ade20k", path, *words)


def test_ade20k_unreadable_label_map(data):
    path = data / "ade20k" / "annotations" / "validation" / "DEMO_val_00000002.png"
    path.write_bytes(path.read_bytes()[:60])
    refused("ade20k", data / "ade20k", path, "cannot be read")


def test_ade20k_images_and_maps_come_in_pairs(data):
    root = data / "ade20k"
    (root / "annotations" / "training" / "DEMO_train_00000001.png").unlink()
    refused("ade20k", root, "1 images without a label map", "DEMO_train_00000001")
    (root / "images" / "training" / "DEMO_train_00000001.jpg").unlink()
    (root / "images" / "training" / "DEMO_train_00000002.jpg").unlink()
    refused("ade20k", root, "1 label maps without an image", "DEMO_train_00000002")


def test_ade20k_class_table(data):
    path = data / "ade20k" / "objectInfo.txt"
    path.write_text("Idx\tName\n1\tsky\n3\tsea\n")
    refused("ade20k", data / "ade20k", path, "number its classes")
    path.write_bytes("Idx\tName\n1\tcafé\n".encode("latin-1"))
    refused("ade20k", data / "ade20k", path, "UTF-8")
    path.unlink()
    refused("ade20k", data / "ade20k", "objectInfo")


def test_label_maps_are_read_once(data, tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "cache"))
    read = []

    def count(pair):
        read.append(pair.labels.name)
        return count_labels(pair)

    count_labels = ade20k._count_labels
    monkeypatch.setattr(ade20k, "_count_labels", count)
    first = check_layout("ade20k", data / "ade20k")
    assert len(read) == 8, "all of both splits"
    assert check_layout("ade20k", data / "ade20k").labels == first.labels
    assert len(read) == 8
    check_layout("ade20k", data / "ade20k", thorough=True)
    assert len(read) == 16
    path = next((data / "ade20k" / "annotations" / "validation").glob("*.png"))
    labels = np.array(Image.open(path))
    labels[0, 0] = 0 if labels[0, 0] else labels.max()
    Image.fromarray(labels).save(path)
    assert check_layout("ade20k", data / "ade20k").labels != first.labels
    assert len(read) == 18, "only the split that changed"
    for cached in (tmp_path / "cache" / "labels").glob("*.json"):
        cached.write_bytes(cached.read_bytes()[:-1])
    assert check_layout("ade20k", data / "ade20k").labels["training"] == first.labels["training"]
    assert len(read) == 26, "damaged entries are computed again"
