"""Files of detectron2's ViTDet: the ViT at `backbone.net.` under `model`, next to pyramid and heads."""

from pathlib import Path

import torch

from tests.backbones.formats.plain_vit import block_shapes
from tests.backbones.formats.reference import Files, Shapes, fill, pair, prefixed

WIDTH, HEADS, PATCH, WINDOW, GRID, TRAINED = 192, 3, 8, 2, 6, 4


def shapes(sides: list[int], rows: int, width: int, heads: int, patch: int) -> Shapes:
    """Return the shapes of detectron2's ViT. sides: of the blocks' windows. rows: of the absolute table."""
    found: Shapes = {"pos_embed": (1, rows, width), **pair("patch_embed.proj", width, 3, patch, patch)}
    for i, side in enumerate(sides):
        found |= {
            **prefixed(f"blocks.{i}.", block_shapes(width)),
            **{f"blocks.{i}.attn.rel_pos_{axis}": (2 * side - 1, width // heads) for axis in "hw"},
        }
    return found


def vit(sides: list[int], rows: int = TRAINED * TRAINED + 1) -> dict[str, torch.Tensor]:
    """Return weights, halved so that tokens stay near 1 without a final norm."""
    tensors = fill(shapes(sides, rows, WIDTH, HEADS, PATCH))
    return {name: tensor / 2 if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}


VITS = {
    "windows": vit([WINDOW, GRID]),
    "global": vit([GRID, GRID]),
    "square_table": vit([WINDOW, GRID], rows=GRID * GRID),
    "no_relative_tables": {
        name: tensor for name, tensor in vit([GRID, GRID]).items() if "rel_pos" not in name
    },
}
GIVEN = {
    "no_relative_tables": {"overrides": {"options": {"window_size": WINDOW, "global_attn_indexes": [1]}}}
}


def write(folder: Path) -> Files:
    detector: Shapes = {
        "backbone.simfp_2.0.weight": (WIDTH, 8, 2, 2),
        **pair("proposal_generator.rpn_head.conv", 8, 8, 3, 3),
        **pair("roi_heads.box_predictor.cls_score", 81, 16),
    }
    others = fill(detector)
    for name, tensors in VITS.items():
        state = prefixed("backbone.net.", tensors) | others
        torch.save({"model": state, "optimizer": {"state": {}}, "iteration": 89999}, folder / f"{name}.pth")
    torch.save(VITS["windows"], folder / "bare.pth")
    return {name: (folder / f"{name}.pth", GIVEN.get(name, {})) for name in (*VITS, "bare")}
