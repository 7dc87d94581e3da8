"""Number of attention heads: what the file states, and what a family's own code builds for a size.

No tensor of a plain ViT shows the number of heads, and several code bases build one width with different
numbers: 192 channels have 3 heads in DeiT and 12 in MAE-Lite, 384 have 6 in DINO and 12 in MoCo v3. A width
is therefore never evidence; a size (width, depth, MLP width) is, within a family whose code builds it with
exactly one number of heads.
"""

from collections.abc import Mapping
from typing import Any

import torch

from backbones.reading.source import Checkpoint
from backbones.translating.arguments import as_mapping, find_values
from backbones.translating.structure import count_blocks
from backbones.translating.translation import FILE, Translation

Size = tuple[int, int, int]  # width, depth, MLP width (input of its second layer)
TI, S, B = (192, 12, 768), (384, 12, 1536), (768, 12, 3072)
L, H = (1024, 24, 4096), (1280, 32, 5120)
GIANT, GIGANTIC, SO400M = (1408, 40, 6144), (1664, 48, 8192), (1152, 27, 4304)
BASE_AND_LARGER = {B: 12, L: 16, H: 16}
STANDARD = {TI: 3, S: 6, **BASE_AND_LARGER}  # arXiv 2012.12877, arXiv 2010.11929
DINOV2 = {S: 6, B: 12, L: 16, (1536, 40, 4096): 24}
DINOV3 = {S: 6, B: 12, L: 16, SO400M: 18, H: 20, (4096, 40, 8192): 32}
EVA02 = {(192, 12, 512): 3, (384, 12, 1024): 6, (768, 12, 2048): 12, (1024, 24, 2730): 16}
DEIT3_SMALL = {(384, 36, 1536): 6, (384, 18, 1536): 6, (512, 12, 2048): 8}
DEIT3_BASE = {(768, 36, 3072): 12, (768, 18, 3072): 12, (1280, 52, 5120): 16, (1280, 26, 5120): 16}
CLIP = {
    (256, 10, 1024): 4,
    S: 6,
    (512, 12, 2048): 8,
    B: 12,
    (896, 12, 3584): 14,
    L: 16,
    H: 16,
    GIANT: 16,
    GIGANTIC: 16,
    (1792, 56, 15360): 16,
}
# Format -> size -> heads: the sizes that the code named in each line builds with exactly one number of heads.
SIZES: dict[str, dict[Size, int]] = {
    "official_mae": BASE_AND_LARGER,  # facebookresearch/mae models_mae.py, models_vit.py
    # wangsr126/MAE-Lite projects/mae_lite/models_mae.py, mae_lite/models/models_vit.py
    "mae_lite": {TI: 12, (192, 13, 768): 12, S: 12, **BASE_AND_LARGER},
    "crossmae": {S: 6, **BASE_AND_LARGER},  # TonyLianLong/CrossMAE models_cross.py
    "dino": {TI: 3, S: 6, B: 12},  # facebookresearch/dino vision_transformer.py
    "ibot": {TI: 3, S: 6, B: 12, L: 16},  # bytedance/ibot models/vision_transformer.py
    # facebookresearch/moco-v3 vits.py; L and H are the paper's (arXiv 2104.02057)
    "moco_v3": {S: 12, B: 12, L: 16, H: 16},
    "deit": {TI: 3, S: 6, B: 12},  # facebookresearch/deit models.py
    # facebookresearch/deit models_v2.py
    "deit3": STANDARD | DEIT3_SMALL | DEIT3_BASE | {(1664, 48, 6656): 16, (1408, 40, 5632): 16},
    "ijepa": STANDARD | {GIANT: 16},  # facebookresearch/ijepa src/models/vision_transformer.py
    "maskfeat": {B: 12, L: 16},  # facebookresearch/SlowFast configs/masked_ssl
    "lightly": STANDARD,  # timm's vision_transformer.py, which lightly wraps
    "solo_learn": STANDARD,  # vturrisi/solo-learn solo/backbones/vit/vit.py: timm's
    # solo/backbones/vit/vit_mae.py and vit_mocov3.py, both with a fixed position embedding
    "solo_learn, fixed positions": {TI: 12, S: 12, B: 12, L: 16, H: 16},
    "beit": {B: 12, L: 16},  # microsoft/unilm beit/modeling_pretrain.py
    "beitv2": {B: 12, L: 16},  # microsoft/unilm beit2/modeling_pretrain.py
    "data2vec": {B: 12, L: 16},  # facebookresearch/data2vec_vision beit/modeling_cyclical.py
    "simmim": {B: 12},  # microsoft/SimMIM configs/vit_base__800ep
    "eva02": EVA02,  # baaivision/EVA EVA-02/asuka/modeling_pretrain.py
    "dinov2": DINOV2,  # facebookresearch/dinov2 dinov2/models/vision_transformer.py
    "dinov3": DINOV3,  # facebookresearch/dinov3 dinov3/models/vision_transformer.py
    "hf_dinov2": DINOV2,  # released models of facebookresearch/dinov2
    "hf_dinov3": DINOV3,  # released models of facebookresearch/dinov3
    "hf_vitmae": BASE_AND_LARGER,  # released models of facebookresearch/mae
    "hf_vit": BASE_AND_LARGER,  # released models of google-research/vision_transformer
    "hf_vit, distilled": {TI: 3, S: 6, B: 12},  # facebookresearch/deit models.py
    "hf_beit": {B: 12, L: 16},  # released models of microsoft/unilm
    "hf_ijepa": {H: 16, GIANT: 16},  # released models of facebookresearch/ijepa
    "clip": CLIP,  # mlfoundations/open_clip src/open_clip/model_configs, openai/CLIP clip/model.py
    "hf_clip": CLIP,  # released models of openai/CLIP and mlfoundations/open_clip
    "hf_siglip": {B: 12, L: 16, SO400M: 16, (1536, 40, 6144): 16},  # google-research/big_vision models/vit.py
    # arch_zoo of open-mmlab/mmpretrain's vision_transformer.py, beit.py and deit3.py
    "mmpretrain": STANDARD | {(768, 8, 2304): 8, (512, 12, 2048): 8, GIANT: 16, (1536, 40, 4096): 24},
    "mmpretrain, MoCo v3": {S: 12, B: 12, L: 16, H: 16},  # mmpretrain/models/selfsup/mocov3.py
    "mmpretrain, fixed positions": BASE_AND_LARGER,  # MAE's or MoCo v3's, which disagree on S
    "mmseg": STANDARD,  # open-mmlab/mmsegmentation configs/vit, configs/segmenter, configs/mae
    "detectron2": BASE_AND_LARGER,  # facebookresearch/detectron2 projects/ViTDet/configs
    # A bare file has no family. These sizes have one number of heads in every code base read here.
    "timm": BASE_AND_LARGER | {GIANT: 16, GIGANTIC: 16, (1536, 40, 4096): 24} | EVA02,
}
BARE = "timm"
NO_CLASS_TOKEN = "timm, no class token"  # 768 channels have 16 heads in timm's vit_base_patch16_gap_224
SIZES[NO_CLASS_TOKEN] = {size: heads for size, heads in SIZES[BARE].items() if size != B}
VIT_NAMES = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16, "vit_giant": 16}
# Format -> name of the architecture in the saved arguments -> heads that the family's code gives to it.
NAMES: dict[str, dict[str, int]] = {
    "dino": {**VIT_NAMES, "deit_tiny": 3, "deit_small": 6},
    "ibot": VIT_NAMES,
    "ijepa": VIT_NAMES,
    "moco_v3": {"vit_small": 12, "vit_base": 12},
    "official_mae": {
        "mae_vit_base_patch16": 12,
        "mae_vit_large_patch16": 16,
        "mae_vit_huge_patch14": 16,
        "vit_base_patch16": 12,
        "vit_large_patch16": 16,
        "vit_huge_patch14": 16,
    },
}
WIDTHS = {
    "tiny": 192,
    "small": 384,
    "base": 768,
    "large": 1024,
    "huge": 1280,
    "giant": 1408,
}  # of these names
MIN_HEAD_DIM = 8  # channels; the families above have 16 to 112
TIMM_0_3_SMALL = ("vit_small_patch16_224", 768, 8)  # name, width and heads (and depth) in timm 0.3.2 and 0.4


def add_num_heads(format: str, checkpoint: Checkpoint, translation: Translation) -> None:
    """Add the number of heads to the facts or assumptions of a translation, where there is evidence for it.

    In this order: `num_heads` in the file's saved arguments, the architecture that they name, and the size of
    the ViT within its family. Facts and assumptions of the format itself come first.
    """
    known = (translation.facts, translation.assumed, checkpoint.stated_spec)
    if any("num_heads" in fields for fields in known):
        return
    size = get_size(translation.weights)
    stated = next(filter(_is_count, find_values(checkpoint.extras, ("num_heads",))), None)
    named = _heads_of_name(format, checkpoint.extras, size)
    if stated is not None or named is not None:
        translation.facts["num_heads"] = named if stated is None else stated
        translation.sources["num_heads"] = FILE
        return
    family = translation.family or format
    if family == BARE and "cls_token" not in translation.weights:
        family = NO_CLASS_TOKEN
    heads = SIZES.get(family, {}).get(size)
    if heads is not None:
        translation.assumed["num_heads"] = heads
        translation.sources["num_heads"] = _describe(family, size)
        if family in (BARE, NO_CLASS_TOKEN):
            translation.notes.append(f"{heads} heads, {translation.sources['num_heads']}")


def _describe(family: str, size: Size) -> str:
    sizes = f"width {size[0]}, depth {size[1]}, MLP width {size[2]}"
    if family in (BARE, NO_CLASS_TOKEN):
        return f"assumed: every known family has this number for {sizes}"
    return f"the only number that {family} builds for {sizes}"


def get_size(weights: Mapping[str, torch.Tensor]) -> Size:
    """Return width, depth and MLP width of a ViT in timm's names; 0 for what it does not have."""
    proj, fc2 = weights.get("patch_embed.proj.weight"), weights.get("blocks.0.mlp.fc2.weight")
    depth = count_blocks(weights)
    width = proj.shape[0] if proj is not None and proj.ndim else 0
    return width, depth, fc2.shape[-1] if fc2 is not None and fc2.ndim else 0


def list_divisors(width: int) -> list[int]:
    """Return all numbers of heads that divide the width."""
    return [heads for heads in range(1, width + 1) if width % heads == 0]


def list_plausible(width: int) -> list[int]:
    """Return the numbers of heads that divide the width into heads of at least `MIN_HEAD_DIM` channels."""
    return [heads for heads in list_divisors(width) if width // heads >= MIN_HEAD_DIM] or [1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _heads_of_name(format: str, extras: Mapping[str, Any], size: Size) -> int | None:
    """Return the heads of the architecture that the saved arguments or `arch` name, if its width fits."""
    args = as_mapping(extras.get("args"))
    for name in (extras.get("arch"), args.get("arch"), args.get("model"), args.get("model_name")):
        if not isinstance(name, str):
            continue
        if name in NAMES.get(format, {}) and any(word in name and size[0] == WIDTHS[word] for word in WIDTHS):
            return NAMES[format][name]
        if (name, *size[:2]) == TIMM_0_3_SMALL:
            return TIMM_0_3_SMALL[2]
        heads = _heads_in_timm(name, size, as_mapping(args.get("model_kwargs")))
        if heads is not None:
            return heads
    return None


def _heads_in_timm(name: str, size: Size, kwargs: Mapping[str, Any]) -> int | None:
    """Return the heads of a ViT of the installed timm, if its width and depth are the file's."""
    import timm  # imports every model: only for a file that names one
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name) or get_pretrained_cfg(name) is None:
        return None
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    attention = next((m for m in model.modules() if isinstance(getattr(m, "num_heads", None), int)), None)
    width = kwargs.get("embed_dim", getattr(model, "embed_dim", 0))
    depth = kwargs.get("depth", len(getattr(model, "blocks", ())))
    return attention.num_heads if attention is not None and (width, depth) == size[:2] else None
