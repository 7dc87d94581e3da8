"""hf_siglip: image tower of transformers' SigLIP and SigLIP 2, with fixed sizes or NaFlex's patches."""

import math
from dataclasses import replace
from typing import Any

from backbones.families import family
from backbones.formats import hf_clip
from backbones.formats.clip import add_axes
from backbones.reading.source import CONFIG_FILE, Checkpoint
from backbones.translating.hugging_face import (
    get_model_type,
    get_vision_config,
    note_missing_files,
    read_facts,
)
from backbones.translating.translation import Translation
from mae_bench.errors import UserError

# Of SiglipVisionConfig and Siglip2VisionConfig.
DEFAULT_EPS, DEFAULT_HEADS, DEFAULT_ACT, DEFAULT_CHANNELS = 1e-6, 12, "gelu_pytorch_tanh", 3
MODEL_TYPES = {"siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"}  # in config.json
ANCHOR, TABLE = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
FILTERS = "patch_embed.proj.weight"
NAMES = replace(
    hf_clip.NAMES,
    drop={**hf_clip.NAMES.drop, r"head\.": "attention pooling: not part of the backbone"},
)
AVERAGED = "the tokens are averaged: the authors' attention pooling is not part of the backbone"
NAFLEX = "NaFlex's processor keeps the proportions of each image; here all images have one size"


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has the names of CLIP's image tower without class token and first norm."""
    keys = checkpoint.tensors
    if not {ANCHOR, TABLE, "post_layernorm.weight", "encoder.layers.0.layer_norm1.weight"} <= set(keys):
        return False
    if "embeddings.class_embedding" in keys or "pre_layrnorm.weight" in keys:
        return False
    vision = get_vision_config(checkpoint)  # inside another model, such as PaliGemma, it has its own type
    return vision is None or str(vision.get("model_type", get_model_type(checkpoint))) in MODEL_TYPES


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the image tower without its attention pooling.

    SigLIP 2 has this layout too. Its NaFlex variant embeds flattened patches by a Linear and resamples its
    table to the grid of each image; at one size it is the same ViT.
    """
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    if FILTERS not in result.weights:
        raise UserError(f"{checkpoint.source} has no {ANCHOR}", expected="the image tower of SigLIP")
    add_axes(result)
    is_naflex = result.weights[FILTERS].ndim == 2
    if is_naflex:
        _unflatten_filters(result, checkpoint)
    result.outside = dict.fromkeys(checkpoint.outside, "outside the image tower: text tower, logits' scale")
    result.facts = _read_facts(checkpoint, result, is_naflex)
    if CONFIG_FILE not in checkpoint.beside and not checkpoint.stated_spec:
        result.sources["options"] = f"assumed: {DEFAULT_ACT}, the default of transformers' SigLIP"
    result.assumed = family("siglip")
    if is_naflex:
        result.assumed |= {"interpolation": "bilinear", "pos_resample": "bilinear_antialias"}
    result.notes = [*note_missing_files(checkpoint, "SigLIP", DEFAULT_EPS), AVERAGED]
    result.notes += [NAFLEX] if is_naflex else []
    return result


def _unflatten_filters(result: Translation, checkpoint: Checkpoint) -> None:
    """Reshape NaFlex's Linear over rows, columns and channels of a patch (D, p p C) to (D, C, p, p)."""
    weight = result.weights[FILTERS]
    vision = get_vision_config(checkpoint) or {}
    channels = vision.get("num_channels", DEFAULT_CHANNELS)
    side = math.isqrt(weight.shape[1] // channels) if isinstance(channels, int) and channels > 0 else 0
    if side < 1 or channels * side * side != weight.shape[1]:
        raise UserError(
            f"{checkpoint.source}: {weight.shape[1]} values per patch of {channels} channels",
            expected="square patches",
            fix=f"put its {CONFIG_FILE} next to the weights: num_channels is in it",
        )
    result.weights[FILTERS] = weight.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)
    result.reshaped[FILTERS] = "a Linear over flattened patches to filters"


def _read_facts(checkpoint: Checkpoint, result: Translation, is_naflex: bool) -> dict[str, Any]:
    """Return what the JSON files state; image sizes in whole patches (384 pixels hold 27 patches of 14)."""
    facts = read_facts(checkpoint, DEFAULT_EPS, hidden_act=DEFAULT_ACT)
    if CONFIG_FILE not in checkpoint.beside:
        return facts | {"options": {"act_layer": "gelu_tanh"}}
    facts["options"] = {"act_layer": "gelu"} | facts.get("options", {})
    size, patch = facts.pop("img_size"), result.weights[FILTERS].shape[2:]
    if not is_naflex and len(patch) == 2 and all(patch):
        facts["img_size"] = tuple(side // pixels * pixels for side, pixels in zip(size, patch, strict=True))
    return {"num_heads": DEFAULT_HEADS} | facts
