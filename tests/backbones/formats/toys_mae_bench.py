"""A toy export folder of ours, written by hand: safetensors beside a backbone.json with spec and digest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.backbones.formats.toys_official_mae import models

SPEC = {
    "arch": "vit", "img_size": [32, 32], "patch_size": [8, 8], "in_chans": 3, "embed_dim": 192, "depth": 2, "num_heads": 4,
    "pos_embed": "sincos", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "pretrain_method": "mae", "pretrain_data": "toys",
}  # fmt: skip


def write(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The path is the folder; the weight file in it is a source as well."""
    export = folder / "export"
    export.mkdir()
    weights = export / "backbone.safetensors"
    save_file(models()["encoder"], weights)
    described = {"spec": SPEC, "provenance": {}, "digest": hashlib.sha256(weights.read_bytes()).hexdigest()}
    (export / "backbone.json").write_text(json.dumps(described))
    return {"folder": (export, {}), "cell": (folder, {}), "file": (weights, {})}
