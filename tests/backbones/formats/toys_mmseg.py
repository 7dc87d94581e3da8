"""Files as mmsegmentation saves them: a backbone under `backbone.` beside the heads, with meta and optimizer."""

from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats import toys_mmpretrain as mm
from tests.backbones.formats.reference import fill

TORCHS = {
    "attn.in_proj_weight": (3 * mm.WIDTH, mm.WIDTH),
    "attn.in_proj_bias": (3 * mm.WIDTH,),
    **mm.pair("attn.out_proj", mm.WIDTH, mm.WIDTH),
}
INDEX = {f"layers.{i}.attn.relative_position_index": mm.INDEX for i in range(mm.DEPTH)}


def index_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a real backbone, in whose place the toys have numbers that nothing may use."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith("relative_position_index")
    }


def backbones() -> dict[str, dict[str, torch.Tensor]]:
    """By the class of mmsegmentation that has these weights, and its options."""
    beit = mm.backbone({**mm.QV, **mm.TABLE}, **mm.SCALES)
    del beit["pos_embed"]
    without_bias = mm.backbone(TORCHS)
    del without_bias["patch_embed.projection.bias"]
    return {
        "vit": mm.backbone(TORCHS, **mm.NORM),
        "vit_as_configured_by_default": without_bias,
        "mae": mm.backbone({**mm.QKV, **mm.TABLE}, **mm.SCALES) | INDEX,
        "beit": beit | INDEX,
    }


def write(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    heads = fill(
        {"decode_head.conv_seg.weight": (5, 8, 1, 1), "auxiliary_head.convs.0.bn.running_mean": (8,)}
    )
    for name, tensors in backbones().items():
        state = {f"backbone.{key}": tensor for key, tensor in tensors.items()} | heads
        content = {
            "meta": {"iter": 160000, "PALETTE": [[1, 2, 3]]},
            "state_dict": state,
            "optimizer": {"state": {}},
        }
        torch.save(content, folder / f"{name}.pth")
    torch.save(
        backbones()["vit"], folder / "converted.pth"
    )  # as mmsegmentation's own converter of timm's files leaves it
    return {name: (folder / f"{name}.pth", {}) for name in (*backbones(), "converted")}
