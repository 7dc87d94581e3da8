"""mmseg: mmsegmentation's VisionTransformer, MAE and BEiT; writes a plain ViT for its VisionTransformer."""

from pathlib import Path
from typing import Any

import torch

from backbones.reading.source import PROVENANCE_KEY, SPEC_KEY, Checkpoint
from backbones.translating.open_mmlab import VIT, is_mmlab_vit, is_mmseg, read_mmlab_vit
from backbones.translating.translation import Translation, not_expressible
from mae_bench.errors import UserError
from mae_bench.files import write_atomic
from mae_bench.spec import BackboneSpec

CONFIG = {"final_norm", "pre_norm", "qkv_bias"}  # options of a spec that a config of mmsegmentation can state


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has OpenMMLab's names, and torch's attention module or a segmentation head."""
    return is_mmlab_vit(checkpoint.tensors) and is_mmseg(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate an mmsegmentation ViT; one without a final norm stays without, as its heads expect."""
    return read_mmlab_vit(checkpoint, "mmseg")


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write `{"state_dict": ...}` with bare names.

    It loads into `backbone=dict(type="VisionTransformer", patch_bias=True, final_norm=True,
    init_cfg=dict(type="Pretrained", checkpoint=out))`.
    """
    options = {name: value for name, value in spec.options.items() if name not in CONFIG}
    is_plain = spec.num_prefix_tokens == 1 and "pos_embed" in weights
    if spec.arch != "vit" or not is_plain or options not in ({}, {"act_layer": "gelu"}):
        raise not_expressible(spec, "mmseg", "a plain ViT with one class token and a position embedding")
    if "fc_norm.weight" in weights:
        raise UserError(
            "this backbone's final norm comes after the average pooling (fc_norm), "
            "which mmsegmentation's ViT cannot store",
            fix="write it as mae_bench, timm or official_mae",
        )
    if len(set(spec.patch_size)) > 1 or not float(spec.mlp_ratio).is_integer():
        raise UserError(
            f"patches {spec.patch_size}, mlp_ratio {spec.mlp_ratio}",
            expected="square patches, a whole mlp_ratio",
        )
    content = {"state_dict": VIT.write(weights), SPEC_KEY: spec.to_dict(), PROVENANCE_KEY: provenance}
    write_atomic(out, lambda file: torch.save(content, file))
