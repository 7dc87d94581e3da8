"""Translation of a checkpoint to timm's names, with an account of every key and facts for its spec.

N batch, L patches, D width.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from backbones.families import family
from backbones.reading.source import Checkpoint
from mae_bench.errors import UserError
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.spec import BackboneSpec

MAX_NUMBER = 1e12  # numbers in a description must be smaller
HEAD = "classifier: each task trains its own"
PROJECTOR = "pretraining projection head: not part of the backbone"
MASK_TOKEN = "pretraining mask token: not part of the backbone"
# Tensor names of the ViT of arXiv 2010.11929 in timm.
BLOCK = r"(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])"
PLAIN_VIT = rf"(?:cls_token|pos_embed|(?:patch_embed\.proj|norm|blocks\.\d+\.{BLOCK})\.(?:weight|bias))$"

# Origins of a BackboneSpec field that are no assumption.
GIVEN, FILE, TENSORS = "given", "stated by the file", "inferred from the tensors"


@dataclass
class Translation:
    """A checkpoint translated to the tensor names of a timm VisionTransformer.

    Attributes:
        weights: Tensors by timm's names.
        renamed: Source key -> timm's name, keys as in `Checkpoint.tensors`.
        reshaped: timm's name -> what was done to the tensor.
        dropped: Source key -> reason.
        outside: Reasons for tensors of `Checkpoint.outside` (full keys), where there is more to say than that
            they are outside the ViT.
        taken: Tensors of `Checkpoint.outside` (full keys) that fill a weight of the backbone -> timm's name.
        new: timm's name -> why the weight is in no tensor of the file.
        notes: Assumptions, and what the user should know about these weights.
        facts: BackboneSpec fields that the file states.
        assumed: BackboneSpec fields that hold for the family where the file states nothing.
        needed: Options or BackboneSpec fields that cannot be inferred from the file and that the user, or the
            spec in the file, must state.
        hint: What to answer when a needed field is missing.
        assumptions: The spec fields that are assumed or the family's (`origins.find_assumptions`).
        family: Entry of `backbones.translating.heads.SIZES`, where it is not the format's name.
        originals: timm's name -> table and grid (h, w) from which the table in `weights` was resampled; a
            further size is resampled from it too.
        stated_sizes: Image sizes that a config in the file states, which its tables need not have.
        img_sizes: Image size -> evidence, to choose from if several grids explain the position tables
            (`grids.find_img_sizes`).
        sources: BackboneSpec field -> its origin in words, where it is not that of all facts or assumptions.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    hint: str = ""
    assumptions: list[str] = field(default_factory=list)
    family: str = ""
    originals: dict[str, tuple[torch.Tensor, tuple[int, int]]] = field(default_factory=dict)
    stated_sizes: list[Any] = field(default_factory=list)
    img_sizes: dict[tuple[int, int], str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


class Format(Protocol):
    """Interface of the modules in `backbones.formats`, which `backbones.translating.detect.FORMATS` lists."""

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Return whether keys and shapes are this format's. Two formats must not fit the same file."""

    def read(self, checkpoint: Checkpoint) -> Translation:
        """Translate to timm's names. Unknown keys keep theirs and fail the check against the model."""

    def write(
        self, weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
    ) -> None:
        """Write the reverse of `read`. Optional: formats without it are read-only.

        Raise UserError for a backbone that the format cannot express.
        """


def explain(names: Iterable[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the reason of the first pattern (re.match) that matches, for each name with one."""
    explained: dict[str, str] = {}
    for name in names:
        reason = next((reason for pattern, reason in reasons.items() if re.match(pattern, name)), None)
        if reason:
            explained[name] = reason
    return explained


def keep_names(
    tensors: Mapping[str, torch.Tensor], drop: Mapping[str, str], rename: Mapping[str, str] | None = None
) -> Translation:
    """Translate a checkpoint that mostly has timm's names already.

    Args:
        tensors: Tensors by source key.
        drop: Pattern -> reason for keys to leave out.
        rename: Pattern -> timm's name, as in re.sub.

    Raise UserError where two keys get the same name.
    """
    result = Translation(dropped=explain(tensors, drop))
    for name, tensor in tensors.items():
        if name in result.dropped:
            continue
        new_name = name
        for pattern, replacement in (rename or {}).items():
            if re.match(pattern, name):
                new_name = re.sub(pattern, replacement, name)
                break
        if new_name in result.weights:
            raise UserError(
                f"{name} and another tensor would both be renamed to {new_name}",
                expected="one tensor for every weight",
            )
        result.weights[new_name] = tensor
        result.renamed[name] = new_name
    return result


def drop_empty_registers(result: Translation) -> None:
    """Drop the empty register tensor that transformers saves for models without registers."""
    registers = result.weights.get("reg_token")
    if registers is not None and not registers.numel():
        stored = next(name for name, new_name in result.renamed.items() if new_name == "reg_token")
        del result.weights["reg_token"], result.renamed[stored]
        result.dropped[stored] = "empty: this backbone has no registers"


def read_timm_vit(
    checkpoint: Checkpoint,
    name: str,
    drop: Mapping[str, str],
    *,
    rename: Mapping[str, str] | None = None,
    outside: Mapping[str, str] | None = None,
) -> Translation:
    """Translate a file whose ViT has timm's names, except for `rename` and layer scales (gamma_1).

    Args:
        checkpoint: The opened file.
        name: The family's entry in families.yaml.
        drop: Pattern -> reason for keys of the ViT.
        rename: Pattern -> timm's name.
        outside: Pattern -> reason for keys outside the ViT.
    """
    layer_scales = {r"(blocks\.\d+)\.gamma_([12])$": r"\1.ls\2.gamma"}
    result = keep_names(checkpoint.tensors, drop, layer_scales | dict(rename or {}))
    result.outside = explain(checkpoint.outside, outside or {})
    result.assumed = family(name)
    if "blocks.0.ls1.gamma" in result.weights:
        result.facts["options"] = {"init_values": 1.0}  # builds the layer scales; the file fills them
    return result


def get_embed_dim(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the width D, from the patch embedding; 0 without one."""
    weight = tensors.get("patch_embed.proj.weight")
    return weight.shape[0] if weight is not None and weight.ndim else 0


def is_timm_vit(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether patch embedding and blocks have timm's names."""
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} <= set(tensors)


def has_final_norm(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether there is a norm after the blocks or the pooling; detectors' encoders have none."""
    return any(name.startswith(("norm.", "fc_norm.")) for name in tensors)


def is_plain_vit(tensors: Mapping[str, torch.Tensor], *others: str) -> bool:
    """Return whether all names are timm's for the ViT of arXiv 2010.11929 or match a pattern of `others`."""
    return is_timm_vit(tensors) and all(re.match("|".join((PLAIN_VIT, *others)), name) for name in tensors)


def is_sincos(
    table: torch.Tensor, num_prefix_tokens: int = 1, grid_size: tuple[int, int] | None = None
) -> bool:
    """Return whether a position embedding (1, num_prefix_tokens + L, D) is MAE's fixed one.

    Values are compared to their stored precision. Without `grid_size` the grid is assumed to be square.
    """
    if table.ndim != 3 or table.shape[1] <= num_prefix_tokens:
        return False
    side = round((table.shape[1] - num_prefix_tokens) ** 0.5)
    grid = grid_size or (side, side)
    if table.shape[1] != grid[0] * grid[1] + num_prefix_tokens or table.shape[2] % 4:
        return False
    tolerance = max(1e-5, torch.finfo(table.dtype).eps) if table.dtype.is_floating_point else 0
    fixed = sincos_2d(table.shape[2], grid, num_prefix_tokens)
    return torch.allclose(table.float(), fixed, rtol=0, atol=tolerance)


def find_sincos_grid(table: torch.Tensor, num_prefix_tokens: int) -> tuple[int, int] | None:
    """Return the grid (h, w) of a fixed position embedding (1, prefix + L, D), MAE's or MoCo v3's.

    The values of the table are compared with those of every grid of L patches; None for another table.
    """
    num_patches = table.shape[1] - num_prefix_tokens if table.ndim == 3 else 0
    if num_patches < 1 or table.shape[2] % 4:
        return None
    swapped = table.roll(table.shape[2] // 2, dims=2)  # MoCo v3: rows and columns are exchanged
    for height in range(1, num_patches + 1):
        grid = (height, num_patches // height)
        if num_patches % height:
            continue
        if is_sincos(table, num_prefix_tokens, grid):
            return grid
        if is_sincos(swapped, num_prefix_tokens, grid):
            return grid[1], grid[0]
    return None


def has_moco_pos_embed(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether the position embedding is MoCo v3's: MAE's with its halves swapped.

    The rows come before the columns there (facebookresearch/moco-v3 vits.py).
    """
    table = tensors.get("pos_embed")
    if table is None or table.ndim != 3 or is_sincos(table):
        return False
    return is_sincos(table.roll(table.shape[2] // 2, dims=2))


def parse_numbers(value: Any, what: str, source: str) -> tuple[Any, ...]:
    """Return a JSON list of finite numbers as a tuple; raise UserError for anything else."""
    is_list = isinstance(value, list | tuple)
    if not is_list or not all(isinstance(item, int | float) and abs(item) < MAX_NUMBER for item in value):
        raise UserError(f"{source}: {what} is {str(value)[:80]}", expected="a list of numbers")
    return tuple(value)


def not_expressible(spec: BackboneSpec, to: str, expected: str) -> UserError:
    """Return the error for a backbone that the format `to` cannot express; it describes the backbone."""
    tokens = f"{spec.num_prefix_tokens} prefix token" + ("s" if spec.num_prefix_tokens != 1 else "")
    options = f", options {', '.join(sorted(spec.options))}" if spec.options else ""
    return UserError(
        f"this backbone cannot be written as {to}: its architecture is {spec.arch}, with {tokens}, "
        f"{spec.pos_embed} positions{options}",
        expected=expected,
        fix="write it as mae_bench or timm",
    )


def require_plain_vit(
    spec: BackboneSpec, weights: Mapping[str, torch.Tensor], to: str, *, fc_norm: bool
) -> None:
    """Raise UserError for a backbone that a format of the original ViT cannot express.

    That ViT has one class token, a position embedding and no registers. fc_norm: whether the format can hold
    a norm after the average pooling.
    """
    if spec.arch != "vit" or spec.options or spec.num_prefix_tokens != 1 or "pos_embed" not in weights:
        raise not_expressible(spec, to, "a plain ViT with one class token and a position embedding")
    if not fc_norm and "norm.weight" not in weights:
        raise UserError(
            f"this backbone's final norm comes after the average pooling (fc_norm), which {to} cannot store",
            fix="write it as mae_bench, timm or official_mae",
        )
