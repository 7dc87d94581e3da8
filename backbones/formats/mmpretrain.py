"""mmpretrain: ViT, MAE, MoCo v3, MaskFeat, DeiT III and BEiT as mmpretrain, mmselfsup and mmclassification save them."""

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.open_mmlab import is_mmlab_vit, is_mmseg, parse_config, read_mmlab_vit
from backbones.translating.translation import Translation, get_embed_dim, has_moco_pos_embed

PRETRAINED = {  # beside the backbone -> by which method it was trained
    "neck.decoder_blocks.0.attn.qkv.": "mae",  # MILAN's decoder has other attention
    "target_generator.weight_x": "maskfeat",  # HOG's filters
    "head.predictor.": "moco_v3",
}
SMALL = 384  # channels: MoCo v3's ViT has 12 heads there, where everyone else's has 6; MAE and MoCo v3 share a fixed table here


def fits(checkpoint: Checkpoint) -> bool:
    """OpenMMLab's names without a mark of mmsegmentation, whose BEiT has the same ones and the same forward."""
    return is_mmlab_vit(checkpoint.tensors) and not is_mmseg(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """eps 1e-6 and the mean and std of ImageNet are the library's defaults; the config inside the file goes before them."""
    result = read_mmlab_vit(checkpoint, "mmpretrain")
    for start, method in PRETRAINED.items():
        if any(name.startswith(start) for name in checkpoint.outside):
            result.assumed["pretrain_method"] = method
    if get_embed_dim(result.weights) == SMALL and not parse_config(checkpoint.extras):
        if result.assumed["pretrain_method"] == "moco_v3":
            result.assumed["num_heads"] = family("moco_v3")["num_heads"]
        elif has_moco_pos_embed(result.weights):
            result.needed = (*result.needed, "num_heads")
    if "blocks.0.ls1.gamma" in result.weights and result.facts["options"].get("no_embed_class"):
        result.assumed["pretrain_method"] = "supervised"
        result.notes.append(
            "DeiT III: its blocks are run as they were trained; mmpretrain 1.0's own forward takes a block's first norm twice"
        )
    return result
