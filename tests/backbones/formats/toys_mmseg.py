"""Files of mmsegmentation: a backbone at `backbone.` next to the heads, with meta and optimizer."""

from pathlib import Path

import torch

from tests.backbones.formats import toys_mmpretrain as mm
from tests.backbones.formats.reference import Files, fill, pair, prefixed

TORCHS = {
    "attn.in_proj_weight": (3 * mm.WIDTH, mm.WIDTH),
    "attn.in_proj_bias": (3 * mm.WIDTH,),
    **pair("attn.out_proj", mm.WIDTH, mm.WIDTH),
}
INDEX = {f"layers.{i}.attn.relative_position_index": mm.INDEX for i in range(mm.DEPTH)}


def index_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the index buffers of a real backbone; those of the toys hold numbers that nothing may use."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith("relative_position_index")
    }


def backbones() -> dict[str, dict[str, torch.Tensor]]:
    """Return backbones by the class of mmsegmentation that has these weights, and its options."""
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


def write(folder: Path) -> Files:
    heads = fill(
        {"decode_head.conv_seg.weight": (5, 8, 1, 1), "auxiliary_head.convs.0.bn.running_mean": (8,)}
    )
    for name, tensors in backbones().items():
        state = prefixed("backbone.", tensors) | heads
        content = {
            "meta": {"iter": 160000, "PALETTE": [[1, 2, 3]]},
            "state_dict": state,
            "optimizer": {"state": {}},
        }
        torch.save(content, folder / f"{name}.pth")
    torch.save(
        backbones()["vit"], folder / "converted.pth"
    )  # like mmsegmentation's converter of timm's files
    return {name: (folder / f"{name}.pth", {}) for name in (*backbones(), "converted")}
