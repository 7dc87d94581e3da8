"""A toy ImageNet and backbone that the tests of the protocols share: three classes that a colour tells apart."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mae_bench.export import write_export
from mae_bench.job import Job
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec

SPEC = BackboneSpec("vit", (16, 16), (8, 8), 3, embed_dim=16, depth=2, num_heads=2, pos_embed="sincos")
MODEL = {"img_size": (16, 16), "patch_size": (8, 8), "embed_dim": 16, "depth": 2, "num_heads": 2}
TRAIN = {"protocol": "toy", "epochs": 4, "base_lr": 1.0, "global_batch_size": 8, "crop_scale": (0.9, 1.0), "crop_pct": 1.0}
PLAIN = {"auto_augment": None, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "drop_path": 0.0}


def write_images(root: Path, num_train: int = 24, num_val: int = 9, signal: int = 150) -> Path:
    """train/ and val/ with the classes in turn; `signal` of 255 is what a class adds to its colour."""
    generator = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for number in range(count):
            folder = root / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[..., number % 3] += signal
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def write_backbone(folder: Path, spec: BackboneSpec = SPEC) -> str:
    torch.manual_seed(0)
    vit = build_vit(spec, global_pool="token" if spec.num_prefix_tokens else "avg")
    write_export(folder, vit.state_dict(), spec, {})
    return str(folder)


def job(folder: Path, backbone: str = "", seed: int = 0) -> Job:
    folder.mkdir(exist_ok=True, parents=True)
    return Job("toy", "toy", {}, folder, seed, backbone)
