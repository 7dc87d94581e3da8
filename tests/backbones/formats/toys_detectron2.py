"""Files as detectron2 saves a ViTDet detector: the ViT under `model`, below `backbone.net.`, beside pyramid and heads."""

from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.reference import fill

WIDTH, HEADS, PATCH, WINDOW, GRID, TRAINED = 192, 3, 8, 2, 6, 4


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def shapes(sides: list[int], rows: int, width: int, heads: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Of detectron2's ViT. sides: of what each block attends to. rows: of the absolute table."""
    found: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, rows, width),
        **pair("patch_embed.proj", width, 3, patch, patch),
    }
    for i, side in enumerate(sides):
        found |= {
            **pair(f"blocks.{i}.norm1", width), **pair(f"blocks.{i}.attn.qkv", 3 * width, width),
            **pair(f"blocks.{i}.attn.proj", width, width), **pair(f"blocks.{i}.norm2", width),
            **pair(f"blocks.{i}.mlp.fc1", 4 * width, width), **pair(f"blocks.{i}.mlp.fc2", width, 4 * width),
            **{f"blocks.{i}.attn.rel_pos_{axis}": (2 * side - 1, width // heads) for axis in "hw"},
        }  # fmt: skip
    return found


def vit(sides: list[int], rows: int = TRAINED * TRAINED + 1) -> dict[str, torch.Tensor]:
    """Weights, halved so that tokens stay near 1 where no norm ends the backbone."""
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


def write(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    others = fill({
        "backbone.simfp_2.0.weight": (WIDTH, 8, 2, 2), **pair("proposal_generator.rpn_head.conv", 8, 8, 3, 3),
        **pair("roi_heads.box_predictor.cls_score", 81, 16),
    })  # fmt: skip
    for name, tensors in VITS.items():
        state = {f"backbone.net.{key}": tensor for key, tensor in tensors.items()} | others
        torch.save({"model": state, "optimizer": {"state": {}}, "iteration": 89999}, folder / f"{name}.pth")
    torch.save(VITS["windows"], folder / "bare.pth")
    return {name: (folder / f"{name}.pth", GIVEN.get(name, {})) for name in (*VITS, "bare")}
