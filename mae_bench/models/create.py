"""Create masked autoencoders by name: the reference's sizes, two smaller ones, and plain timm ViTs."""

import re
from typing import Any

import timm
import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer

from mae_bench.errors import UserError, did_you_mean
from mae_bench.models.mae import MAE
from mae_bench.models.options import MAEOptions
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec

# Published sizes: embed_dim, depth, num_heads, patch side.
# Tiny and small are DeiT's (arXiv 2012.12877), the others those of facebookresearch/mae models_mae.py
ENCODERS: dict[str, tuple[int, int, int, int]] = {
    "mae_vit_tiny_patch16": (192, 12, 3, 16),
    "mae_vit_small_patch16": (384, 12, 6, 16),
    "mae_vit_base_patch16": (768, 12, 12, 16),
    "mae_vit_large_patch16": (1024, 24, 16, 16),
    "mae_vit_huge_patch14": (1280, 32, 16, 14),
}
IMG_SIZE = 224
Size = int | tuple[int, int]
# The reference's suffix for the decoder: dec512d8b is 512 wide with 8 blocks
_DECODER = re.compile(r"(.+)_dec(\d+)d(\d+)b")


def create_mae(
    name: str,
    *,
    norm_pix_loss: bool = False,
    img_size: Size | None = None,
    patch_size: Size | None = None,
    in_chans: int = 3,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **options: Any,
) -> MAE:
    """Create a masked autoencoder with fresh weights.

    name: `mae_vit_{tiny,small,base,large}_patch16`, `mae_vit_huge_patch14`, or the name of a timm ViT. The
        suffix `_dec512d8b` of the former sets the width and depth of the decoder.
    img_size, patch_size: one number or (height, width), in pixels; by default those of the name (224 for
        `mae_vit_*`).
    mean, std: of the data's channels, for pixels in [0, 1]; by default ImageNet's for 3 channels, else 0.5.
    options: the other fields of `MAEOptions` (decoder_embed_dim, target, ...).

    Raise UserError for an unknown name (with the nearest known ones), for a timm model that is not a plain
    ViT with one class token, and for sizes that the patch does not divide.
    """
    if match := _DECODER.fullmatch(name):
        name = match[1]
        options = {"decoder_embed_dim": int(match[2]), "decoder_depth": int(match[3]), **options}
    shape = _encoder_shape(name) if name in ENCODERS else _timm_shape(name)
    changes: dict[str, Any] = {"in_chans": in_chans, "pos_embed": "sincos"}
    if in_chans != 3 or mean or std:
        changes |= {"mean": mean or (0.5,) * in_chans, "std": std or (0.5,) * in_chans}
    for key, value in (("img_size", img_size), ("patch_size", patch_size)):
        if value is not None:
            changes[key] = parse_size(value, key)
    spec = BackboneSpec(**{**shape, **changes})
    return MAE(spec, MAEOptions(norm_pix_loss=norm_pix_loss, **options))


def parse_size(value: Size, what: str) -> tuple[int, int]:
    """Return (height, width) of one number or a pair; raise UserError unless they are positive integers."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserError(f"{what} {value!r}", expected="a positive number of pixels, or (height, width)")
    return pair[0], pair[1]


def _encoder_shape(name: str) -> dict[str, Any]:
    """Return the fields of the BackboneSpec of one of `ENCODERS`."""
    embed_dim, depth, num_heads, patch = ENCODERS[name]
    return {
        "arch": "vit",
        "img_size": (IMG_SIZE, IMG_SIZE),
        "patch_size": (patch, patch),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }


def _timm_shape(name: str) -> dict[str, Any]:
    """Return the fields of the BackboneSpec of a timm ViT; raise UserError if it is not a plain ViT."""
    arch = name.removeprefix("timm:").split(".")[0]
    if not timm.is_model(arch):
        near = did_you_mean(name, [*ENCODERS, *timm.list_models("*vit*"), *timm.list_models("deit*")])
        raise UserError(
            f"unknown model {name!r}",
            expected=f"one of {', '.join(ENCODERS)}, or a timm ViT",
            fix=near or "timm.list_models('vit*') lists timm's ViTs",
        )
    with torch.device("meta"):  # only shapes are needed, not weights
        model: Any = timm.create_model(arch, pretrained=False, num_classes=0)
        _check_plain(arch, model)
        block: Any = model.blocks[0]
        shape = {
            "arch": "vit",
            "img_size": model.patch_embed.img_size,
            "patch_size": model.patch_embed.patch_size,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
            "norm_eps": block.norm1.eps,
        }
        ours = build_vit(BackboneSpec(in_chans=3, pos_embed="learned", **shape))
    for part in ("patch_embed", "norm_pre", "blocks"):
        _check_same(arch, str(getattr(model, part)), str(getattr(ours, part)))
    return shape


def _check_plain(arch: str, model: Any) -> None:
    """Raise UserError unless the model has plain blocks and one class token with a position."""
    if type(model) is not VisionTransformer:
        raise _unsupported(arch, f"it is a {type(model).__name__}")
    has_table = model.pos_embed is not None and not model.no_embed_class
    if model.cls_token is None or model.num_prefix_tokens != 1 or not has_table:
        prefix = f"it has {model.num_prefix_tokens} prefix tokens"
        raise _unsupported(arch, f"{prefix}, or no position for its class token")
    block: Any = model.blocks[0]
    mlp = getattr(block, "mlp", None)
    if type(block) is not Block or type(mlp) is not Mlp:
        raise _unsupported(arch, f"its blocks are {type(block).__name__} with {type(mlp).__name__}")


def _check_same(arch: str, theirs: str, ours: str) -> None:
    """Compare modules by how they print; raise UserError with the first line that differs."""
    if theirs != ours:
        found = [line.strip() for line in theirs.splitlines()]
        known = [line.strip() for line in ours.splitlines()]
        different = next((line for line in found if line not in known), found[0])
        raise _unsupported(arch, f"its {different} is not in MAE's encoder")


def _unsupported(arch: str, why: str) -> UserError:
    return UserError(
        f"{arch} is not a ViT that MAE pretrains: {why}",
        expected="a plain ViT with one class token, a position table, LayerNorm, GELU and no layer scale",
        fix="use a plain ViT such as vit_base_patch16_224, or write a config like those in configs/models",
    )
