"""Toy files in the layout of DeiT III (facebookresearch/deit models_v2.py)."""

from pathlib import Path

import torch

from tests.backbones.formats.plain_vit import WIDTH, encoder_shapes, linear
from tests.backbones.formats.reference import Files, Shapes, fill


def shapes(*sizes: int, scales: bool = True) -> Shapes:
    """The table has no row for the class token."""
    return encoder_shapes(*sizes, rows=0, scales=("gamma_1", "gamma_2") if scales else ())


def write(folder: Path) -> Files:
    """Without layer scale (its older models of the same code) nothing marks a file."""
    for name, scales in (("deit_3_tiny", True), ("deit_tiny_36", False)):
        weights = fill(shapes(scales=scales) | linear("head", WIDTH, 10))
        torch.save({"model": weights}, folder / f"{name}.pth")
    return {
        "published": (folder / "deit_3_tiny.pth", {}),
        "unscaled": (folder / "deit_tiny_36.pth", {"format": "deit3"}),
    }
