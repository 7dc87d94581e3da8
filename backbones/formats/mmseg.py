"""mmseg: mmsegmentation's VisionTransformer, MAE and BEiT backbones; a plain ViT is written for its VisionTransformer."""

from pathlib import Path
from typing import Any

import torch

from backbones.reading.source import SPEC_KEY, Checkpoint
from backbones.translating.open_mmlab import VIT, is_mmlab_vit, is_mmseg, read_mmlab_vit
from backbones.translating.translation import Translation, not_expressible
from mae_bench.errors import UserError
from mae_bench.files import write_atomic
from mae_bench.spec import BackboneSpec

CONFIG = {"final_norm", "pre_norm", "qkv_bias"}  # options of a spec that a config of mmsegmentation can state


def fits(checkpoint: Checkpoint) -> bool:
    """OpenMMLab's names with torch's own attention, or with a segmentation head beside the backbone."""
    return is_mmlab_vit(checkpoint.tensors) and is_mmseg(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """A backbone without final norm stays without one: the heads take its maps as they are."""
    return read_mmlab_vit(checkpoint, "mmseg")


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """`{"state_dict": ...}` with bare names, for `backbone=dict(type="VisionTransformer", patch_bias=True, final_norm=True,
    init_cfg=dict(type="Pretrained", checkpoint=out))`."""
    odd = {
        name
        for name, value in spec.options.items()
        if name not in CONFIG and (name, value) != ("act_layer", "gelu")
    }
    if spec.arch != "vit" or odd or spec.num_prefix_tokens != 1 or "pos_embed" not in weights:
        raise not_expressible(spec, "mmseg", "a plain ViT with one class token and a position table")
    if "fc_norm.weight" in weights:
        raise UserError(
            "this backbone's last norm stands behind the average pooling (fc_norm); mmsegmentation's ViT has no place for it"
        )
    if len(set(spec.patch_size)) > 1 or not float(spec.mlp_ratio).is_integer():
        raise UserError(
            f"patches {spec.patch_size}, mlp_ratio {spec.mlp_ratio}",
            expected="square patches, a whole mlp_ratio",
        )
    content = {"state_dict": VIT.write(weights), SPEC_KEY: spec.to_dict(), "provenance": provenance}
    write_atomic(out, lambda file: torch.save(content, file))
