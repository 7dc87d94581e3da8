"""Resample a translated backbone to another image or patch size."""

import re
from dataclasses import replace
from typing import Any

import torch

from backbones.translating.translation import Translation
from mae_bench.errors import UserError
from mae_bench.models.resampling import resize_bias_table, resize_distances, resize_filters, resize_table
from mae_bench.models.vit import ARCHS
from mae_bench.spec import BackboneSpec

PATCH_RESAMPLE = {"pinv": "pseudo-inverse", "bicubic": "bicubic"}
FILTERS, TABLE = "patch_embed.proj.weight", "pos_embed"
BIAS_TABLE = re.compile(r"(?:rel_pos_bias|blocks\.\d+\.attn)\.relative_position_bias_table")
DISTANCES = re.compile(r"blocks\.\d+\.attn\.rel_pos_([hw])")


def resample(
    translation: Translation,
    spec: BackboneSpec,
    img_size: tuple[int, int] | None,
    patch_size: tuple[int, int] | None,
    patch_resample: str = "pinv",
) -> BackboneSpec:
    """Resample `translation.weights` in place and return the spec at the new sizes.

    Sizes are (height, width) in pixels.     The image size is kept approximately where only the patch size
    changes: ViT-H/14 at 224 becomes /16 at 224, with 14 x 14 patches. Rotary models have nothing to resample:
    rotations are computed for the image's grid. Raise UserError for sizes that do not fit together and for
    tables that fit no grid.
    """
    if patch_resample not in PATCH_RESAMPLE:
        raise UserError(f"patch_resample {patch_resample!r}", expected=f"one of {', '.join(PATCH_RESAMPLE)}")
    patch_size = patch_size or spec.patch_size
    img_size = img_size or _round_img_size(spec.img_size, patch_size)
    new = replace(spec, img_size=img_size, patch_size=patch_size)
    if new.patch_size != spec.patch_size:
        if spec.arch not in ARCHS:
            raise UserError(
                f"patches of {new.patch_size} for {spec.arch}",
                expected=f"{spec.patch_size}, the patch size of this architecture",
            )
        _resample_filters(translation, new, patch_resample)
    if new.grid_size == spec.grid_size:
        return new
    try:
        changed = _resample_tables(translation, spec, new)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"a backbone for images of {spec.img_size} cannot be resampled to {new.img_size}: {error}"
        ) from error
    return replace(new, pos_embed="learned") if changed and spec.pos_embed == "sincos" else new


def _round_img_size(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    height, width = (
        max(1, round(size / patch)) * patch for size, patch in zip(img_size, patch_size, strict=True)
    )
    return height, width


def _resample_filters(translation: Translation, new: BackboneSpec, method: str) -> None:
    filters = translation.weights[FILTERS]
    translation.weights[FILTERS] = resize_filters(filters, new.patch_size, method)
    sizes = f"{_format(filters.shape[2:])} -> {_format(new.patch_size)} pixels"
    _note(translation, FILTERS, f"{sizes} ({PATCH_RESAMPLE[method]})")


def _resample_tables(translation: Translation, spec: BackboneSpec, new: BackboneSpec) -> bool:
    """Resample all tables; return whether the backbone has an absolute position embedding."""
    old_grid, grid, weights = spec.grid_size, new.grid_size, translation.weights
    for name, table in weights.items():
        distances = DISTANCES.fullmatch(name)
        if name == TABLE:
            method = str(spec.pos_resample)
            original, old = translation.originals.get(name, (table, old_grid))
            resized = resize_table(original.flatten(1, -2), old, grid, spec.pos_resample).to(table.dtype)
            weights[name] = torch.unflatten(resized, 1, grid) if table.ndim == 4 else resized
        elif BIAS_TABLE.fullmatch(name):
            method = "geometric"
            weights[name] = resize_bias_table(table, old_grid, grid)
        elif distances and _is_global(name, spec.options):
            method = "linear"
            side = grid["hw".index(distances[1])]
            weights[name] = resize_distances(table, 2 * side - 1)
        else:
            continue
        _note(translation, name, f"{_format(old_grid)} -> {_format(grid)} patches ({method})")
    return TABLE in weights


def _is_global(name: str, options: dict[str, Any]) -> bool:
    """Return whether a block of a windowed ViT has global attention; other tables are for windows."""
    block = int(name.split(".")[1])
    return not options.get("window_size", 14) or block in options.get("global_attn_indexes", ())


def _note(translation: Translation, name: str, what: str) -> None:
    before = translation.reshaped.get(name)
    translation.reshaped[name] = f"{before}; {what}" if before else what


def _format(size: Any) -> str:
    return " x ".join(map(str, size))
