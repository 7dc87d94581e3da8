"""timm: timm's VisionTransformer, Beit, Eva and VisionTransformerSAM, with or without config.json."""

from pathlib import Path
from typing import Any

import torch

from backbones.families import family
from backbones.formats import clip
from backbones.formats.official_mae import WRAPPERS, is_marked
from backbones.reading.source import CONFIG_FILE, Checkpoint
from backbones.translating.detect import get_format
from backbones.translating.structure import (
    NO_PREFIX_ROWS,
    has_post_norms,
    has_timm_description,
    infer_beit_facts,
    infer_eva_options,
    infer_vit_options,
    is_beit,
    is_eva,
    is_rotary,
)
from backbones.translating.timm_models import infer_named_facts
from backbones.translating.translation import (
    HEAD,
    Translation,
    has_final_norm,
    is_sincos,
    is_timm_vit,
    keep_names,
    parse_numbers,
)
from backbones.writing import write_safetensors
from mae_bench.errors import UserError
from mae_bench.export import SPEC_FILE
from mae_bench.spec import BackboneSpec

# Families that save timm's names and have a mark of their own.
FAMILIES = ("dino", "ibot", "moco_v3", "deit", "deit3", "ijepa", "maskfeat", "lightly", "solo_learn")
OWN_WRAPPERS = ("", "state_dict", "state_dict_ema")  # of timm's releases and its train.py
TRUNK = "visual.trunk."  # before timm's names in OpenCLIP's files
UNKNOWN_PREPROCESSING = (
    "the file does not state the preprocessing: "
    "ImageNet's mean and std are assumed, but many of timm's ViTs need 0.5"
)
POST_NORMS = (
    "arch=vit if norms come before attention and MLP; "
    f"if after them (ResPostBlock), timm's {CONFIG_FILE} next to the file"
)
DROP = {r"head\.": HEAD, r"attn_pool\.": "attention pooling: a part of the classifier"}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has the names of a timm ViT without another family's mark.

    Under `model` it fits only without a mark of MAE (DeiT's files). A config.json with timm's architecture,
    or the spec that `write` puts into the file, decides.
    """
    keys = checkpoint.tensors
    if SPEC_FILE in checkpoint.beside or {"mask_token", "masked_embed", "register_tokens"} & set(keys):
        return False
    if any("relative_position_index" in key for key in keys):
        return False
    if has_timm_description(checkpoint):
        return "patch_embed.proj.weight" in keys and any(key.startswith("blocks.0.norm") for key in keys)
    if is_beit(keys) or is_eva(keys) or is_rotary(keys):
        return checkpoint.wrapper in OWN_WRAPPERS and has_final_norm(keys)
    if not is_timm_vit(keys) or not has_final_norm(keys):
        return False
    if any(get_format(name).fits(checkpoint) for name in FAMILIES):
        return False
    return checkpoint.wrapper not in WRAPPERS or not is_marked(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a timm ViT, with the facts of its config.json or else those that the tensors show.

    Tensors do not show activations and rotary positions: where timm's models differ in them, the user is
    asked.
    """
    result = keep_names(checkpoint.tensors, DROP)
    weights, config = result.weights, checkpoint.beside.get(CONFIG_FILE, {})
    pos_embed = weights.get("pos_embed")
    is_mae = pos_embed is not None and "head.weight" not in checkpoint.tensors and is_sincos(pos_embed)
    result.assumed = {
        "norm_eps": 1e-6,
        "pos_resample": "bicubic_antialias",  # timm/layers/pos_embed.py resample_abs_pos_embed
        "pretrain_method": "mae" if is_mae else "unknown",
        "pretrain_data": "unknown",
    }
    if "fc_norm.weight" in weights or "cls_token" not in weights:
        result.assumed["global_pool"] = "avg"
    result.facts = _read_preprocessing(config, checkpoint.source)
    is_trunk = checkpoint.prefix.endswith(TRUNK)
    if is_trunk:  # preprocessed like CLIP, except SigLIP's towers, whose config states it
        result.assumed |= {
            key: value for key, value in family("clip").items() if key not in ("norm_eps", "pos_resample")
        }
        result.facts |= clip.read_preprocessing(checkpoint)
    if "architecture" in config:
        result.facts |= _infer_named(config, weights, checkpoint.source)
    else:
        _infer_structure(result, checkpoint)
        if not checkpoint.stated_spec and not is_trunk:
            result.notes.append(UNKNOWN_PREPROCESSING)
    return result


def _read_preprocessing(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Return mean, std and interpolation of timm's config.json."""
    cfg = config.get("pretrained_cfg") or {}
    if not isinstance(cfg, dict):
        raise UserError(f"{source}: pretrained_cfg is {cfg!r}", expected="an object")
    facts: dict[str, Any] = {
        key: parse_numbers(cfg[key], key, source) for key in ("mean", "std") if cfg.get(key) is not None
    }
    if cfg.get("interpolation"):
        facts["interpolation"] = str(cfg["interpolation"])
    return facts


def _infer_named(config: dict[str, Any], weights: dict[str, torch.Tensor], source: str) -> dict[str, Any]:
    """Return the facts of the architecture's name with the arguments in the file."""
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise UserError(f"{source}: model_args is {args!r}", expected="an object")
    return infer_named_facts(str(config["architecture"]), args, weights, source)


def _infer_structure(result: Translation, checkpoint: Checkpoint) -> None:
    """Set the facts that names and shapes show; the spec in the file or the user must state the others."""
    weights = result.weights
    if is_rotary(checkpoint.tensors):
        _require_description(checkpoint)
        result.assumed |= {"arch": "eva", "options": infer_eva_options(weights)}
    elif is_beit(weights) and not is_eva(weights):
        result.assumed |= infer_beit_facts(weights, checkpoint.source)
    elif is_eva(weights):
        result.assumed |= {"arch": "eva", "options": infer_eva_options(weights)}
        # ref_feat_shape: the grid in which rotations count, null for the image's own.
        rotary = ("use_rot_pos_emb", "ref_feat_shape")
        result.needed = rotary if "swiglu_mlp" in result.assumed["options"] else (*rotary, "use_post_norm")
    else:
        result.assumed["options"] = infer_vit_options(weights)
        if has_post_norms(weights):
            result.needed, result.hint = ("arch",), POST_NORMS
        if not has_timm_description(checkpoint) and _may_be_clip(checkpoint.tensors):
            result.needed = (*result.needed, "act_layer")  # CLIP and SigLIP differ in their GELU
            result.assumed["norm_eps"] = 1e-5 if "norm_pre.weight" in weights else 1e-6
    if "no_embed_class" in result.assumed["options"] and not checkpoint.stated_spec:
        result.sources["options"] = NO_PREFIX_ROWS


def _may_be_clip(tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether a ViT may be CLIP's or SigLIP's.

    Marks: a norm before the blocks (CLIP), attention pooling (SigLIP), or a final norm without any prefix
    token (SigLIP with average pooling).
    """
    averaged = "norm.weight" in tensors and not {"cls_token", "reg_token"} & set(tensors)
    return averaged or any(name.startswith(("norm_pre.", "attn_pool.")) for name in tensors)


def _require_description(checkpoint: Checkpoint) -> None:
    """Raise UserError for a rotary ViT without a spec: it has too many settings to ask for."""
    if not checkpoint.stated_spec:
        raise UserError(
            f"{checkpoint.source} has timm's names of a rotary ViT, whose rotations cannot be inferred from "
            "the file",
            expected=f"timm's {CONFIG_FILE} next to the weights, as in its folders",
            fix=f"put {CONFIG_FILE} there, or give --format dinov3 if it is a DINOv3",
        )


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write a safetensors file that `timm.create_model(..., checkpoint_path=out)` loads.

    Spec and provenance are in its metadata.
    """
    write_safetensors(out, weights, spec, provenance)
