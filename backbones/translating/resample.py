"""Takes a translated backbone to another image or patch size: position tables, relative tables, patch embedding."""

import re
from dataclasses import replace
from typing import Any

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
    """Resamples `translation.weights` in place and returns the spec at the new sizes, (height, width) in pixels.

    Images keep about their size where only the patch changes: ViT-H/14 of 224 becomes /16 of 224, 14 x 14 patches.
    Rotary models have nothing to resample: their rotations are computed for the image's grid. UserError for sizes that do not
    fit together, and for tables that are no grid's.
    """
    if patch_resample not in PATCH_RESAMPLE:
        raise UserError(f"patch_resample {patch_resample!r}", expected=f"one of {', '.join(PATCH_RESAMPLE)}")
    patch_size = patch_size or spec.patch_size
    new = replace(
        spec, img_size=img_size or _round_img_size(spec.img_size, patch_size), patch_size=patch_size
    )
    if new.patch_size != spec.patch_size:
        if spec.arch not in ARCHS:
            raise UserError(
                f"patches of {new.patch_size} for {spec.arch}",
                expected=f"{spec.patch_size}, which its name says",
            )
        _resample_filters(translation, new, patch_resample)
    if new.grid_size == spec.grid_size:
        return new
    try:
        changed = _resample_tables(translation, spec, new)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"a backbone of {spec.img_size} cannot be taken to {new.img_size}: {error}"
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
    _note(
        translation,
        FILTERS,
        f"{_sides(filters.shape[2:])} -> {_sides(new.patch_size)} pixels ({PATCH_RESAMPLE[method]})",
    )


def _resample_tables(translation: Translation, spec: BackboneSpec, new: BackboneSpec) -> bool:
    """Whether the backbone has an absolute table."""
    old_grid, grid, weights = spec.grid_size, new.grid_size, translation.weights
    for name, table in weights.items():
        how = ""
        if name == TABLE:
            flat, how = table.flatten(1, -2), spec.pos_resample
            resized = resize_table(flat, old_grid, grid, spec.pos_resample)
            weights[name] = resized.unflatten(1, grid) if table.ndim == 4 else resized
        elif BIAS_TABLE.fullmatch(name):
            weights[name], how = resize_bias_table(table, old_grid, grid), "geometric"
        elif (match := DISTANCES.fullmatch(name)) and _is_global(name, spec.options):
            side = grid["hw".index(match[1])]
            weights[name], how = resize_distances(table, 2 * side - 1), "linear"
        if how:
            _note(translation, name, f"{_sides(old_grid)} -> {_sides(grid)} patches ({how})")
    return TABLE in weights


def _is_global(name: str, options: dict[str, Any]) -> bool:
    """Whether a block of a windowed ViT looks at the whole image: the tables of the others are of their windows."""
    return not options.get("window_size", 14) or int(name.split(".")[1]) in options.get(
        "global_attn_indexes", ()
    )


def _note(translation: Translation, name: str, what: str) -> None:
    before = translation.reshaped.get(name)
    translation.reshaped[name] = f"{before}; {what}" if before else what


def _sides(size: Any) -> str:
    return " x ".join(map(str, size))
