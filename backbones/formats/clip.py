"""clip: image towers (ViT) of OpenAI's CLIP and of OpenCLIP, alone, beside their text tower, or in training files."""

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
    drop={r"proj$": "projection to the space shared with texts: no part of the backbone"},
)
TOWER = {
    "class_embedding",
    "conv1.weight",
    "positional_embedding",
    "transformer.resblocks.0.attn.in_proj_weight",
}
OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}  # buffers of its released archives
TEXT = "text tower, or the logits' scale"
# Width -> channels a head, by OpenCLIP's src/open_clip/model_configs; 64 in OpenAI's clip/model.py.
HEAD_WIDTHS = {384: 64, 512: 64, 768: 64, 896: 64, 1024: 64, 1280: 80, 1408: 88, 1664: 104, 1792: 112}


def fits(checkpoint: Checkpoint) -> bool:
    """The names of CLIP's image tower; UserError for its ResNets."""
    if any(name.endswith("attnpool.positional_embedding") for name in checkpoint.stored):
        raise UserError(f"{checkpoint.source} holds a ResNet tower of CLIP", expected="a ViT")
    return set(checkpoint.tensors) >= TOWER


def read(checkpoint: Checkpoint) -> Translation:
    """The image tower as timm has it; projection and text tower are left out.

    Weights of GELU and of quick GELU look the same, and the wrong one costs accuracy without any error: where neither OpenAI's
    marks nor OpenCLIP's config tell, the user must.
    """
    source, vision = checkpoint.source, _get_section(checkpoint, "model_cfg", "vision_cfg")
    if vision.get("act_kwargs") or any(name.startswith("attn_pool.") for name in checkpoint.tensors):
        raise UserError(
            f"{source}: an activation of its own, or pooling by attention (CoCa)", expected="CLIP's own tower"
        )
    after_pool = vision.get("pool_type") == "avg" and vision.get("final_ln_after_pool")
    result = replace(NAMES, top={**NAMES.top, "ln_post": "fc_norm" if after_pool else "norm"}).read(
        checkpoint.tensors, source
    )
    if (filters := result.weights.get("patch_embed.proj.weight")) is None or filters.ndim != 4:
        raise UserError(f"{source} has no usable conv1.weight", expected="the image tower of CLIP")
    add_axes(result)
    if "norm_pre.weight" not in result.weights:
        _add_patch_bias(result, source, vision)
    result.outside = {name: TEXT for name in checkpoint.outside if ".visual." not in f".{name}"}
    result.outside |= dict.fromkeys(OPENAI_MARKS & set(checkpoint.outside), "a size of the model: no weights")
    result.assumed, result.needed = family("clip"), ("act_layer",)
    result.facts = _read_facts(checkpoint, result.weights, vision) | {
        "options": _infer_options(checkpoint, result.weights)
    }
    return result


def add_axes(result: Translation) -> None:
    """Class embedding (D) and position table (1 + L, D) in the shapes that timm gives them."""
    for name, axes in (("cls_token", 2), ("pos_embed", 1)):
        if name in result.weights:
            result.weights[name] = result.weights[name][(None,) * axes]
            result.reshaped[name] = "leading axes added"


def _add_patch_bias(result: Translation, source: str, vision: Mapping[str, Any]) -> None:
    """CLIPA's towers have no norm in front of the blocks; timm's patch embedding then has a bias."""
    if not vision:
        raise UserError(
            f"{source} has no ln_pre, as CLIPA's towers (arXiv 2305.07017): where its last norm stands, nothing tells",
            expected=f"{OPEN_CLIP_CONFIG} beside the file",
        )
    result.weights["patch_embed.proj.bias"] = torch.zeros_like(
        result.weights["patch_embed.proj.weight"][:, 0, 0, 0]
    )
    result.new["patch_embed.proj.bias"] = "zeros: the layout has no bias here"


def _infer_options(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Options of our spec; a layer scale's initial value only says that there is one."""
    options: dict[str, Any] = {"pre_norm": True} if "norm_pre.weight" in weights else {}
    options |= {"init_values": 1.0} if "blocks.0.ls1.gamma" in weights else {}
    if OPEN_CLIP_CONFIG in checkpoint.beside:
        options["act_layer"] = (
            "quick_gelu" if _get_section(checkpoint, "model_cfg").get("quick_gelu") else "gelu"
        )
    elif OPENAI_MARKS & {*checkpoint.outside, *checkpoint.extras}:
        options["act_layer"] = "quick_gelu"
    return options


def _read_facts(
    checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], vision: Mapping[str, Any]
) -> dict[str, Any]:
    """Heads by the width where no config says them; the rest from OpenCLIP's config."""
    width, source = weights["patch_embed.proj.weight"].shape[0], checkpoint.source
    head_width, size = vision.get("head_width", HEAD_WIDTHS.get(width)), vision.get("image_size")
    if not isinstance(head_width, int | None):
        raise UserError(f"{source}: head_width is {head_width!r}", expected="a number")
    facts: dict[str, Any] = {"num_heads": width // head_width} if head_width else {}
    facts |= {"global_pool": "avg"} if vision.get("pool_type") == "avg" else {}
    if size is not None:
        facts["img_size"] = parse_numbers(
            size if isinstance(size, list) else [size, size], "image_size", source
        )
    return facts | read_preprocessing(checkpoint)


def read_preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    """Mean, std and interpolation as OpenCLIP's config says them, of its own towers and of timm's in its files."""
    feed = _get_section(checkpoint, "preprocess_cfg")
    facts: dict[str, Any] = {
        key: parse_numbers(feed[key], key, checkpoint.source) for key in ("mean", "std") if key in feed
    }
    return facts | (
        {"interpolation": feed["interpolation"]}
        if feed.get("interpolation") in ("bicubic", "bilinear")
        else {}
    )


def _get_section(checkpoint: Checkpoint, *keys: str) -> dict[str, Any]:
    """A part of open_clip_config.json, empty where there is none."""
    part: Any = checkpoint.beside.get(OPEN_CLIP_CONFIG, {})
    for key in keys:
        part = part.get(key, {})
        if not isinstance(part, dict):
            raise UserError(
                f"{checkpoint.source}: {key} in {OPEN_CLIP_CONFIG} is {part!r}", expected="an object"
            )
    return part
