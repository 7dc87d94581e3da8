"""Toy files of Segment Anything: whole models and bare encoders, in its repository's names and in timm's."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.backbones.formats.reference import Files, Shapes, fill, pair, prefixed


def encoder(
    width: int,
    depth: int,
    heads: int,
    grid: tuple[int, int],
    window: int,
    global_blocks: tuple[int, ...],
    neck: int = 16,
) -> Shapes:
    """Return the shapes of `ImageEncoderViT` in segment_anything/modeling/image_encoder.py."""
    shapes: Shapes = {
        "pos_embed": (1, *grid, width),
        **pair("patch_embed.proj", width, 3, 16, 16),
        "neck.0.weight": (neck, width, 1, 1),
        **pair("neck.1", neck),
        "neck.2.weight": (neck, neck, 3, 3),
        **pair("neck.3", neck),
    }
    for i in range(depth):
        grid_h, grid_w = grid if i in global_blocks else (window, window)
        block: Shapes = {
            **pair("norm1", width),
            **pair("norm2", width),
            "attn.rel_pos_h": (2 * grid_h - 1, width // heads),
            "attn.rel_pos_w": (2 * grid_w - 1, width // heads),
            **pair("attn.qkv", 3 * width, width),
            **pair("attn.proj", width, width),
            **pair("mlp.lin1", 4 * width, width),
            **pair("mlp.lin2", width, 4 * width),
        }
        shapes |= prefixed(f"blocks.{i}.", block)
    return shapes


REST: Shapes = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 8),
    "prompt_encoder.not_a_point_embed.weight": (1, 16),
    "mask_decoder.iou_token.weight": (1, 16),
    "mask_decoder.transformer.layers.0.norm1.weight": (16,),
}
SQUARE = encoder(48, 4, 4, (5, 5), 3, (1, 3))
WIDE = encoder(48, 2, 4, (4, 6), 3, (1,))
ALL_GLOBAL = encoder(48, 4, 4, (3, 3), 3, (0, 2))


def whole(shapes: Shapes) -> dict[str, torch.Tensor]:
    return prefixed("image_encoder.", fill(shapes)) | fill(REST)


def write(folder: Path) -> Files:
    torch.save(whole(SQUARE), folder / "sam.pth")
    torch.save({"model": prefixed("module.", whole(WIDE)), "epoch": 1}, folder / "training.pth")
    save_file(fill(ALL_GLOBAL), folder / "encoder.safetensors")
    timm = {name.replace("mlp.lin", "mlp.fc"): tensor for name, tensor in fill(SQUARE).items()}
    save_file(timm, folder / "timm.safetensors")
    files = ("sam.pth", "training.pth", "encoder.safetensors", "timm.safetensors")
    return {name: (folder / name, {}) for name in files}
