"""Infer the BackboneSpec of a translated checkpoint from shapes, the file, its family and the user.

L patches, D width, C channels, H W image, p patch side.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from backbones.translating.grids import MissingGrid, count_prefix_tokens, find_grids
from backbones.translating.heads import list_divisors, list_plausible
from backbones.translating.structure import count_blocks
from backbones.translating.translation import Translation, is_sincos
from mae_bench.errors import UserError
from mae_bench.models.create import parse_size
from mae_bench.models.vit import LAYERS
from mae_bench.spec import BackboneSpec

GIVE = "give {0} to inspect or convert, backbones.NAME.spec.{0} to evaluate or run, --set {0} to reconstruct"
HAS_ROWS = GIVE.format("options.no_embed_class=false")
PREFIX_ROWS = f"if class token and registers have rows in the position table, {HAS_ROWS}"
HIDDEN = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_g.weight")  # first layer of a plain and of a gated MLP
TABLES = re.compile("pos_embed|relative_position_bias_table")
MAX_LISTED = 4  # image sizes in an error message
MAX_IMG_SIZE = 4096  # pixels, for an image size that only a description states
NAMES = [f.name for f in fields(BackboneSpec)]
SIZES = ("img_size", "patch_size")
CHANNELS = ("mean", "std")
PAIRS = (*SIZES, *CHANNELS)
TYPES = get_type_hints(BackboneSpec)
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {  # type of a field -> types a user may give, in words
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
    """Build the BackboneSpec of a translated checkpoint.

    Order of preference: the tensors' shapes, the user's `overrides`, the facts of the file, the spec `stated`
    in the file, its family. Raise UserError where a description contradicts the shapes, for an unknown
    override, and where the number of heads or the grid of patches cannot be inferred.
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
    given = _merge(translation, stated, overrides)
    if "options" not in stated:  # a complete spec leaves out options with timm's default
        _require_needed(translation, given, source)
    if "img_size" not in given:
        given |= _choose_img_size(translation, given)
    shapes = infer_shape_facts(translation.weights, source, given)
    wrong = [key for key, value in shapes.items() if key in given and given[key] != value]
    if wrong:
        differences = ", ".join(f"{key} {given[key]!r} where the shapes say {shapes[key]!r}" for key in wrong)
        raise UserError(f"{source}: {differences}", expected="a description that fits the weights")
    merged = {"arch": "vit", **given, **shapes}
    merged.setdefault("pos_embed", infer_pos_embed(translation.weights, merged))
    if "num_heads" not in merged:
        raise MissingHeads(source, merged["embed_dim"], merged["depth"], given=overrides)
    try:
        return BackboneSpec(**merged)
    except UserError as error:
        raise UserError(f"{source}: {error.given}", expected=error.expected, fix=error.fix) from error


def _merge(
    translation: Translation, stated: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge all descriptions, later ones first in preference; options are merged one by one."""
    spec, checked = _to_tuples(stated), _check_overrides(overrides)
    given: dict[str, Any] = {**translation.assumed, **spec, **translation.facts, **checked}
    base = (
        spec if "options" in stated else translation.assumed
    )  # a complete spec replaces the family's options
    options: dict[str, Any] = {}
    for part in (base, translation.facts, checked):
        options |= dict(part.get("options", {}))
    given["options"] = options
    return given


def _choose_img_size(translation: Translation, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image size with the best evidence where several grids explain the tables; {} for none."""
    weights, grids = translation.weights, find_grids(translation.weights, given) or []
    for size, evidence in translation.img_sizes.items() if len(grids) > 1 else ():
        if _count_patches(size, weights["patch_embed.proj.weight"].shape[2:]) in grids:
            translation.sources["img_size"] = evidence
            return {"img_size": size}
    return {}


def _count_patches(size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    return tuple(side // pixels for side, pixels in zip(size, patch, strict=True))


def _require_needed(translation: Translation, given: Mapping[str, Any], source: str) -> None:
    """Raise UserError, with what to give, for needed fields and options that are missing."""
    missing = [name for name in translation.needed if name not in given["options"] and name not in given]
    if not missing:
        return
    expected = translation.hint
    if not expected and any(name.endswith("_layer") for name in missing):
        expected = f"of layers, one of {', '.join(LAYERS)}"
    asked = [f"{name}=..." if name in NAMES else f"options.{name}=..." for name in missing]
    raise UserError(
        f"{source}: {' and '.join(missing)} cannot be inferred from the file",
        expected=expected,
        fix=" and ".join(GIVE.format(name) for name in asked),
    )


def _check_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(overrides) - set(NAMES))
    if unknown:
        raise UserError(f"a BackboneSpec has no {', '.join(unknown)}", expected=f"some of {', '.join(NAMES)}")
    return {key: _check_override(key, value) for key, value in overrides.items()}


def _check_override(key: str, value: Any) -> Any:
    """Return an override in its field's type; raise UserError, which blames the override, not the file.

    A single number is accepted for a size.
    """
    if key in SIZES:
        return parse_size(value, key)
    kind = TYPES[key]
    if get_origin(kind) is Literal:
        words = get_args(kind)
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


def _to_tuples(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec with JSON lists of sizes and channels as tuples."""
    return {
        key: tuple(value) if key in PAIRS and isinstance(value, list) else value
        for key, value in spec.items()
    }


class MissingHeads(UserError):
    """The question for the number of heads, where there is no evidence for it.

    Attributes:
        divisors: numbers of heads that divide the width.
        plausible: those that are compared on images, see `backbones.attention_heads`.

    given: the overrides so far, which the command that compares them repeats.
    """

    def __init__(
        self,
        source: str,
        width: int,
        depth: int,
        field: str = "num_heads",
        fix: str = GIVE.format("num_heads=N"),
        given: Mapping[str, Any] | None = None,
    ) -> None:
        words = [source, *(f"{key}={json.dumps(value, default=str)}" for key, value in (given or {}).items())]
        command = f"mae-bench inspect {shlex.join(words)} --images FOLDER"
        self.divisors, self.plausible = list_divisors(width), list_plausible(width)
        super().__init__(
            f"{source}: {field} cannot be inferred from the file (width {width}, depth {depth})",
            expected=f"one of {', '.join(map(str, self.divisors))}",
            fix=f"{fix}; {command} compares them on images",
        )


def infer_shape_facts(
    weights: Mapping[str, torch.Tensor], source: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields that the tensors' shapes determine, and `img_size`.

    Where several grids explain the position tables, `img_size` is that of `given`, and MissingGrid is raised
    without one. Raise UserError for shapes that are no ViT's.
    """
    proj, fc1 = _get_layers(weights, source)
    embed_dim, in_chans, *patch_size = proj.shape
    hidden = fc1.shape[0] // _num_fc1_halves(weights, given)
    facts = {
        "patch_size": tuple(patch_size),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": count_blocks(weights),
        "mlp_ratio": _infer_mlp_ratio(hidden, embed_dim),
        "num_prefix_tokens": count_prefix_tokens(weights),
    }
    grids = find_grids(weights, given)
    if grids is None:
        _check_img_size(given.get("img_size"), source)
        return facts
    return facts | {
        "img_size": _infer_img_size(weights, grids, (patch_size[0], patch_size[1]), given, source)
    }


def _get_layers(weights: Mapping[str, torch.Tensor], source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patch embedding (D, C, p, p) and the MLP's first layer (hidden, D), checked."""
    proj = weights.get("patch_embed.proj.weight")
    fc1 = next((weights[name] for name in HIDDEN if name in weights), None)
    if proj is None or fc1 is None:
        missing = "patch_embed.proj.weight" if proj is None else HIDDEN[0]
        raise UserError(
            f"{source}: no usable {missing!r}", expected="a ViT with a patch embedding and numbered blocks"
        )
    if proj.ndim != 4 or not all((*proj.shape, *fc1.shape)):
        raise UserError(
            f"{source}: patch_embed.proj.weight is {tuple(proj.shape)}",
            expected="a patch embedding (width, channels, height, width)",
        )
    if fc1.ndim != 2:
        raise UserError(
            f"{source}: the first layer of its MLP (fc1) is {tuple(fc1.shape)}", expected="(hidden, width)"
        )
    return proj, fc1


def _check_img_size(size: Any, source: str) -> None:
    """Check an image size that only the description states: a rotary embedding is computed for it."""
    if size is None:
        raise UserError(
            f"{source}: img_size cannot be inferred from the file (no position embedding)",
            fix=GIVE.format("img_size=[H,W]"),
        )
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side <= MAX_IMG_SIZE for side in size):
        raise UserError(
            f"{source}: images of {size}", expected=f"height and width, whole numbers up to {MAX_IMG_SIZE}"
        )


def _num_fc1_halves(weights: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> int:
    """Return 2 where fc1 of an Eva computes gate and value at once.

    The mlp_ratio of timm's Eva counts one of them, that of its VisionTransformer both.
    """
    fc1 = weights.get("blocks.0.mlp.fc1.weight")
    fc2 = weights.get("blocks.0.mlp.fc2.weight")
    if given.get("arch") != "eva" or fc1 is None or fc2 is None:
        return 1
    return 2 if fc1.shape[0] == 2 * fc2.shape[-1] else 1


def _infer_mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio from which timm computes `hidden`.

    timm truncates the product, which is 487.99... for 488 / 224 * 224.
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _infer_img_size(
    weights: Mapping[str, torch.Tensor],
    grids: list[tuple[int, int]],
    patch: tuple[int, int],
    given: Mapping[str, Any],
    source: str,
) -> tuple[int, int]:
    """Return the image size of position tables that `grids` explain: the only one, or the one given."""
    size = given.get("img_size")
    if size and _count_patches(size, patch) in grids:
        return tuple(size)
    sizes = [(h * patch[0], w * patch[1]) for h, w in grids]
    if len(grids) > 1 and not size:
        raise MissingGrid(source, grids, sizes, GIVE.format("img_size=[H,W]"))
    if len(grids) > 1:
        listed = " or ".join(map(str, sizes[:MAX_LISTED]))
        raise UserError(
            f"{source}: img_size {size} where the shapes say {listed}",
            expected="a description that fits the weights",
            fix=PREFIX_ROWS if given.get("options", {}).get("no_embed_class") else "",
        )
    if not grids:
        tables = [f"{name} {tuple(t.shape)}" for name, t in weights.items() if TABLES.search(name)]
        raise UserError(
            f"{source}: its position tables fit no grid of patches: {', '.join(tables[:2])}, with "
            f"{count_prefix_tokens(weights)} prefix tokens",
            expected="one row per prefix token and one per patch",
        )
    return sizes[0]


def infer_pos_embed(weights: Mapping[str, torch.Tensor], spec: Mapping[str, Any]) -> str:
    """Return "sincos" for MAE's fixed position embedding, "learned" for another one, "none" without one."""
    if "pos_embed" not in weights:
        return "none"
    if spec["arch"] != "vit" or spec.get("options"):
        return "learned"
    grid = tuple(size // patch for size, patch in zip(spec["img_size"], spec["patch_size"], strict=True))
    return "sincos" if is_sincos(weights["pos_embed"], spec["num_prefix_tokens"], grid) else "learned"
