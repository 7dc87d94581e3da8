"""A tiny COCO data set, a tiny exported ViT and a tiny config for the tests of Mask R-CNN."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_bench.config import build
from mae_bench.export import write_export
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec
from tasks.coco.config import MaskRCNNConfig

CATEGORY_IDS = (3, 7)  # with gaps, as COCO's
SETTINGS: dict[str, Any] = {
    "kind": "maskrcnn",
    "protocol": "test",
    "img_size": 64,
    "scale_range": (0.7, 1.3),
    "iterations": 4,
    "global_batch_size": 2,
    "lr": 1e-3,
    "warmup_iterations": 1,
    "amp_dtype": "float32",
    "pyramid_strides": (4, 8, 16),
    "pyramid_width": 16,
    "anchor_sizes": (8, 16, 32, 64),
    "rpn_convs": 1,
    "rpn_batch_size": 16,
    "pre_nms_topk": (50, 50),
    "post_nms_topk": (20, 20),
    "roi_batch_size": 16,
    "box_conv_dims": (),
    "box_fc_dims": (16,),
    "mask_conv_dims": (16,),
    "score_threshold": 0.0,
    "detections_per_image": 10,
    "eval_batch_size": 2,
}


def _write_image(
    folder: Path, number: int, rng: np.random.Generator
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
    annotations = []
    for place, category in enumerate(CATEGORY_IDS):
        x, y, side = 4 + 22 * place, int(rng.integers(3, 18)), 16
        pixels[y : y + side, x : x + side] = (230, 40, 40) if place else (40, 40, 230)
        polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        annotations.append(
            {
                "id": 10 * number + place,
                "image_id": number,
                "category_id": category,
                "iscrowd": 0,
                "area": float(side**2),
                "bbox": [x, y, side, side],
                "segmentation": [polygon],
            }
        )
    name = f"{number:012d}.png"
    Image.fromarray(pixels).save(folder / name)
    return {"id": number, "file_name": name, "height": 40, "width": 48}, annotations


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """6 training and 3 validation images of 48 x 40 pixels with two objects each, category ids 3 and 7."""
    root, rng = tmp_path / "coco", np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, numbers in (("train2017", range(1, 7)), ("val2017", range(11, 14))):
        (root / split).mkdir()
        images, annotations = [], []
        for number in numbers:
            image, objects = _write_image(root / split, number, rng)
            images.append(image)
            annotations += objects
        content = {
            "info": {},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": f"class{number}"} for number in CATEGORY_IDS],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """An exported random ViT: patch 8, width 24, depth 2."""
    spec = BackboneSpec(
        arch="vit", img_size=(32, 32), patch_size=(8, 8), in_chans=3, embed_dim=24, depth=2, num_heads=2
    )
    write_export(tmp_path / "backbone", build_vit(spec).state_dict(), spec, {})
    return str(tmp_path / "backbone")


@pytest.fixture
def make_config(coco: Path) -> Callable[..., MaskRCNNConfig]:
    """A function that returns a config of 4 iterations of 2 images of 64 x 64 pixels, with overrides."""

    def make(**overrides: Any) -> MaskRCNNConfig:
        return build(MaskRCNNConfig, SETTINGS | {"data": str(coco)} | overrides, "test")

    return make
