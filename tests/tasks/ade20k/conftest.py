"""A tiny data set in ADE20K's layout and a tiny exported backbone."""

import numpy as np
import pytest
import torch
from PIL import Image

from mae_bench.export import write_export
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec

CLASSES = ("sky", "grass", "ball")
SPLITS = {"training": 6, "validation": 3}


@pytest.fixture
def ade20k(tmp_path):
    """Sky over grass with a ball, 44x40; label 0 (unlabelled) is a frame of two pixels."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for split, count in SPLITS.items():
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            label = np.zeros((40, 44), np.uint8)
            label[2:-2, 2:-2] = 2
            label[2 : 10 + 3 * i, 2:-2] = 1
            label[20:30, 10 + i : 22 + i] = 3
            image = np.array([[0, 0, 0], [90, 140, 250], [60, 160, 60], [220, 40, 40]])[label] + rng.integers(
                -9, 9, (40, 44, 3)
            )
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(label).save(root / "annotations" / split / f"{i}.png")
    (root / "objectInfo.txt").write_text(
        "Idx\tName\n" + "".join(f"{i}\t{name}\n" for i, name in enumerate(CLASSES, 1))
    )
    return root


@pytest.fixture
def backbone(tmp_path):
    spec = BackboneSpec("vit", (32, 32), (8, 8), 3, embed_dim=16, depth=4, num_heads=2, pos_embed="sincos")
    torch.manual_seed(0)
    write_export(tmp_path / "export", build_vit(spec).state_dict(), spec, {})
    return str(tmp_path / "export")
