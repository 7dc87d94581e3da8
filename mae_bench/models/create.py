"""Masked autoencoders by name: the reference's, two smaller ones, and any timm ViT that MAE's encoder can be."""

import re
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer

from mae_bench.errors import UserError, did_you_mean
from mae_bench.models.mae import MAE
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec

ENCODERS: dict[str, dict[str, int]] = {
    "mae_vit_tiny_patch16": {
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "patch": 16,
    },  # DeiT's Ti and S, arXiv 2012.12877
    "mae_vit_small_patch16": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch": 16},
    "mae_vit_base_patch16": {
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "patch": 16,
    },  # facebookresearch/mae models_mae.py
    "mae_vit_large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch": 16},
    "mae_vit_huge_patch14": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch": 14},
}
IMG_SIZE = 224
Size = int | tuple[int, int]
_DECODER = re.compile(
    r"(.+)_dec(\d+)d(\d+)b"
)  # the reference's spelling of a decoder: dec512d8b is 512 wide and 8 blocks deep


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
    """A freshly initialised MAE: `mae_vit_{tiny,small,base,large}_patch16`, `mae_vit_huge_patch14`, or a timm ViT's name.

    `_dec512d8b` behind one of the former is its decoder's width and depth. Sizes are one number or (height, width); by default
    those of the name (224 for the former). mean and std are of the data's channels, for pixels in [0, 1]: by default ImageNet's
    for 3 channels and 0.5 for any other number. options: the other keywords of `MAE` (decoder_embed_dim, target, ...).
    Raises UserError for a name that is unknown (with the nearest ones), a timm model that is no plain ViT with one class token,
    and sizes that the patch does not divide.
    """
    if match := _DECODER.fullmatch(name):
        name = match[1]
        options = {"decoder_embed_dim": int(match[2]), "decoder_depth": int(match[3]), **options}
    shape = _named(name) if name in ENCODERS else _of_timm(name)
    changes: dict[str, Any] = {"in_chans": in_chans, "pos_embed": "sincos"}
    if in_chans != 3 or mean or std:
        changes |= {"mean": mean or (0.5,) * in_chans, "std": std or (0.5,) * in_chans}
    for key, value in (("img_size", img_size), ("patch_size", patch_size)):
        if value is not None:
            changes[key] = height_and_width(value, key)
    return MAE(BackboneSpec(**{**shape, **changes}), norm_pix_loss=norm_pix_loss, **options)


def height_and_width(value: Size, what: str) -> tuple[int, int]:
    """One number is both. UserError for anything but whole positive numbers."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserError(f"{what} {value!r}", expected="a positive number of pixels, or (height, width)")
    return pair[0], pair[1]


def _named(name: str) -> dict[str, Any]:
    shape: dict[str, Any] = dict(ENCODERS[name])
    patch = shape.pop("patch")
    return {"arch": "vit", "img_size": (IMG_SIZE, IMG_SIZE), "patch_size": (patch, patch), **shape}


def _of_timm(name: str) -> dict[str, Any]:
    """Fields of the BackboneSpec of a timm ViT that MAE's encoder can be."""
    arch = name.removeprefix("timm:").split(".")[0]
    if not timm.is_model(arch):
        near = did_you_mean(name, [*ENCODERS, *timm.list_models("*vit*"), *timm.list_models("deit*")])
        raise UserError(
            f"unknown model {name!r}", expected=f"one of {', '.join(ENCODERS)}, or a timm ViT",
            fix=near or "timm.list_models('vit*') lists timm's",
        )  # fmt: skip
    with torch.device("meta"):  # its shape is asked for, not its weights
        model: Any = timm.create_model(arch, pretrained=False, num_classes=0)
        if type(model) is not VisionTransformer:
            raise _not_ours(arch, f"it is a {type(model).__name__}")
        if (
            model.cls_token is None
            or model.num_prefix_tokens != 1
            or model.pos_embed is None
            or model.no_embed_class
        ):
            raise _not_ours(
                arch, f"it has {model.num_prefix_tokens} prefix tokens, or no position for its class token"
            )
        block: Any = model.blocks[0]
        if type(block) is not Block or type(block.mlp) is not Mlp:
            raise _not_ours(
                arch,
                f"its blocks are {type(block).__name__} with {type(getattr(block, 'mlp', None)).__name__}",
            )
        mlp: Any = block.mlp
        shape = {
            "arch": "vit",
            "img_size": model.patch_embed.img_size,
            "patch_size": model.patch_embed.patch_size,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": mlp.fc1.out_features / model.embed_dim,
            "norm_eps": block.norm1.eps,
        }
        ours = build_vit(BackboneSpec(in_chans=3, pos_embed="learned", **shape))
    for part in ("patch_embed", "norm_pre", "blocks"):
        _same(arch, str(getattr(model, part)), str(getattr(ours, part)))
    return shape


def _same(arch: str, theirs: str, ours: str) -> None:
    """Modules print their kind and sizes: the first line that differs says why an architecture is another one."""
    if theirs != ours:
        found = [line.strip() for line in theirs.splitlines()]
        known = [line.strip() for line in ours.splitlines()]
        raise _not_ours(
            arch,
            f"its {next((line for line in found if line not in known), found[0])} is not in MAE's encoder",
        )


def _not_ours(arch: str, why: str) -> UserError:
    return UserError(
        f"{arch} is not a ViT that MAE pretrains: {why}",
        expected="a plain ViT with one class token, a position table, LayerNorm, GELU and no layer scale",
        fix="take a plain one, such as vit_base_patch16_224, or give this one's widths in a config of configs/models",
    )
