"""Every ImageNet protocol on arrays of four channels, and of three."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_bench.data.sets.open import open_images
from mae_bench.errors import UserError
from tasks.imagenet.config import EvalOnlyConfig
from tasks.imagenet.crops import build_eval_crop
from tests.tasks.imagenet.toy import (
    COMMON,
    MODEL,
    PROTOCOLS,
    SPEC,
    predictions_of,
    run_protocol,
    write_backbone,
    write_classifier,
    write_images,
)

STATISTICS: dict[str, Any] = {"mean": (0.5,) * 4, "std": (0.25,) * 4}
FOUR = replace(SPEC, in_chans=4, **STATISTICS)
CHANCE = 100 / 3
CHANGES: dict[str, dict[str, Any]] = {"supervised": {"model": MODEL | {"in_chans": 4} | STATISTICS}}


def augment_off(name: str) -> dict[str, Any]:
    """Return the change without which the protocols that train the backbone refuse arrays."""
    return {"auto_augment": None} if name in ("finetune", "supervised", "partial") else {}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_runs_on_arrays_of_four_channels(name: str, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", num_channels=4)
    source = {
        "eval_only": lambda: write_classifier(tmp_path, FOUR),
        "supervised": lambda: "",
    }.get(name, lambda: write_backbone(tmp_path / "backbone", FOUR))()
    changes: dict[str, Any] = CHANGES.get(name, {}) | augment_off(name)
    outcome = run_protocol(name, data, tmp_path / "cell", source, **changes)
    assert outcome.backbone_spec["in_chans"] == 4
    assert not [note for note in outcome.notes if "did not decode" in note]
    if name == "knn":
        assert outcome.metrics["top1"].value > CHANCE


def test_arrays_of_three_channels_score_as_the_same_images_in_files(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    for name, channels in (("files", 0), ("arrays", 3)):
        data = write_images(tmp_path / name, num_channels=channels)
        run_protocol("knn", data, tmp_path / f"{name}-cell", backbone)
    files, arrays = (predictions_of(tmp_path / f"{name}-cell") for name in ("files", "arrays"))
    assert all(np.array_equal(files[key], arrays[key]) for key in files)


@pytest.mark.parametrize(("img_size", "crop_pct"), [((16, 16), 0.875), ((12, 20), 0.7), ((24, 24), 1.0)])
def test_the_centre_crop_of_arrays_is_that_of_files(
    tmp_path: Path, img_size: tuple[int, int], crop_pct: float
) -> None:
    spec = replace(SPEC, img_size=img_size, patch_size=(4, 4))
    config = EvalOnlyConfig(kind="eval_only", data="", **COMMON | {"crop_pct": crop_pct})
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    files = open_images(write_images(tmp_path / "files"), "val")
    arrays = open_images(write_images(tmp_path / "arrays", num_channels=3), "val")
    want = build_eval_crop(config, spec, files)(Image.fromarray(pixels))  # type: ignore[call-arg, arg-type]
    found = build_eval_crop(config, spec, arrays)(pixels, 0)  # type: ignore[call-arg, arg-type]
    assert torch.equal(found, want)


def test_randaugment_on_arrays_is_refused(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", num_channels=4)
    backbone = write_backbone(tmp_path / "backbone", FOUR)
    with pytest.raises(UserError, match="auto_augment=rand") as error:
        run_protocol("finetune", data, tmp_path / "cell", backbone)
    assert error.value.fix == "set tasks.NAME.auto_augment=null"
