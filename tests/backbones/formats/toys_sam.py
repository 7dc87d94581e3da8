"""Toy files of Segment Anything: whole models and encoders alone, in the names of its repository and of timm."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.backbones.formats.reference import fill

Shapes = dict[str, tuple[int, ...]]


def encoder(
    width: int,
    depth: int,
    heads: int,
    grid: tuple[int, int],
    window: int,
    seeing_all: tuple[int, ...],
    neck: int = 16,
) -> Shapes:
    """Names and shapes of `ImageEncoderViT` in segment_anything/modeling/image_encoder.py."""
    shapes: Shapes = {
        "pos_embed": (1, *grid, width), "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
        "neck.0.weight": (neck, width, 1, 1), "neck.1.weight": (neck,), "neck.1.bias": (neck,),
        "neck.2.weight": (neck, neck, 3, 3), "neck.3.weight": (neck,), "neck.3.bias": (neck,),
    }  # fmt: skip
    for i in range(depth):
        down, across = grid if i in seeing_all else (window, window)
        block: Shapes = {
            "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
            "attn.rel_pos_h": (2 * down - 1, width // heads), "attn.rel_pos_w": (2 * across - 1, width // heads),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "mlp.lin1.weight": (4 * width, width), "mlp.lin1.bias": (4 * width,),
            "mlp.lin2.weight": (width, 4 * width), "mlp.lin2.bias": (width,),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


REST: Shapes = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 8), "prompt_encoder.not_a_point_embed.weight": (1, 16),
    "mask_decoder.iou_token.weight": (1, 16), "mask_decoder.transformer.layers.0.norm1.weight": (16,),
}  # fmt: skip
SQUARE = encoder(48, 4, 4, (5, 5), 3, (1, 3))
WIDE = encoder(48, 2, 4, (4, 6), 3, (1,))
ALL_SEE_ALL = encoder(48, 4, 4, (3, 3), 3, (0, 2))


def whole(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {f"image_encoder.{name}": tensor for name, tensor in fill(shapes).items()} | fill(REST)


def write(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    torch.save(whole(SQUARE), folder / "sam.pth")
    torch.save(
        {"model": {f"module.{name}": tensor for name, tensor in whole(WIDE).items()}, "epoch": 1},
        folder / "training.pth",
    )
    save_file(fill(ALL_SEE_ALL), folder / "encoder.safetensors")
    timm = {name.replace("mlp.lin", "mlp.fc"): tensor for name, tensor in fill(SQUARE).items()}
    save_file(timm, folder / "timm.safetensors")
    files = ("sam.pth", "training.pth", "encoder.safetensors", "timm.safetensors")
    return {name: (folder / name, {}) for name in files}
