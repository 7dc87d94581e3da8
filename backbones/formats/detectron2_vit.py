"""detectron2: the ViT of a ViTDet detector; writes a plain ViT, with extra keys for what detectron2 lacks.

L patches, D width, h w grid, p patch side.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backbones.families import family
from backbones.reading.source import PROVENANCE_KEY, SPEC_KEY, Checkpoint
from backbones.translating.grids import describe_square
from backbones.translating.structure import has_timm_description
from backbones.translating.translation import (
    Translation,
    explain,
    has_final_norm,
    is_timm_vit,
    keep_names,
    require_plain_vit,
)
from mae_bench.errors import UserError
from mae_bench.export import SPEC_FILE
from mae_bench.files import write_atomic
from mae_bench.models.resampling import resize_table
from mae_bench.spec import BackboneSpec

PREFIX = "backbone.net."  # of a detector's SimpleFeaturePyramid around the ViT
EXTRA_KEY = (
    "beside_the_model"  # in our own files: class token and final norm of a plain ViT, which detectron2 lacks
)
EXTRA_WEIGHTS = ("cls_token", "norm.weight", "norm.bias")
WINDOWS = ("window_size", "global_attn_indexes")
TABLE = re.compile(r"blocks\.(\d+)\.attn\.rel_pos_[hw]$")
OUTSIDE = {
    r"(backbone\.)?simfp_": "feature pyramid of the detector: each task trains its own",
    r"proposal_generator\.": "proposals of the detector: each task trains its own",
    r"roi_heads\.": "heads of the detector: each task trains its own",
    r"pixel_(mean|std)$": "mean and std of the images",
}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has timm's names without class token, final norm, neck and description."""
    keys = checkpoint.tensors
    if SPEC_FILE in checkpoint.beside or has_timm_description(checkpoint):
        return False
    return is_timm_vit(keys) and not has_final_norm(keys) and not {"cls_token", "neck.0.weight"} & set(keys)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the ViT of a detector.

    The lengths of the relative tables show windows, heads and image size; without tables the windows must be
    given. An absolute position embedding is resampled to the grid of the global blocks as in detectron2's
    forward (get_abs_pos).
    """
    result = keep_names(checkpoint.tensors, drop={})
    result.outside = explain(checkpoint.outside, OUTSIDE)
    if EXTRA_KEY in checkpoint.extras:
        return _add_extra_weights(result, checkpoint)
    weights, source = result.weights, checkpoint.source
    result.assumed = family("detectron2")
    options: dict[str, Any] = {
        "neck_chans": 0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "use_abs_pos": "pos_embed" in weights,
        "use_rel_pos": "blocks.0.attn.rel_pos_h" in weights,
    }
    result.facts = {"arch": "sam", "options": options}
    grid = None
    if options["use_rel_pos"]:
        embed_dim, patch_h, patch_w = _measure_patch_embed(weights, source)
        windows, grid, head_dim = _infer_windows(weights, source)
        options |= windows
        result.facts["num_heads"] = embed_dim // head_dim
        result.facts["img_size"] = (grid[0] * patch_h, grid[1] * patch_w)
    else:
        result.needed = WINDOWS
    if options["use_abs_pos"]:
        _convert_pos_embed(result, grid, source)
    return result


def _measure_patch_embed(weights: Mapping[str, torch.Tensor], source: str) -> tuple[int, int, int]:
    """Return the width, and the height and width of a patch."""
    proj = weights["patch_embed.proj.weight"]
    if proj.ndim != 4:
        raise UserError(
            f"{source}: patch_embed.proj.weight is {tuple(proj.shape)}",
            expected="(width, channels, height, width)",
        )
    return proj.shape[0], proj.shape[2], proj.shape[3]


def _infer_windows(
    weights: Mapping[str, torch.Tensor], source: str
) -> tuple[dict[str, Any], tuple[int, int], int]:
    """Return the options of the windows, the global blocks' grid and the channels per head.

    A table is (2 side - 1, channels per head), for the side of a window or of the whole grid. Tables of one
    length are those of one window as large as the grid, which is global attention.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items() if TABLE.match(name)}
    grids = {
        int(name.split(".")[1]): _infer_grid(name, shapes, source) for name in shapes if name.endswith("h")
    }
    grid, window = max(grids.values()), min(grids.values())
    head_dims = {shape[-1] for shape in shapes.values()}
    is_square = window == grid or window[0] == window[1]
    if len(set(grids.values())) > 2 or not is_square or len(head_dims) > 1 or 0 in head_dims:
        raise UserError(
            f"{source}: relative tables of grids {sorted(set(grids.values()))} and heads of "
            f"{sorted(head_dims)} channels",
            expected="those of one square window and of the whole image, of heads of one size",
        )
    if window == grid:
        windows: dict[str, Any] = {"window_size": 0, "global_attn_indexes": []}
    else:
        global_blocks = [block for block, block_grid in sorted(grids.items()) if block_grid == grid]
        windows = {"window_size": window[0], "global_attn_indexes": global_blocks}
    return windows, grid, head_dims.pop()


def _infer_grid(name: str, shapes: Mapping[str, tuple[int, ...]], source: str) -> tuple[int, int]:
    """Return the grid (h, w) of a pair of tables."""
    table_h, table_w = shapes[name], shapes.get(name[:-1] + "w", ())
    if (len(table_h), len(table_w)) != (2, 2) or not (table_h[0] % 2 and table_w[0] % 2):
        raise UserError(
            f"{source}: {name} is {table_h}, its partner {table_w}",
            expected="rel_pos_h and rel_pos_w of 2 side - 1 rows",
        )
    return (table_h[0] + 1) // 2, (table_w[0] + 1) // 2


def _convert_pos_embed(result: Translation, grid: tuple[int, int] | None, source: str) -> None:
    """Convert the position embedding (1, [1 +] L, D) of the pretraining to (1, h, w, D).

    The class token's row is left out; the rest is resampled to `grid`, if given.
    """
    table = result.weights["pos_embed"]
    length = table.shape[1] if table.ndim == 3 else 0
    rows = next((rows for rows in (length, length - 1) if rows > 0 and round(rows**0.5) ** 2 == rows), 0)
    if not rows:
        raise UserError(
            f"{source}: pos_embed is {tuple(table.shape)}", expected="(1, rows, width) for a square image"
        )
    side = round(rows**0.5)
    steps = ["to (1, height, width, channels)"]
    if rows != length:
        steps.append("the class token's row left out")
    table = table[:, length - rows :].reshape(len(table), side, side, table.shape[2])
    if grid and grid != (side, side):
        sizes = f"{side} x {side} to {grid[0]} x {grid[1]}"
        steps.append(f"resampled from {sizes} as in detectron2's forward (bicubic)")
        result.originals["pos_embed"] = (table, (side, side))
        table = resize_table(table.flatten(1, 2), (side, side), grid, "bicubic").unflatten(1, grid)
    elif not grid:
        result.sources["img_size"] = describe_square("detectron2")
    result.weights["pos_embed"] = table.contiguous()
    result.reshaped["pos_embed"] = "; ".join(steps)


def _add_extra_weights(result: Translation, checkpoint: Checkpoint) -> Translation:
    """Restore the plain ViT that was given to `write`."""
    extra = checkpoint.extras[EXTRA_KEY]
    embed_dim, *_ = _measure_patch_embed(checkpoint.tensors, checkpoint.source)
    for name in EXTRA_WEIGHTS:
        shape = (1, 1, embed_dim) if name == "cls_token" else (embed_dim,)
        tensor = extra.get(name) if isinstance(extra, dict) else None
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            raise UserError(
                f"{checkpoint.source}: {EXTRA_KEY} has no {name} of shape {shape}",
                expected="a file that mae-bench wrote",
            )
        result.weights[name] = tensor
        result.new[name] = f"from {EXTRA_KEY!r}: detectron2's ViT cannot store it"
    result.facts = {"arch": "vit", "options": {}}
    return result


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write `{"model": ...}` for DetectionCheckpointer, the `train.init_checkpoint` of detector configs.

    A plain ViT loads into `ViT(pretrain_img_size=..., pretrain_use_cls_token=True)`; one that was read from a
    detector loads into the same ViT again, with the image size as `pretrain_img_size` and
    `pretrain_use_cls_token=False`.
    """
    if len(set(spec.img_size)) > 1 or len(set(spec.patch_size)) > 1:
        raise UserError(
            f"images {spec.img_size}, patches {spec.patch_size}", expected="squares, for detectron2's ViT"
        )
    model, content = dict(weights), {SPEC_KEY: spec.to_dict(), PROVENANCE_KEY: provenance}
    if spec.arch == "sam" and not spec.options.get("neck_chans", 256):
        if "pos_embed" in model:
            model["pos_embed"] = model["pos_embed"].flatten(1, 2)
    else:
        require_plain_vit(spec, weights, "detectron2", fc_norm=False)
        content[EXTRA_KEY] = {name: model.pop(name) for name in EXTRA_WEIGHTS}
    content["model"] = {PREFIX + name: tensor for name, tensor in model.items()}
    write_atomic(out, lambda file: torch.save(content, file))
