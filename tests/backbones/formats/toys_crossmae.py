"""Toy files in the layout of TonyLianLong/CrossMAE (models_cross.py, util/misc.py)."""

import argparse
from pathlib import Path

import torch

from tests.backbones.formats.plain_vit import DEPTH, PATCH, SIZE, WIDTH, encoder_shapes, linear, norm, sincos
from tests.backbones.formats.reference import Files, Shapes, fill

DECODER = 16  # width


def weights() -> dict[str, torch.Tensor]:
    """Return the encoder, which has no final norm."""
    encoder = {name: t for name, t in fill(encoder_shapes()).items() if not name.startswith("norm.")}
    return {**encoder, "pos_embed": sincos(WIDTH, SIZE // PATCH, down_first=False, class_row=True)}


def decoder() -> dict[str, torch.Tensor]:
    """Return a decoder of one layer that attends to a weighted sum of the input and of all blocks."""
    block = linear("cross_attn.q", DECODER, DECODER) | linear("cross_attn.kv", WIDTH, 2 * DECODER)
    block |= linear("cross_attn.proj", DECODER, DECODER) | norm("norm1", DECODER) | norm("norm2", DECODER)
    block |= linear("mlp.fc1", DECODER, 4 * DECODER) | linear("mlp.fc2", 4 * DECODER, DECODER)
    shapes: Shapes = {f"decoder_blocks.0.{name}": shape for name, shape in block.items()}
    shapes |= {"mask_token": (1, 1, DECODER), "decoder_pos_embed": (1, 17, DECODER)}
    shapes |= {"wfm.linear.weight": (1, DEPTH + 1)} | norm("dec_norms.0", WIDTH)
    shapes |= norm("decoder_norm", DECODER) | linear("decoder_pred", DECODER, PATCH * PATCH * 3)
    return fill(shapes, 1)


def write(folder: Path) -> Files:
    args = argparse.Namespace(blr=1.5e-4, model="mae_vit_toy", weight_fm=True, use_input=True)
    content = {"model": weights() | decoder(), "optimizer": {"state": {}}, "epoch": 7, "args": args}
    torch.save(content, folder / "checkpoint-7.pth")
    torch.save({"model": content["model"]}, folder / "released.pth")
    return {name: (folder / f"{name}.pth", {}) for name in ("checkpoint-7", "released")}
