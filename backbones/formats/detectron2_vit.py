"""detectron2: the ViT inside a ViTDet detector; a plain ViT is written for it, with what it has no place for beside the model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from backbones.families import family
from backbones.reading.source import SPEC_KEY, Checkpoint
from backbones.translating.structure import has_timm_description
from backbones.translating.translation import (
    Translation,
    has_final_norm,
    is_timm_vit,
    keep_names,
    require_plain_vit,
)
from mae_bench.errors import UserError
from mae_bench.export import SPEC_FILE
from mae_bench.files import write_atomic
from mae_bench.spec import BackboneSpec

PREFIX = "backbone.net."  # of a detector's SimpleFeaturePyramid around the ViT
PLAIN_VIT_PARTS = "beside_the_model"  # of our own files: class token and last norm of a plain ViT, which detectron2's has not
WINDOWS = ("window_size", "global_attn_indexes")
OUTSIDE = {
    r"(backbone\.)?simfp_": "feature pyramid of the detector: every task trains its own",
    r"proposal_generator\.": "proposals of the detector: every task trains its own",
    r"roi_heads\.": "heads of the detector: every task trains its own",
    r"pixel_(mean|std)$": "mean and std of the images",
}


def fits(checkpoint: Checkpoint) -> bool:
    """timm's names without class token, last norm and neck, in a file that does not say that it is another's."""
    keys = checkpoint.tensors
    if SPEC_FILE in checkpoint.beside or has_timm_description(checkpoint):
        return False
    return (
        is_timm_vit(keys)
        and not has_final_norm(keys)
        and "cls_token" not in keys
        and "neck.0.weight" not in keys
    )


def read(checkpoint: Checkpoint) -> Translation:
    """Windows, heads and image size come from the lengths of the relative tables; without them the windows must be given.

    An absolute table is taken to the grid of the global blocks as detectron2 does in its forward (get_abs_pos).
    """
    result = keep_names(checkpoint.tensors, drop={})
    for name in checkpoint.outside:
        if reason := next((reason for pattern, reason in OUTSIDE.items() if re.match(pattern, name)), None):
            result.outside[name] = reason
    if PLAIN_VIT_PARTS in checkpoint.extras:
        return _add_plain_vit_parts(result, checkpoint)
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
        width, *patch = _measure_patch_embed(weights, source)
        windows, grid, head_dim = _infer_windows(weights, source)
        options |= windows
        result.facts |= {"num_heads": width // head_dim, "img_size": (grid[0] * patch[0], grid[1] * patch[1])}
    else:
        result.needed = WINDOWS
    if options["use_abs_pos"]:
        _convert_pos_embed(result, grid, source)
    return result


def _measure_patch_embed(weights: Mapping[str, torch.Tensor], source: str) -> tuple[int, int, int]:
    """Width, and height and width of a patch."""
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
    """Options of the windows, the global blocks' grid and the channels of a head.

    Tables have 2 side - 1 rows, side of the window or of the whole grid, and a column for each channel of a head. Tables of one
    length are those of one window as large as the grid, which is global attention.
    """
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in weights.items()
        if re.match(r"blocks\.\d+\.attn\.rel_pos_[hw]$", name)
    }
    grids = {
        int(name.split(".")[1]): _infer_grid(name, shapes, source) for name in shapes if name.endswith("h")
    }
    grid, window = max(grids.values()), min(grids.values())
    head_dims = {shape[-1] for shape in shapes.values()}
    if (
        len(set(grids.values())) > 2
        or (window != grid and window[0] != window[1])
        or len(head_dims) > 1
        or 0 in head_dims
    ):
        raise UserError(
            f"{source}: relative tables of grids {sorted(set(grids.values()))} and heads of {sorted(head_dims)} channels",
            expected="those of one square window and of the whole image, of heads of one size",
        )
    everywhere = [block for block, found in sorted(grids.items()) if found == grid]
    windows = {"window_size": window[0], "global_attn_indexes": everywhere}
    return {"window_size": 0, "global_attn_indexes": []} if window == grid else windows, grid, head_dims.pop()


def _infer_grid(name: str, shapes: Mapping[str, tuple[int, ...]], source: str) -> tuple[int, int]:
    down, across = shapes[name], shapes.get(name[:-1] + "w", ())
    if (len(down), len(across)) != (2, 2) or not (down[0] % 2 and across[0] % 2):
        raise UserError(
            f"{source}: {name} is {down}, its partner {across}",
            expected="rel_pos_h and rel_pos_w of 2 side - 1 rows",
        )
    return (down[0] + 1) // 2, (across[0] + 1) // 2


def _convert_pos_embed(result: Translation, grid: tuple[int, int] | None, source: str) -> None:
    """The table (1, [1 +] L, D) of the pretraining as (1, H, W, D): without the class token's row, at the given grid."""
    table = result.weights["pos_embed"]
    length = table.shape[1] if table.ndim == 3 else 0
    rows = next((rows for rows in (length, length - 1) if rows > 0 and round(rows**0.5) ** 2 == rows), 0)
    if not rows:
        raise UserError(
            f"{source}: pos_embed is {tuple(table.shape)}", expected="(1, rows, width) for a square image"
        )
    side = round(rows**0.5)
    done = [] if rows == length else ["the class token's row left out"]
    table = table[:, length - rows :].unflatten(1, (side, side))
    if grid and grid != (side, side):
        done.append(
            f"resampled from {side} x {side} to {grid[0]} x {grid[1]} as in detectron2's forward (bicubic)"
        )
        moved = F.interpolate(
            table.permute(0, 3, 1, 2).float(), size=grid, mode="bicubic", align_corners=False
        )
        table = moved.permute(0, 2, 3, 1).to(table.dtype)
    result.weights["pos_embed"] = table.contiguous()
    result.reshaped["pos_embed"] = "; ".join(["to (1, height, width, channels)", *done])


def _add_plain_vit_parts(result: Translation, checkpoint: Checkpoint) -> Translation:
    """The plain ViT that `write` was given."""
    beside = checkpoint.extras[PLAIN_VIT_PARTS]
    width, *_ = _measure_patch_embed(checkpoint.tensors, checkpoint.source)
    shapes = {"cls_token": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for name, shape in shapes.items():
        tensor = beside.get(name) if isinstance(beside, dict) else None
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            raise UserError(
                f"{checkpoint.source}: {PLAIN_VIT_PARTS} has no {name} of shape {shape}",
                expected="a file that mae-bench wrote",
            )
        result.weights[name] = tensor
        result.new[name] = f"from {PLAIN_VIT_PARTS!r}: detectron2's ViT has no place for it"
    result.facts = {"arch": "vit", "options": {}}
    return result


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """`{"model": ...}` for DetectionCheckpointer, named as in a detector, `train.init_checkpoint` of its configs.

    A plain ViT fits `ViT(pretrain_img_size=..., pretrain_use_cls_token=True)`; one that was read from a detector fits the same
    ViT again, with `pretrain_img_size` the image size and `pretrain_use_cls_token=False`.
    """
    if len(set(spec.img_size)) > 1 or len(set(spec.patch_size)) > 1:
        raise UserError(
            f"images {spec.img_size}, patches {spec.patch_size}", expected="squares, for detectron2's ViT"
        )
    model, content = dict(weights), {SPEC_KEY: spec.to_dict(), "provenance": provenance}
    if spec.arch == "sam" and not spec.options.get("neck_chans", 256):
        if "pos_embed" in model:
            model["pos_embed"] = model["pos_embed"].flatten(1, 2)
    else:
        require_plain_vit(spec, weights, "detectron2", fc_norm=False)
        content[PLAIN_VIT_PARTS] = {
            name: model.pop(name) for name in ("cls_token", "norm.weight", "norm.bias")
        }
    content["model"] = {PREFIX + name: tensor for name, tensor in model.items()}
    write_atomic(out, lambda file: torch.save(content, file))
