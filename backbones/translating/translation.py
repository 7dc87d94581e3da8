"""Translation: a checkpoint in our names, with an account of every key and what its family and file say of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from backbones.families import family
from backbones.reading.source import Checkpoint
from mae_bench.errors import UserError
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.spec import BackboneSpec

HUGE = 1e12  # no number of a description is larger
HEAD = "classifier: every task trains its own"
PROJECTOR = "projection head of the pretraining: no part of the backbone"
MASK_TOKEN = "mask token of the pretraining: no part of the backbone"
# The ViT of arXiv 2010.11929 as timm names it.
BLOCK = r"(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])"
PLAIN_VIT = rf"(?:cls_token|pos_embed|(?:patch_embed\.proj|norm|blocks\.\d+\.{BLOCK})\.(?:weight|bias))$"


@dataclass
class Translation:
    """`weights` has the names of a timm VisionTransformer.

    facts: fields of the BackboneSpec that the file states. assumed: fields that hold for the family where the file is silent.
    renamed, dropped: by the names in `Checkpoint.tensors`. outside: reasons for tensors of `Checkpoint.outside`, whole names,
    where there is more to say than that they stand outside of the ViT. taken: those of `Checkpoint.outside` that fill one of our
    weights all the same, whole names. needed: options, or fields of the BackboneSpec, that nothing in the file tells and that
    the user or the spec in the file must state. hint: what to answer then.
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


class Format(Protocol):
    """What each module of `backbones.formats` offers; `backbones.translating.detect.FORMATS` lists the modules."""

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Whether keys and shapes are this format's; formats of one layout must not fit the same file."""

    def read(self, checkpoint: Checkpoint) -> Translation:
        """Our names; a key that the format does not know keeps its name, and the model's keys decide."""

    def write(
        self, weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
    ) -> None:
        """The reverse of `read`; UserError for a backbone that the format cannot express. Formats without it are only read."""


def keep_names(
    tensors: Mapping[str, torch.Tensor], drop: Mapping[str, str], rename: Mapping[str, str] | None = None
) -> Translation:
    """A translation that keeps every name but those that match a pattern of `rename` (pattern -> our name, as in re.sub); keys
    that match a pattern of `drop` (pattern -> reason) are left out. UserError where two keys get one name."""
    result = Translation()
    for name, tensor in tensors.items():
        if reason := next((reason for pattern, reason in drop.items() if re.match(pattern, name)), None):
            result.dropped[name] = reason
            continue
        ours = next(
            (re.sub(pattern, to, name) for pattern, to in (rename or {}).items() if re.match(pattern, name)),
            name,
        )
        if ours in result.weights:
            raise UserError(
                f"{name} and another tensor would both be {ours}", expected="one tensor for every weight"
            )
        result.weights[ours], result.renamed[name] = tensor, ours
    return result


def drop_empty_registers(result: Translation) -> None:
    """transformers' models without registers save an empty tensor for them."""
    if (registers := result.weights.get("reg_token")) is not None and not registers.numel():
        stored = next(name for name, ours in result.renamed.items() if ours == "reg_token")
        del result.weights["reg_token"], result.renamed[stored]
        result.dropped[stored] = "empty: this backbone has no registers"


def read_timm_vit(
    checkpoint: Checkpoint,
    name: str,
    drop: Mapping[str, str],
    *,
    rename: Mapping[str, str] | None = None,
    outside: Mapping[str, str] | None = None,
    heads: Mapping[int, int] | None = None,
) -> Translation:
    """A file of the family `name` (of families.yaml) whose ViT has timm's names, `rename` and layer scales (gamma_1) aside.

    drop, outside: pattern -> reason for keys of the ViT and for keys beside it. heads: width -> heads of the family's own sizes.
    """
    result = keep_names(
        checkpoint.tensors, drop, {r"(blocks\.\d+)\.gamma_([12])$": r"\1.ls\2.gamma", **(rename or {})}
    )
    result.outside = {
        key: reason
        for key in checkpoint.outside
        for pattern, reason in (outside or {}).items()
        if re.match(pattern, key)
    }
    result.assumed = family(name)
    if num_heads := (heads or {}).get(get_embed_dim(checkpoint.tensors)):
        result.assumed["num_heads"] = num_heads
    if "blocks.0.ls1.gamma" in result.weights:
        result.facts["options"] = {
            "init_values": 1.0
        }  # that there are layer scales; their values are in the file
    return result


def get_embed_dim(tensors: Mapping[str, torch.Tensor]) -> int:
    """Channels of a token, by the patch embedding; 0 where there is none."""
    weight = tensors.get("patch_embed.proj.weight")
    return weight.shape[0] if weight is not None and weight.ndim else 0


def is_vit(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the names of a plain timm VisionTransformer (and of everything that grew from it and has its norm)."""
    return is_timm_vit(tensors) and has_final_norm(tensors)


def is_timm_vit(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether patch embedding and blocks are named as timm names them."""
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} <= set(tensors)


def has_final_norm(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a norm stands behind the blocks or behind the pooling; the encoders of detectors have none."""
    return any(name.startswith(("norm.", "fc_norm.")) for name in tensors)


def is_plain_vit(tensors: Mapping[str, torch.Tensor], *others: str) -> bool:
    """Whether there is a ViT of arXiv 2010.11929 under timm's names and nothing else but keys that match patterns of `others`."""
    return is_timm_vit(tensors) and all(re.match("|".join((PLAIN_VIT, *others)), name) for name in tensors)


def is_sincos(
    table: torch.Tensor, num_prefix_tokens: int = 1, grid_size: tuple[int, int] | None = None
) -> bool:
    """Whether a table (1, prefix + L, D) is MAE's fixed one, to the precision in which it is stored.

    Without `grid_size` the grid is taken for square."""
    if table.ndim != 3 or table.shape[1] <= num_prefix_tokens:
        return False
    side = round((table.shape[1] - num_prefix_tokens) ** 0.5)
    grid = grid_size or (side, side)
    if table.shape[1] != grid[0] * grid[1] + num_prefix_tokens or table.shape[2] % 4:
        return False
    tolerance = max(1e-5, torch.finfo(table.dtype).eps) if table.dtype.is_floating_point else 0
    return torch.allclose(
        table.float(), sincos_2d(table.shape[2], grid, num_prefix_tokens), rtol=0, atol=tolerance
    )


def has_moco_pos_embed(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the position table is MoCo v3's: MAE's with its halves swapped, down before across (facebookresearch/moco-v3
    vits.py)."""
    table = tensors.get("pos_embed")
    if table is None or table.ndim != 3 or is_sincos(table):
        return False
    return is_sincos(table.roll(table.shape[2] // 2, dims=2))


def parse_numbers(value: Any, what: str, source: str) -> tuple[Any, ...]:
    """A JSON list of numbers as a tuple; UserError for other things, and for what is no size, mean or base: infinities."""
    if not isinstance(value, list | tuple) or not all(
        isinstance(item, int | float) and abs(item) < HUGE for item in value
    ):
        raise UserError(f"{source}: {what} is {str(value)[:80]}", expected="a list of numbers")
    return tuple(value)


def not_expressible(spec: BackboneSpec, to: str, expected: str) -> UserError:
    """The refusal of a backbone that the format `to` has no place for, with what the backbone is."""
    tokens = f"{spec.num_prefix_tokens} prefix token" + ("s" if spec.num_prefix_tokens != 1 else "")
    options = f", the options {', '.join(sorted(spec.options))}" if spec.options else ""
    return UserError(
        f"this backbone cannot be written as {to}: its architecture is {spec.arch}, with {tokens}, "
        f"positions {spec.pos_embed}{options}",
        expected=expected,
        fix="write it as mae_bench or timm",
    )


def require_plain_vit(
    spec: BackboneSpec, weights: Mapping[str, torch.Tensor], to: str, *, fc_norm: bool
) -> None:
    """UserError where a format of the official ViT (one class token, no registers) cannot express the backbone."""
    if spec.arch != "vit" or spec.options or spec.num_prefix_tokens != 1 or "pos_embed" not in weights:
        raise not_expressible(spec, to, "a plain ViT with one class token and a position table")
    if not fc_norm and "norm.weight" not in weights:
        raise UserError(
            f"this backbone's last norm stands behind the average pooling (fc_norm); {to} has no place for it",
            fix="write it as mae_bench, timm or official_mae",
        )
