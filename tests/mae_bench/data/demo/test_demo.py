import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.demo.demo import (
    CATEGORY_IDS,
    DemoConfig,
    DemoSet,
    build_dense_recipe,
    draw_label_map,
    make_demo_data,
    select_annotated,
)
from mae_bench.data.demo.scenes import STUFF, THINGS, Recipe, build_rng, make_scene
from mae_bench.errors import Interrupted, UserError
from mae_bench.progress import Progress

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # pycocotools 2.0.11, numpy 2
SMALL = DemoConfig(
    imagenet=DemoSet(img_size=32, num_train=20, num_val=10),
    coco=DemoSet(img_size=64, num_train=16, num_val=4),
    ade20k=DemoSet(img_size=64, num_train=20, num_val=3),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(root, SMALL)
    return root


def contents(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


class StopAfter(Progress):
    def step(self, done, **values):
        if done == 25:
            raise Interrupted("test")


def test_interrupted_data_are_made_anew_and_are_the_same(data, tmp_path):
    with pytest.raises(Interrupted):
        make_demo_data(tmp_path / "again", SMALL, StopAfter())
    assert not (tmp_path / "again").exists()
    make_demo_data(tmp_path / "again", SMALL)
    assert contents(tmp_path / "again") == contents(data)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_a_second_call_writes_nothing(data):
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    make_demo_data(data, SMALL)
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before


def test_more_images_leave_the_first_ones_as_they_are(data, tmp_path):
    more = SMALL.model_copy(update={"imagenet": DemoSet(img_size=32, num_train=30, num_val=10)})
    make_demo_data(tmp_path / "more", more)
    ours, theirs = contents(data / "imagenet" / "train"), contents(tmp_path / "more" / "imagenet" / "train")
    assert len(theirs) == 30
    assert ours.items() <= theirs.items()


def test_another_config_is_refused(data):
    with pytest.raises(UserError, match="another config"):
        make_demo_data(data, SMALL.model_copy(update={"seed": 1}))


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something other"):
        make_demo_data(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_progress_counts_every_image(tmp_path):
    with_events = tmp_path / "events.jsonl"
    make_demo_data(tmp_path / "data", SMALL, Progress(with_events))
    last = json.loads(with_events.read_text().splitlines()[-1])
    assert (last["stage"], last["done"], last["total"]) == ("data", 73, 73)


def test_each_data_set_passes_its_check(data):
    imagenet, coco, ade20k = (check_layout(name, data / name) for name in ("imagenet", "coco", "ade20k"))
    assert imagenet.splits == {"train": 20, "val": 10}
    assert coco.splits == {"train2017": 16, "val2017": 4}
    assert ade20k.splits == {"training": 20, "validation": 3}
    assert imagenet.classes == coco.classes == THINGS
    assert ade20k.classes == STUFF + THINGS
    assert [r.name for r in (imagenet, coco, ade20k)] == ["demo-imagenet", "demo-coco", "demo-ade20k"]
    assert not coco.notes


def test_pycocotools_agrees_with_areas_and_boxes(data, capsys):
    api = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    coco = api.COCO(str(data / "coco" / "annotations" / "instances_train2017.json"))
    assert {a["iscrowd"] for a in coco.anns.values()} == {0, 1}
    assert sorted(coco.cats) == list(CATEGORY_IDS)
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        x, y, width, height = annotation["bbox"]
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (x, y, x + width, y + height)


def test_label_maps_agree_with_the_things():
    for index in range(10):
        scene = make_scene(build_rng(0, "ade20k", "training", index), Recipe(96))
        labels, told = draw_label_map(scene), select_annotated(scene)
        for thing in told:
            assert set(labels[thing.mask]) == {1 + len(STUFF) + thing.label}
        ground = ~np.any([thing.mask for thing in scene.things], axis=0)
        assert np.array_equal(labels[ground], scene.stuff[ground])
        for thing in scene.things:
            if all(thing is not other for other in told):
                assert not labels[thing.mask].any()


def test_label_maps_on_disk_are_those_of_the_scenes(data):
    scene = make_scene(build_rng(0, "ade20k", "validation", 0), build_dense_recipe(64))
    path = data / "ade20k" / "annotations" / "validation" / "DEMO_val_00000001.png"
    assert np.array_equal(np.asarray(Image.open(path)), draw_label_map(scene))
