"""A toy export folder, written by hand: safetensors and a backbone.json with spec and digest."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import save_file

from tests.backbones.formats.reference import Files
from tests.backbones.formats.toys_official_mae import models

SPEC = {
    "arch": "vit",
    "img_size": [32, 32],
    "patch_size": [8, 8],
    "in_chans": 3,
    "embed_dim": 192,
    "depth": 2,
    "num_heads": 4,
    "pos_embed": "sincos",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "pretrain_method": "mae",
    "pretrain_data": "toys",
}


def write(folder: Path) -> Files:
    """Write an export; the folder, its parent and the weight file are sources."""
    export = folder / "export"
    export.mkdir()
    weights = export / "backbone.safetensors"
    save_file(models()["encoder"], weights)
    described = {"spec": SPEC, "provenance": {}, "digest": hashlib.sha256(weights.read_bytes()).hexdigest()}
    (export / "backbone.json").write_text(json.dumps(described))
    return {"folder": (export, {}), "cell": (folder, {}), "file": (weights, {})}
