"""Translation: a checkpoint in our names, with an account of every key and what its family and file say of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from backbones.source import Checkpoint
from mae_bench.errors import UserError
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.spec import BackboneSpec

HEAD = "classifier: every task trains its own"


@dataclass
class Translation:
    """`weights` has the names of a timm VisionTransformer.

    facts: fields of the BackboneSpec that the file states. assumed: fields that hold for the family where the file is silent.
    renamed, dropped: by the names in `Checkpoint.tensors`. outside: reasons for tensors of `Checkpoint.outside`, whole names,
    where there is more to say than that they stand outside of the ViT.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)


class Format(Protocol):
    """What each module of `backbones.formats` offers; `backbones.detect.FORMATS` lists the modules."""

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Whether keys and shapes are this format's; formats of one layout must not fit the same file."""

    def read(self, checkpoint: Checkpoint) -> Translation:
        """Our names; a key that the format does not know keeps its name, and the model's keys decide."""

    def write(self, weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]) -> None:
        """The reverse of `read`; UserError for a backbone that the format cannot express. Formats without it are only read."""


def keep_names(tensors: Mapping[str, torch.Tensor], drop: Mapping[str, str]) -> Translation:
    """A translation that renames nothing; keys that match a pattern of `drop` (pattern -> reason) are left out."""
    result = Translation()
    for name, tensor in tensors.items():
        if reason := next((reason for pattern, reason in drop.items() if re.match(pattern, name)), None):
            result.dropped[name] = reason
        else:
            result.weights[name], result.renamed[name] = tensor, name
    return result


def is_vit(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the names of a plain timm VisionTransformer (and of everything that grew from it)."""
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} <= set(tensors)


def is_sincos(table: torch.Tensor, num_prefix_tokens: int = 1, grid_size: tuple[int, int] | None = None) -> bool:
    """Whether a table (1, prefix + L, D) is MAE's fixed one, to the precision in which it is stored.

    Without `grid_size` the grid is taken for square."""
    side = round((table.shape[1] - num_prefix_tokens) ** 0.5)
    grid = grid_size or (side, side)
    if table.shape[1] != grid[0] * grid[1] + num_prefix_tokens or table.shape[2] % 4:
        return False
    tolerance = max(1e-5, torch.finfo(table.dtype).eps) if table.dtype.is_floating_point else 0
    return torch.allclose(table.float(), sincos_2d(table.shape[2], grid, num_prefix_tokens), rtol=0, atol=tolerance)


def numbers(value: Any, what: str, source: str) -> tuple[Any, ...]:
    """A JSON list of numbers as a tuple."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, int | float) for item in value):
        raise UserError(f"{source}: {what} is {value!r}", expected="a list of numbers")
    return tuple(value)


def require_plain(spec: BackboneSpec, weights: Mapping[str, torch.Tensor], to: str, *, fc_norm: bool) -> None:
    """UserError where a format of the official ViT (one class token, no registers) cannot express the backbone."""
    if spec.arch != "vit" or spec.options or spec.num_prefix_tokens != 1 or "pos_embed" not in weights:
        raise UserError(
            f"a {spec.arch} with {spec.num_prefix_tokens} prefix tokens and {spec.pos_embed} positions cannot be written as {to}",
            expected="a plain ViT with one class token and a position table", fix="write it as mae_bench or timm",
        )  # fmt: skip
    if not fc_norm and "norm.weight" not in weights:
        raise UserError(
            f"this backbone's last norm stands behind the average pooling (fc_norm); {to} has no place for it",
            fix="write it as mae_bench, timm or official_mae",
        )
