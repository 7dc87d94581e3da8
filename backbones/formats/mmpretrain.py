"""mmpretrain: ViT, MAE, MoCo v3, MaskFeat, DeiT III and BEiT of mmpretrain, mmselfsup, mmclassification."""

from backbones.reading.source import Checkpoint
from backbones.translating.open_mmlab import is_mmlab_vit, is_mmseg, read_mmlab_vit
from backbones.translating.translation import Translation, has_moco_pos_embed

METHODS = {  # prefix of keys outside the backbone -> pretraining method
    "neck.decoder_blocks.0.attn.qkv.": "mae",  # MILAN's decoder has other attention
    "target_generator.weight_x": "maskfeat",  # HOG's filters
    "head.predictor.": "moco_v3",
}
# Entries of `SIZES`: MAE and MoCo v3 share a fixed table here, and disagree on the heads of 384 channels.
MOCO_V3, FIXED = "mmpretrain, MoCo v3", "mmpretrain, fixed positions"


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has OpenMMLab's names without mmsegmentation's mark.

    mmsegmentation's BEiT has the same names and the same forward.
    """
    return is_mmlab_vit(checkpoint.tensors) and not is_mmseg(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate an mmpretrain ViT.

    The library's defaults are eps 1e-6 and ImageNet's mean and std; the config in the file takes precedence.
    """
    result = read_mmlab_vit(checkpoint, "mmpretrain")
    for start, method in METHODS.items():
        if any(name.startswith(start) for name in checkpoint.outside):
            result.assumed["pretrain_method"] = method
    if result.assumed["pretrain_method"] == "moco_v3":
        result.family = MOCO_V3
    elif has_moco_pos_embed(result.weights):
        result.family = FIXED
    if "blocks.0.ls1.gamma" in result.weights and result.facts["options"].get("no_embed_class"):
        result.assumed["pretrain_method"] = "supervised"
        result.notes.append(
            "DeiT III: blocks run as they were trained; "
            "mmpretrain 1.0's own forward applies a block's first norm twice"
        )
    return result
