"""The BackboneSpec of a translated checkpoint: sizes from shapes, the rest from the file, its family or the user."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from backbones.translating.translation import Translation, is_sincos
from mae_bench.errors import UserError
from mae_bench.models.create import parse_size
from mae_bench.models.vit import ARCHS, LAYERS
from mae_bench.spec import BackboneSpec

# Width -> heads of the standard ViTs: Ti and S (arXiv 2012.12877), B, L and H (arXiv 2010.11929). Shapes do not tell heads.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
GIVE = "give {0} to inspect or convert, backbones.NAME.spec.{0} to evaluate or run"
HIDDEN = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_g.weight")  # of a plain and of a gated MLP
LARGEST = 4096  # pixels, of an image that a description may name
NAMES = [f.name for f in fields(BackboneSpec)]
SIZES = ("img_size", "patch_size")
CHANNELS = ("mean", "std")
PAIRS = (*SIZES, *CHANNELS)
TYPES = get_type_hints(BackboneSpec)
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {  # of the fields, with what a user may give for them
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
    tuple: ((list, tuple), "a number for each channel"),
    dict: ((Mapping,), "options.NAME=VALUE"),
}


def infer_spec(
    translation: Translation,
    source: str,
    stated: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> BackboneSpec:
    """What the shapes say stands; beneath it the user's `overrides`, the file's facts, the spec that it carries, its family.

    UserError where they contradict the shapes, for an unknown override, and where nothing tells the number of heads.
    """
    try:
        return _infer(translation, source, stated or {}, overrides or {})
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{source}: its description cannot be read: {error}", expected="the fields of a BackboneSpec"
        ) from error


def _infer(
    translation: Translation, source: str, stated: Mapping[str, Any], overrides: Mapping[str, Any]
) -> BackboneSpec:
    layers = (translation.assumed, _to_tuples(stated), translation.facts, _check_overrides(overrides))
    given = {key: value for layer in layers for key, value in layer.items()}
    stated_or_assumed = (
        layers[1] if "options" in stated else layers[0]
    )  # a whole spec, or what holds for the family
    parts = [layer.get("options", {}) for layer in (stated_or_assumed, *layers[2:])]
    given["options"] = {key: value for part in parts for key, value in dict(part).items()}
    needed = () if "options" in stated else translation.needed  # a spec leaves out what is timm's default
    if lacking := [name for name in needed if name not in given["options"] and name not in given]:
        asked = [f"{name}=..." if name in NAMES else f"options.{name}=..." for name in lacking]
        raise UserError(
            f"{source}: nothing tells {' and '.join(lacking)}",
            expected=translation.hint
            or (
                f"of layers, one of {', '.join(LAYERS)}"
                if any(name.endswith("_layer") for name in lacking)
                else ""
            ),
            fix=" and ".join(GIVE.format(field) for field in asked),
        )
    shapes = infer_shape_facts(translation.weights, source, given)
    if wrong := {
        key: (given[key], value) for key, value in shapes.items() if key in given and given[key] != value
    }:
        told = ", ".join(
            f"{key} {said!r} where the shapes say {found!r}" for key, (said, found) in wrong.items()
        )
        raise UserError(f"{source}: {told}", expected="a description that fits the weights")
    merged = {"arch": "vit", **given, **shapes}
    merged.setdefault("pos_embed", infer_pos_embed(translation.weights, merged))
    if "num_heads" not in merged:
        merged["num_heads"] = _assume_num_heads(merged["embed_dim"], source)
        translation.notes.append(
            f"{merged['num_heads']} heads, as is standard for its width: nothing in the file says it"
        )
    return BackboneSpec(**merged)


def _check_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(overrides) - set(NAMES)):
        raise UserError(f"a BackboneSpec has no {', '.join(unknown)}", expected=f"some of {', '.join(NAMES)}")
    return {key: _check_override(key, value) for key, value in overrides.items()}


def _check_override(key: str, value: Any) -> Any:
    """A given value in its field's type: a UserError blames the argument, not the file. Of a size one number is enough."""
    if key in SIZES:
        return parse_size(value, key)
    kind = TYPES[key]
    if words := get_args(kind) if get_origin(kind) is Literal else ():
        fits, expected = value in words, f"one of {', '.join(words)}"
    else:
        classes, expected = KINDS[get_origin(kind) or kind]
        fits = isinstance(value, classes)
    if key in CHANNELS:
        fits = fits and all(isinstance(item, int | float) for item in value)
        expected += f", for example '{key}=[0.5,0.5,0.5]'"
    if not fits:
        raise UserError(f"{key}={value} is given", expected=expected)
    return tuple(value) if key in CHANNELS else value


def _to_tuples(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(item) if key in PAIRS and isinstance(item, list) else item for key, item in value.items()
    }


def _assume_num_heads(embed_dim: int, source: str) -> int:
    if embed_dim not in HEADS:
        raise UserError(
            f"{source}: nothing tells how many heads its {embed_dim} channels are split into",
            expected=f"a standard width ({', '.join(map(str, HEADS))}) or a file that says it",
            fix=GIVE.format("num_heads=N"),
        )
    return HEADS[embed_dim]


def infer_shape_facts(
    weights: Mapping[str, torch.Tensor], source: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields that the tensors' shapes decide. A table that is not square needs `img_size` in `given`."""
    try:
        proj = weights["patch_embed.proj.weight"]
        fc1 = next((weights[name] for name in HIDDEN if name in weights), None)
        if fc1 is None:
            raise KeyError(HIDDEN[0])
        embed_dim, in_chans, *patch = proj.shape
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{source}: no usable {error}", expected="a ViT with a patch embedding and numbered blocks"
        ) from error
    if len(patch) != 2 or not all((*proj.shape, *fc1.shape)):
        raise UserError(
            f"{source}: patch_embed.proj.weight is {tuple(proj.shape)}",
            expected="(width, channels, height, width)",
        )
    if fc1.ndim != 2:
        raise UserError(
            f"{source}: the first layer of its MLP (fc1) is {tuple(fc1.shape)}", expected="(hidden, width)"
        )
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    prefix = int("cls_token" in weights) + registers
    in_table = 0 if given.get("options", {}).get("no_embed_class") else prefix
    facts = {
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "mlp_ratio": _infer_mlp_ratio(fc1.shape[0] // _num_fc1_halves(weights, given), embed_dim),
        "num_prefix_tokens": prefix,
    }
    if given.get("arch", "vit") in ARCHS and (table := weights.get("pos_embed")) is not None:
        rows = table.flatten(1, -2) if table.ndim > 2 else table
        facts["img_size"] = _infer_img_size(rows, in_table, tuple(patch), given.get("img_size"), source)
    if "img_size" not in facts:
        _check_img_size(given.get("img_size"), source)
    return facts


def _check_img_size(size: Any, source: str) -> None:
    """Without a table the description alone tells the image size, and a rotary embedding is made for it."""
    if size is None:
        raise UserError(
            f"{source}: no position table tells the image size", fix=GIVE.format("img_size=[H,W]")
        )
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side <= LARGEST for side in size):
        raise UserError(
            f"{source}: images of {size}", expected=f"height and width, whole numbers to {LARGEST}"
        )


def _num_fc1_halves(weights: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> int:
    """2 where fc1 of an Eva makes gate and value at once: timm's Eva counts one of them, its VisionTransformer both."""
    fc1, fc2 = (weights.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    packed = (
        given.get("arch") == "eva"
        and fc1 is not None
        and fc2 is not None
        and fc1.shape[0] == 2 * fc2.shape[-1]
    )
    return 2 if packed else 1


def _infer_mlp_ratio(hidden: int, width: int) -> float:
    """The ratio from which timm computes `hidden`: it cuts the product off, which is 487.99... for 488 / 224 * 224."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _infer_img_size(
    table: torch.Tensor, prefix: int, patch: tuple[int, ...], given: Any, source: str
) -> tuple[int, int]:
    """Image size of a table (1, prefix + L, D): the given one if it has L patches, else the square one. `prefix` counts the
    prefix tokens that have a row."""
    num_patches = table.shape[1] - prefix if table.ndim == 3 else 0
    if given and (given[0] // patch[0]) * (given[1] // patch[1]) == num_patches:
        return tuple(given)
    side = round(max(num_patches, 0) ** 0.5)
    if not num_patches or side * side != num_patches:
        raise UserError(
            f"{source}: a position table of shape {tuple(table.shape)} with {prefix} prefix tokens is for no square image",
            expected="one row a prefix token and one a patch",
            fix="if the images were not square, " + GIVE.format("img_size=[H,W]"),
        )
    return side * patch[0], side * patch[1]


def infer_pos_embed(weights: Mapping[str, torch.Tensor], spec: Mapping[str, Any]) -> str:
    """ "sincos" if the table is MAE's fixed one, "learned" for another table, "none" without one."""
    if "pos_embed" not in weights:
        return "none"
    if spec["arch"] != "vit" or spec.get("options"):
        return "learned"
    grid = tuple(size // patch for size, patch in zip(spec["img_size"], spec["patch_size"], strict=True))
    return "sincos" if is_sincos(weights["pos_embed"], spec["num_prefix_tokens"], grid) else "learned"
