"""A toy ImageNet and backbone for the tests of the protocols; the three classes differ in colour."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from backbones.config import CheckpointConfig
from backbones.job import run as bring
from mae_bench.config import build
from mae_bench.engine.checkpoint import DataReader
from mae_bench.export import write_export
from mae_bench.job import Job, Outcome
from mae_bench.models.vit import build_vit
from mae_bench.progress import Progress
from mae_bench.registry import kind, load_object
from mae_bench.spec import BackboneSpec

SPEC = BackboneSpec("vit", (16, 16), (8, 8), 3, embed_dim=16, depth=2, num_heads=2, pos_embed="sincos")
MODEL = {"img_size": (16, 16), "patch_size": (8, 8), "embed_dim": 16, "depth": 2, "num_heads": 2}
TRAIN = {
    "protocol": "toy",
    "epochs": 4,
    "base_lr": 1.0,
    "global_batch_size": 8,
    "crop_scale": (0.9, 1.0),
    "crop_pct": 1.0,
}
COMMON: dict[str, Any] = {"protocol": "toy", "crop_pct": 1.0, "eval_batch_size": 2}
PLAIN = {"auto_augment": None, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "drop_path": 0.0}

TRAINED = TRAIN | COMMON | {"epochs": 2, "warmup_epochs": 0.5, "base_lr": 0.3}
TUNED = TRAINED | {"mixup": 0.8, "random_erasing": 0.25, "drop_path": 0.2, "ema_decay": 0.5, "eval_epochs": 1}
GRID = {"lrs": [1.0, 100.0], "pools": ["token", "avg"], "layers": [1, 2], "holdout": 0.25}
LABELS = {"shots": [1, 3], "shares": [0.5], "score": "3shot", "draws": 2, "weight_decays": [0.01, 1.0]}
LINEAR = {"base_lr": 100.0, "epochs": 2}
# each with everything that could depend on the number of processes, on batches or on a stop
PROTOCOLS: dict[str, dict[str, Any]] = {
    "finetune": TUNED | {"kind": "finetune"},
    "supervised": TUNED | {"kind": "supervised", "model": MODEL},
    "probe": TRAINED | LINEAR | {"kind": "linear_probe", "eval_epochs": 0.7},
    "grid": TRAINED | LINEAR | GRID | {"kind": "linear_probe"},
    "cached": TRAINED | LINEAR | GRID | {"kind": "linear_probe", "features": "cached"},
    "partial": TUNED
    | {"kind": "partial_finetune", "ema_decay": None, "blocks": [0, 0.5, 2], "score": 0.5, "linear": LINEAR},
    "knn": COMMON | {"kind": "knn", "ks": [1, 5], "k": 5},
    "few_shot": COMMON | LABELS | {"kind": "few_shot"},
    "eval_only": COMMON | {"kind": "eval_only"},
}


def run_protocol(
    name: str,
    data: Path,
    folder: Path,
    backbone: str,
    progress: Progress | None = None,
    earlier: tuple[Path, ...] = (),
    **changes: Any,
) -> Outcome:
    """Run one of PROTOCOLS in `folder`, as the worker does."""
    values = {**PROTOCOLS[name], **changes, "data": str(data)}
    table = kind(values["kind"])
    outcome: Outcome = load_object(table.run)(
        build(load_object(table.config), values, "test"),
        replace(job(folder, backbone), earlier=earlier),
        progress or Progress(),
    )
    return outcome


def predictions_of(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the folder's predictions."""
    return dict(np.load(folder / "predictions.npz"))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the last training state below the folder."""
    place = sorted(folder.glob("checkpoints/step-*"))[-1]
    saved = DataReader(place).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in saved.items()
        if isinstance(each, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=DataReader(place))
    return tensors


def write_images(
    root: Path, num_train: int = 24, num_val: int = 9, signal: int = 150, num_channels: int = 0
) -> Path:
    """Write train/ and val/ with alternating classes; a class adds `signal` of 255 to its colour.

    num_channels: of .npy arrays; 0 for RGB files.
    """
    generator = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for number in range(count):
            folder = root / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 60, (16, 16, num_channels or 3), dtype=np.uint8)
            pixels[..., number % 3] += signal
            if num_channels:
                np.save(folder / f"{number}.npy", pixels)
            else:
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def write_backbone(folder: Path, spec: BackboneSpec = SPEC) -> str:
    torch.manual_seed(0)
    vit = build_vit(spec, global_pool="token" if spec.num_prefix_tokens else "avg")
    write_export(folder, vit.state_dict(), spec, {})
    return str(folder)


def write_classifier(folder: Path, spec: BackboneSpec = SPEC) -> str:
    """Write a classifier as facebookresearch/mae saves it, and convert it as a suite does."""
    torch.manual_seed(0)
    model: Any = build_vit(spec, num_classes=3, global_pool="avg")
    torch.nn.init.normal_(model.head.weight)
    torch.save({"model": model.state_dict()}, folder / "finetuned.pth")
    values: dict[str, Any] = {
        "kind": "checkpoint",
        "source": str(folder / "finetuned.pth"),
        "spec": {"num_heads": spec.num_heads},
    }
    if spec.in_chans != 3:
        values["spec"] |= {"mean": spec.mean, "std": spec.std}
    bring(build(CheckpointConfig, values, "test"), job(folder / "row"), Progress())
    return str(folder / "row")


def job(folder: Path, backbone: str = "", seed: int = 0) -> Job:
    folder.mkdir(exist_ok=True, parents=True)
    return Job("toy", "toy", {}, folder, seed, backbone)
