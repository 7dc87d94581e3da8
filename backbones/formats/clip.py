"""clip: image towers (ViT) of OpenAI's CLIP and OpenCLIP, with or without text tower and training state."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from backbones.families import family
from backbones.reading.source import OPEN_CLIP_CONFIG, Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.translation import Translation, parse_numbers
from mae_bench.errors import UserError

NAMES = Naming(
    top={
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1": "patch_embed.proj",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
    },
    block={
        "ln_1": "norm1",
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj": "attn.proj",
        "ls_1.gamma": "ls1.gamma",
        "ln_2": "norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "ls_2.gamma": "ls2.gamma",
    },
    blocks=("transformer.resblocks.{}.",),
    drop={r"proj$": "projection to the space shared with texts: not part of the backbone"},
)
TOWER = {
    "class_embedding",
    "conv1.weight",
    "positional_embedding",
    "transformer.resblocks.0.attn.in_proj_weight",
}
OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}  # buffers of its released archives
TEXT = "text tower, or the logits' scale"
HEAD_WIDTH = 64  # channels per head in every tower of OpenAI's clip/model.py, default of OpenCLIP's config


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has the names of CLIP's image tower; raise UserError for its ResNets."""
    if any(name.endswith("attnpool.positional_embedding") for name in checkpoint.stored):
        raise UserError(f"{checkpoint.source} holds a ResNet tower of CLIP", expected="a ViT")
    return set(checkpoint.tensors) >= TOWER


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the image tower without projection and text tower.

    Weights of GELU and quick GELU look the same, and the wrong one costs accuracy without any error: where
    neither OpenAI's marks nor OpenCLIP's config show the activation, the user must state it.
    """
    source, vision = checkpoint.source, _get_section(checkpoint, "model_cfg", "vision_cfg")
    if vision.get("act_kwargs") or any(name.startswith("attn_pool.") for name in checkpoint.tensors):
        raise UserError(
            f"{source}: an activation of its own, or attention pooling (CoCa)", expected="CLIP's own tower"
        )
    norm_after_pool = vision.get("pool_type") == "avg" and vision.get("final_ln_after_pool")
    naming = replace(NAMES, top={**NAMES.top, "ln_post": "fc_norm"}) if norm_after_pool else NAMES
    result = naming.read(checkpoint.tensors, source)
    proj = result.weights.get("patch_embed.proj.weight")
    if proj is None or proj.ndim != 4:
        raise UserError(f"{source} has no usable conv1.weight", expected="the image tower of CLIP")
    add_axes(result)
    if "norm_pre.weight" not in result.weights:
        _add_patch_bias(result, source, vision)
    result.outside = {name: TEXT for name in checkpoint.outside if ".visual." not in f".{name}"}
    result.outside |= dict.fromkeys(OPENAI_MARKS & set(checkpoint.outside), "a size of the model: no weights")
    result.assumed, result.needed = family("clip"), ("act_layer",)
    # mlfoundations/open_clip src/open_clip/model.py (resize_pos_embed); OpenAI's code resamples nothing
    result.assumed["pos_resample"] = "bicubic_antialias"
    result.facts = _read_facts(checkpoint, result.weights, vision)
    result.facts["options"] = _infer_options(checkpoint, result.weights)
    if "num_heads" in result.facts and "head_width" not in vision:
        result.sources["num_heads"] = f"{HEAD_WIDTH} channels per head, as in the authors' code"
    return result


def add_axes(result: Translation) -> None:
    """Add leading axes to class embedding (D,) and position embedding (1 + L, D), as in timm."""
    for name, num_axes in (("cls_token", 2), ("pos_embed", 1)):
        if name in result.weights:
            result.weights[name] = result.weights[name][(None,) * num_axes]
            result.reshaped[name] = "leading axes added"


def _add_patch_bias(result: Translation, source: str, vision: Mapping[str, Any]) -> None:
    """Add a zero bias, which timm's patch embedding has without a norm before the blocks (CLIPA)."""
    if not vision:
        raise UserError(
            f"{source} has no ln_pre, like CLIPA's towers (arXiv 2305.07017): whether its final norm comes "
            "before or after the pooling cannot be inferred from the file",
            expected=f"{OPEN_CLIP_CONFIG} next to the file",
        )
    proj = result.weights["patch_embed.proj.weight"]
    result.weights["patch_embed.proj.bias"] = torch.zeros_like(proj[:, 0, 0, 0])
    result.new["patch_embed.proj.bias"] = "zeros: the layout has no bias here"


def _infer_options(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the spec's options; the initial value of a layer scale only shows that there is one."""
    options: dict[str, Any] = {}
    if "norm_pre.weight" in weights:
        options["pre_norm"] = True
    if "blocks.0.ls1.gamma" in weights:
        options["init_values"] = 1.0
    if OPEN_CLIP_CONFIG in checkpoint.beside:
        is_quick = _get_section(checkpoint, "model_cfg").get("quick_gelu")
        options["act_layer"] = "quick_gelu" if is_quick else "gelu"
    elif OPENAI_MARKS & {*checkpoint.outside, *checkpoint.extras}:
        options["act_layer"] = "quick_gelu"
    return options


def _read_facts(
    checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], vision: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the facts of OpenCLIP's config, and the heads of OpenAI's towers."""
    embed_dim, source = weights["patch_embed.proj.weight"].shape[0], checkpoint.source
    described = vision or OPENAI_MARKS & {*checkpoint.outside, *checkpoint.extras}
    head_width = vision.get("head_width", HEAD_WIDTH if described else None)
    size = vision.get("image_size")
    if not isinstance(head_width, int | None):
        raise UserError(f"{source}: head_width is {head_width!r}", expected="a number")
    facts: dict[str, Any] = {}
    if head_width:
        facts["num_heads"] = embed_dim // head_width
    if vision.get("pool_type") == "avg":
        facts["global_pool"] = "avg"
    if size is not None:
        sides = size if isinstance(size, list) else [size, size]
        facts["img_size"] = parse_numbers(sides, "image_size", source)
    return facts | read_preprocessing(checkpoint)


def read_preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return mean, std and interpolation of OpenCLIP's config, for its own and timm's towers."""
    config = _get_section(checkpoint, "preprocess_cfg")
    facts: dict[str, Any] = {
        key: parse_numbers(config[key], key, checkpoint.source) for key in ("mean", "std") if key in config
    }
    if config.get("interpolation") in ("bicubic", "bilinear"):
        facts["interpolation"] = config["interpolation"]
    return facts


def _get_section(checkpoint: Checkpoint, *keys: str) -> dict[str, Any]:
    """Return a section of open_clip_config.json, {} without one."""
    section: dict[str, Any] = checkpoint.beside.get(OPEN_CLIP_CONFIG, {})
    for key in keys:
        value: Any = section.get(key, {})
        if not isinstance(value, dict):
            raise UserError(
                f"{checkpoint.source}: {key} in {OPEN_CLIP_CONFIG} is {value!r}", expected="an object"
            )
        section = value
    return section
