"""Read the BackboneSpec fields of a timm model by its name, so that the spec builds the same model."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import GELUTanh
from timm.layers.attention import AttentionRope
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from backbones.reading.source import VIT_CLASSES
from backbones.translating.infer import infer_spec
from backbones.translating.structure import (
    Weights,
    count_blocks,
    infer_beit_facts,
    infer_eva_options,
    infer_global_pool,
    infer_vit_options,
)
from backbones.translating.translation import Translation
from mae_bench.errors import UserError
from mae_bench.models.vit import LAYERS, OPTIONS, build_vit

# Keywords that model_args may set: sizes and layers, nothing that opens a file or a connection.
SIZES = {
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "reg_tokens",
    "num_reg_tokens",
    "num_classes",
    "global_pool",
    "fc_norm",
    "use_fc_norm",
    "dynamic_img_size",
}
ARGS = SIZES.union(*OPTIONS.values())
ROPES = {"RotaryEmbeddingCat": "cat", "RotaryEmbeddingMixed": "mixed", "RotaryEmbeddingDinoV3": "dinov3"}
ROPE_DEFAULTS = {
    "ref_feat_shape": None,
    "rope_temperature": 10000.0,
    "rope_grid_offset": 0.0,
    "rope_grid_indexing": "ij",
    "rope_rotate_half": False,
}
# Attributes of training, initialisation and output, which do not change a model's features.
NOT_FEATURES = {
    "training",
    "num_classes",
    "global_pool",
    "weight_init_mode",
    "fix_init",
    "head_init_scale",
    "init_values",
    "pos_resample",
    "num_features",
    "head_hidden_size",
    "img_size",
    "strict_img_size",
    "flatten",
    "inplace",
    "pool_include_prefix",
    "grad_checkpointing",
}


def infer_named_facts(name: str, args: Mapping[str, Any], weights: Weights, source: str) -> dict[str, Any]:
    """Return BackboneSpec fields for timm's model `name` with keywords `args`.

    `arch` is the name itself where the fields cannot rebuild the model. Raise UserError for a model that timm
    does not know, that is no ViT or that cannot be built.
    """
    layout = infer_global_pool(weights)
    as_published = _build(name, args, count_blocks(weights), source)
    without_pooling = {**args, "global_pool": layout}  # attention pooling is part of the classifier
    model = _build(name, without_pooling, count_blocks(weights), source)
    facts = _collect_facts(model)
    if as_published.global_pool in ("token", "avg"):
        facts["global_pool"] = as_published.global_pool
    spec = infer_spec(Translation(weights=dict(weights), facts={"pos_embed": "learned", **facts}), source)
    dynamic_img_size = getattr(model, "dynamic_img_size", False)
    with torch.device("meta"):
        rebuilt = build_vit(spec, global_pool=layout, dynamic_img_size=dynamic_img_size)
    if not find_differences(model, rebuilt):
        return facts
    if args or isinstance(model, Beit | VisionTransformerSAM):
        raise UserError(f"{source}: {name} with {dict(args)}", expected="a ViT built from supported layers")
    return {key: value for key, value in facts.items() if key != "options"} | {"arch": name}


def _build(name: str, args: Mapping[str, Any], depth: int, source: str) -> Any:
    """Build the model without weights (on the meta device) and without a classifier."""
    if not timm.is_model(name):
        raise UserError(f"{source}: the architecture {name!r}", expected="one that the installed timm has")
    unknown = sorted(set(args) - ARGS)
    if unknown:
        raise UserError(
            f"{source}: model_args sets {', '.join(unknown)}", expected=f"some of {', '.join(sorted(ARGS))}"
        )
    if args.get("depth", depth) != depth:  # checked before a model of a made-up depth is built
        raise UserError(
            f"{source}: model_args states depth {args['depth']!r}", expected=f"{depth}, as in the weights"
        )
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, **{**args, "num_classes": 0})
    except Exception as error:  # a made-up argument raises any type of error inside timm
        raise UserError(f"{source}: timm cannot build {name} with {dict(args)}: {error}") from error
    if type(model) not in VIT_CLASSES:  # a subclass has more tokens
        raise UserError(
            f"{source}: {name} is a {type(model).__name__}",
            expected=f"one of timm's {', '.join(c.__name__ for c in VIT_CLASSES)}",
        )
    return model


def _collect_facts(model: Any) -> dict[str, Any]:
    """Return the fields that a model's attributes and tensors show."""
    weights = model.state_dict()
    patch = model.patch_embed.patch_size
    # In whole patches: SigLIP's 384 pixels hold 27 patches of 14, which are 378.
    img_size = tuple(side * pixels for side, pixels in zip(model.patch_embed.grid_size, patch, strict=True))
    attention = next(module for module in model.blocks.modules() if hasattr(module, "num_heads"))
    facts: dict[str, Any] = {
        "img_size": img_size,
        "patch_size": tuple(patch),
        "in_chans": model.patch_embed.proj.in_channels,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attention.num_heads,
        "num_prefix_tokens": getattr(model, "num_prefix_tokens", 0),
        "norm_eps": getattr(getattr(model.blocks[0], "norm1", None), "eps", 1e-6),
    }
    if isinstance(model, VisionTransformer):
        return facts | _vit_facts(model, weights)
    if isinstance(model, Beit):
        return facts | infer_beit_facts(weights, "timm") | {"img_size": facts["img_size"]}
    if isinstance(model, Eva):
        return facts | _eva_facts(model, weights)
    return facts | _sam_facts(model)


def _vit_facts(model: Any, weights: Weights) -> dict[str, Any]:
    options = infer_vit_options(weights) | _activation_option(model.blocks[0])
    return {"arch": "vit", "options": options | _no_embed_class_option(options, model)}


def _eva_facts(model: Any, weights: Weights) -> dict[str, Any]:
    options = infer_eva_options(weights)
    options |= _no_embed_class_option(options, model)
    if isinstance(model.blocks[0].attn, AttentionRope):
        options["attn_type"] = "rope"
    if isinstance(model.blocks[0], EvaBlockPostNorm):
        options["use_post_norm"] = True
    if model.rope is not None:
        options |= _rope_options(model.rope)
    return {"arch": "eva", "options": options, "pos_embed": "learned" if model.rope is None else "rope"}


def _no_embed_class_option(options: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return no_embed_class as the model has it; remove from `options` what the table suggests."""
    options.pop("no_embed_class", None)
    return {"no_embed_class": True} if model.no_embed_class and model.num_prefix_tokens else {}


def _rope_options(rope: Any) -> dict[str, Any]:
    """Return the options of Eva for its rotary positions, without those at timm's default."""
    options: dict[str, Any] = {"use_rot_pos_emb": True}
    kind = ROPES.get(type(rope).__name__, "cat")
    if kind != "cat":
        options["rope_type"] = kind
    shape = getattr(rope, "ref_feat_shape", None)
    found = {
        "ref_feat_shape": list(shape) if shape else None,
        "rope_temperature": float(getattr(rope, "temperature", 10000)),
        "rope_grid_offset": float(getattr(rope, "grid_offset", 0)),
        "rope_grid_indexing": getattr(rope, "grid_indexing", "ij"),
        "rope_rotate_half": bool(getattr(rope, "rotate_half", False)),
    }
    return options | {key: value for key, value in found.items() if value != ROPE_DEFAULTS[key]}


def _sam_facts(model: Any) -> dict[str, Any]:
    neck = model.neck[0].out_channels if isinstance(model.neck, nn.Sequential) else 0
    options = _activation_option(model.blocks[0]) | {
        "use_abs_pos": model.pos_embed is not None,
        "use_rel_pos": model.blocks[0].attn.use_rel_pos,
        "window_size": max(block.window_size for block in model.blocks),
        "global_attn_indexes": [i for i, block in enumerate(model.blocks) if not block.window_size],
        "neck_chans": neck,
    }
    return {"arch": "sam", "options": options, "pos_embed": "relative"}


def _activation_option(block: Any) -> dict[str, Any]:
    """Return the option act_layer; timm's default, GELU, is left out."""
    found = _describe_module(getattr(getattr(block, "mlp", None), "act", nn.GELU()))
    known = {
        _describe_module(layer()): name
        for name, layer in LAYERS.items()
        if name not in ("gelu", "swiglu_packed")
    }
    return {"act_layer": known[found]} if found in known else {}


def find_differences(model: nn.Module, rebuilt: nn.Module) -> list[str]:
    """Return the names of modules that differ in class, in a plain attribute or in a tensor's shape."""
    left, right = _list_modules(model), _list_modules(rebuilt)
    found = sorted(set(left) ^ set(right))
    for name in [name for name in left if name in right]:
        values_differ = _collect_values(left[name]) != _collect_values(right[name], left[name])
        kinds_differ = name != "" and _describe_module(left[name]) != _describe_module(right[name])
        if values_differ or kinds_differ:
            found.append(name or "(the model itself)")
    return found


def _list_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if not name.startswith("head") and type(module) is not nn.Identity
    }


def _describe_module(module: nn.Module) -> str:
    """Return what a module computes: the name of its class, for GELU with its settings."""
    if isinstance(module, GELUTanh):
        return _describe_module(nn.GELU(approximate="tanh"))
    return repr(module) if isinstance(module, nn.GELU) else type(module).__name__.removeprefix("AnySize")


def _collect_values(module: nn.Module, other: nn.Module | None = None) -> dict[str, Any]:
    """Return a module's plain attributes (of those in `other`, if given) and its tensors' shapes."""
    plain = {
        key: tuple(value) if isinstance(value, list | tuple) else value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key not in NOT_FEATURES
        and (other is None or hasattr(other, key))
        and _is_plain(value)
    }
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return plain | {key: tuple(tensor.shape) for key, tensor in tensors}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float) for item in value)
    return value is None or isinstance(value, int | float | str)
