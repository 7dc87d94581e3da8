"""Every COCO variant that the check accepts trains, and a perfect detector scores the stated ceiling."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is optional: make setup")

from detectron2.structures import Boxes, Instances  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from torch import nn  # noqa: E402

from mae_bench.data.checks.layouts import check_layout  # noqa: E402
from mae_bench.data.sets.source import BadImages  # noqa: E402
from mae_bench.progress import Progress  # noqa: E402
from tasks.coco.ceiling import load_or_compute_ceiling  # noqa: E402
from tasks.coco.config import MaskRCNNConfig  # noqa: E402
from tasks.coco.data import (  # noqa: E402
    CocoNames,
    build_train_loader,
    build_val_loader,
    find_unreadable,
    get_annotations,
    register,
)
from tasks.coco.evaluation import evaluate  # noqa: E402
from tests.mae_bench.data.checks.coco_corpus import ACCEPTED, Variant, write  # noqa: E402

pytestmark = pytest.mark.framework

NUCLEI = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "coco_nuclei"

MakeConfig = Callable[..., MaskRCNNConfig]


class PerfectDetector(nn.Module):
    """Return the objects of an annotation file, as the user wrote it, as detections of a detectron2 model.

    Polygons of fewer than 3 points have no area, and pycocotools fails on some.
    """

    def __init__(self, annotations: Path):
        super().__init__()
        self.truth = COCO()
        self.truth.dataset = json.loads(annotations.read_text(encoding="utf-8-sig"))
        for item in self.truth.dataset["annotations"]:
            if isinstance(item["segmentation"], list):
                item["segmentation"] = [part for part in item["segmentation"] if len(part) > 5]
        self.truth.createIndex()
        self.labels = {number: label for label, number in enumerate(sorted(self.truth.cats))}

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        return [{"instances": self._detect(sample["image_id"])} for sample in batch]

    def _detect(self, image_id: int) -> Instances:
        image = self.truth.imgs[image_id]
        size = image["height"], image["width"]
        found = [item for item in self.truth.imgToAnns[image_id] if not item.get("iscrowd")]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in found)]
        masks = torch.zeros(len(found), *size, dtype=torch.bool)
        for mask, item in zip(masks, found, strict=True):
            mask[:] = torch.from_numpy(self.truth.annToMask(item))
        return Instances(
            size,
            pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
            scores=torch.full((len(found),), 0.9),
            pred_classes=torch.tensor([self.labels[item["category_id"]] for item in found]),
            pred_masks=masks,
        )


def prepare(root: Path, folder: Path) -> CocoNames:
    """Return the registered names of a data set, as the task registers it."""
    return register(root, check_layout("coco", root).digest, folder)


@pytest.mark.parametrize("variant", ACCEPTED, ids=lambda variant: variant.name)
def test_a_perfect_detector_scores_the_ceiling(
    variant: Variant, make_config: MakeConfig, tmp_path: Path
) -> None:
    root = write(tmp_path / "set", variant)
    names = prepare(root, tmp_path / "job")
    stated = load_or_compute_ceiling(get_annotations(names.val))
    assert tuple(stated.scores.values()) == pytest.approx(variant.ceiling)
    assert bool(stated.reasons) == stated.is_lowered == (min(variant.ceiling) < 100)

    bad = BadImages(0, 2)
    find_unreadable(names.val, bad)
    detector = PerfectDetector(root / "annotations" / "instances_val2017.json")
    loader = build_val_loader(make_config(), names.val, bad)
    metrics, _ = evaluate(detector, loader, names.val, tmp_path / "detections", Progress())
    scores = {name: metrics[name].value for name in stated.scores}
    assert scores == pytest.approx(stated.scores)


@pytest.mark.parametrize("variant", ACCEPTED, ids=lambda variant: variant.name)
def test_training_reads_every_image(variant: Variant, make_config: MakeConfig, tmp_path: Path) -> None:
    names = prepare(write(tmp_path / "set", variant), tmp_path / "job")
    bad = BadImages(0, 2)
    batches = iter(build_train_loader(make_config(), names.train, bad, seed=0, start=0))
    for _ in range(3):
        for sample in next(batches):
            objects = sample["instances"]
            targets = objects.gt_masks.crop_and_resize(objects.gt_boxes.tensor, 14)  # as the mask head's loss
            assert targets.shape == (len(objects), 14, 14)
            assert torch.isfinite(objects.gt_boxes.tensor).all()
    assert bad.count == 0


def test_a_repaired_copy_is_written_only_where_it_is_needed(tmp_path: Path) -> None:
    variants = {variant.name: variant for variant in ACCEPTED}
    sound = write(tmp_path / "sound", variants["as it is"])
    path = sound / "annotations" / "instances_val2017.json"
    assert get_annotations(prepare(sound, tmp_path / "job").val) == path
    assert not (tmp_path / "job").exists()
    root = write(tmp_path / "set", variants["no iscrowd, id 0"])
    before = (root / "annotations" / "instances_val2017.json").read_bytes()
    copy = get_annotations(prepare(root, tmp_path / "job").val)
    assert copy == tmp_path / "job" / "instances_val2017.json"
    repaired = json.loads(copy.read_text())["annotations"]
    assert [item["id"] for item in repaired] == [6, 1, 2, 3, 4, 5]
    assert {item["iscrowd"] for item in repaired} == {0}
    assert (root / "annotations" / "instances_val2017.json").read_bytes() == before


def test_a_missing_area_is_that_of_the_mask(tmp_path: Path) -> None:
    variants = {variant.name: variant for variant in ACCEPTED}
    copy = get_annotations(prepare(write(tmp_path / "set", variants["no area"]), tmp_path / "job").train)
    assert [item["area"] for item in json.loads(copy.read_text())["annotations"]] == [144.0] * 6


def test_the_nuclei_have_more_objects_than_are_counted(tmp_path: Path) -> None:
    if not NUCLEI.is_dir():
        pytest.skip("the image pack coco_nuclei is not beside the checkout")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").symlink_to(NUCLEI / split)
        shutil.copy(
            NUCLEI / "annotations" / f"instances_{split}.json",
            tmp_path / "annotations" / f"instances_{split}2017.json",
        )
    check_layout("coco", tmp_path)
    ceiling = load_or_compute_ceiling(tmp_path / "annotations" / "instances_val2017.json")
    assert ceiling.describe("val2017") == (
        "val2017: a perfect detector scores 99.01 AP_box, 99.01 AP_mask (images with more than 100 "
        "objects of a category, of which COCO's AP counts 100: 2)"
    )
