"""Toy files in the layout of solo-learn's Lightning modules (solo/methods, solo/utils/checkpointer.py)."""

from pathlib import Path

import torch

from tests.backbones.formats.plain_vit import PATCH, SIZE, WIDTH, encoder_shapes, linear, mlp_head, sincos
from tests.backbones.formats.reference import Files, fill, prefixed


def weights(method: str, seed: int = 0) -> dict[str, torch.Tensor]:
    vit = fill(encoder_shapes(), seed)
    if method in ("mae", "mocov3"):
        vit["pos_embed"] = sincos(WIDTH, SIZE // PATCH, down_first=method == "mocov3", class_row=True)
    return vit


def state(method: str) -> dict[str, torch.Tensor]:
    """Every method trains a linear classifier along; all but MAE here have a momentum backbone."""
    online = prefixed("backbone.", weights(method)) | fill(linear("classifier", WIDTH, 10))
    if method == "mae":
        return online | fill({"decoder.mask_token": (1, 1, 16), **linear("decoder.decoder_embed", WIDTH, 16)})
    online |= prefixed("momentum_backbone.", weights(method, 1)) | fill(
        linear("momentum_classifier", WIDTH, 10)
    )
    if method == "dino":
        head = mlp_head("last_layer")
        return (
            online
            | prefixed("head.", head)
            | prefixed("momentum_head.", head)
            | {"dino_loss_func.center": torch.zeros(1, 24)}
        )
    return online | fill(
        {
            "projector.0.weight": (16, WIDTH),
            "momentum_projector.0.weight": (16, WIDTH),
            "predictor.0.weight": (8, 16),
        }
    )


def write(folder: Path) -> Files:
    rest = {
        "epoch": 399,
        "global_step": 1000,
        "pytorch-lightning_version": "2.1.2",
        "loops": {},
        "optimizer_states": [],
    }
    for method in ("mae", "mocov3", "dino"):
        torch.save({"state_dict": state(method), **rest}, folder / f"{method}.ckpt")
    first_version = prefixed("encoder.", weights("simclr")) | fill(linear("classifier", WIDTH, 10))
    torch.save({"state_dict": first_version, **rest}, folder / "simclr.ckpt")
    return {
        "mae": (folder / "mae.ckpt", {}),
        "mocov3": (folder / "mocov3.ckpt", {"weights": "backbone"}),
        "dino": (folder / "dino.ckpt", {"weights": "momentum_backbone"}),
        "first-version": (folder / "simclr.ckpt", {}),
    }
