"""timm: the state_dict of a timm ViT (VisionTransformer, Beit, Eva, VisionTransformerSAM), with the model's name and data config
where they are known."""

from pathlib import Path
from typing import Any

import torch

from backbones.families import family
from backbones.formats import clip
from backbones.formats.official_mae import WRAPPERS, is_marked
from backbones.reading.source import CONFIG_FILE, Checkpoint
from backbones.translating.detect import get_format
from backbones.translating.structure import (
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
from backbones.translating.translation import HEAD, Translation, is_sincos, is_vit, keep_names, parse_numbers
from backbones.writing import write_safetensors
from mae_bench.errors import UserError
from mae_bench.export import SPEC_FILE
from mae_bench.spec import BackboneSpec

# Families that save timm's names and bear a mark of their own.
FAMILIES = ("dino", "ibot", "moco_v3", "deit", "deit3", "ijepa", "maskfeat", "lightly", "solo_learn")
OWN_WRAPPERS = ("", "state_dict", "state_dict_ema")  # of timm's releases and of its train.py
TRUNK = "visual.trunk."  # before timm's names in OpenCLIP's files
UNKNOWN_PREPROCESSING = "nothing in the file says how images are fed: mean and std of ImageNet are assumed; many of timm's ViTs want 0.5"
POST_NORMS = f"arch=vit if norms stand before attention and MLP; if behind them (ResPostBlock), timm's {CONFIG_FILE} beside it tells"
DROP = {r"head\.": HEAD, r"attn_pool\.": "attention pooling: a part of the classifier"}


def fits(checkpoint: Checkpoint) -> bool:
    """Names of a timm ViT without another family's mark; under `model` only where nothing marks the file as MAE's (DeiT's files).

    A config.json with timm's architecture, or the spec that our own writer put into the file, decides."""
    keys = checkpoint.tensors
    if (
        SPEC_FILE in checkpoint.beside
        or {"mask_token", "register_tokens"} & set(keys)
        or any("relative_position_index" in key for key in keys)
    ):
        return False
    if has_timm_description(checkpoint):
        return "patch_embed.proj.weight" in keys and any(key.startswith("blocks.0.norm") for key in keys)
    if is_beit(keys) or is_eva(keys) or is_rotary(keys):
        return checkpoint.wrapper in OWN_WRAPPERS and any(
            key.startswith(("norm.", "fc_norm.")) for key in keys
        )
    if not is_vit(keys) or any(get_format(name).fits(checkpoint) for name in FAMILIES):
        return False
    return checkpoint.wrapper not in WRAPPERS or not is_marked(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """The names are timm's; facts come from config.json where there is one, else from what the tensors show.

    Tensors do not show activations and rotary positions: where timm's models differ in them, the user is asked."""
    result = keep_names(checkpoint.tensors, DROP)
    weights, config = result.weights, checkpoint.beside.get(CONFIG_FILE, {})
    pos_embed = weights.get("pos_embed")
    is_mae = pos_embed is not None and "head.weight" not in checkpoint.tensors and is_sincos(pos_embed)
    result.assumed = {
        "norm_eps": 1e-6,
        "pretrain_method": "mae" if is_mae else "unknown",
        "pretrain_data": "unknown",
    }
    if "fc_norm.weight" in weights or "cls_token" not in weights:
        result.assumed["global_pool"] = "avg"
    result.facts = _read_preprocessing(config, checkpoint.source)
    if checkpoint.prefix.endswith(
        TRUNK
    ):  # fed as CLIP, but SigLIP's towers, and those have a config that says so
        result.assumed |= {key: value for key, value in family("clip").items() if key != "norm_eps"}
        result.facts |= clip.read_preprocessing(checkpoint)
    if "architecture" in config:
        result.facts |= _infer_named(config, weights, checkpoint.source)
    else:
        _infer_structure(result, checkpoint)
        if not checkpoint.stated_spec and not checkpoint.prefix.endswith(TRUNK):
            result.notes.append(UNKNOWN_PREPROCESSING)
    return result


def _read_preprocessing(config: dict[str, Any], source: str) -> dict[str, Any]:
    """What timm's config.json says of how the model is fed."""
    cfg = config.get("pretrained_cfg") or {}
    if not isinstance(cfg, dict):
        raise UserError(f"{source}: pretrained_cfg is {cfg!r}", expected="an object")
    facts: dict[str, Any] = {
        key: parse_numbers(cfg[key], key, source) for key in ("mean", "std") if cfg.get(key) is not None
    }
    return facts | ({"interpolation": str(cfg["interpolation"])} if cfg.get("interpolation") else {})


def _infer_named(config: dict[str, Any], weights: dict[str, torch.Tensor], source: str) -> dict[str, Any]:
    """What the architecture's name, with the arguments that the file gives, says of how the model is built."""
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise UserError(f"{source}: model_args is {args!r}", expected="an object")
    return infer_named_facts(str(config["architecture"]), args, weights, source)


def _infer_structure(result: Translation, checkpoint: Checkpoint) -> None:
    """What names and shapes show of the architecture; what they do not show is needed from the user or the carried spec."""
    weights = result.weights
    if is_rotary(checkpoint.tensors):
        _require_description(checkpoint)
        result.assumed |= {"arch": "eva", "options": infer_eva_options(weights)}
    elif is_beit(weights) and not is_eva(weights):
        result.assumed |= infer_beit_facts(weights, checkpoint.source)
    elif is_eva(weights):
        result.assumed |= {"arch": "eva", "options": infer_eva_options(weights)}
        rotary = (
            "use_rot_pos_emb",
            "ref_feat_shape",
        )  # the grid that rotations count in, null where it is the image's
        result.needed = rotary if "swiglu_mlp" in result.assumed["options"] else (*rotary, "use_post_norm")
    else:
        result.assumed["options"] = infer_vit_options(weights)
        if has_post_norms(weights):
            result.needed, result.hint = ("arch",), POST_NORMS
        if not has_timm_description(checkpoint) and _may_be_clip(checkpoint.tensors):
            result.needed = (*result.needed, "act_layer")  # CLIP's and SigLIP's differ in their GELU
            result.assumed["norm_eps"] = 1e-5 if "norm_pre.weight" in weights else 1e-6


def _may_be_clip(tensors: dict[str, torch.Tensor]) -> bool:
    """A norm before the blocks (CLIP), attention pooling (SigLIP), or a last norm without any prefix token (SigLIP, averaged)."""
    averaged = "norm.weight" in tensors and not {"cls_token", "reg_token"} & set(tensors)
    return averaged or any(name.startswith(("norm_pre.", "attn_pool.")) for name in tensors)


def _require_description(checkpoint: Checkpoint) -> None:
    """UserError where no spec in the file says how a rotary ViT turns: rotations differ in more than a user could be asked."""
    if not checkpoint.stated_spec:
        raise UserError(
            f"{checkpoint.source} has timm's names of a rotary ViT, and nothing tells its rotations",
            expected=f"timm's {CONFIG_FILE} beside the weights, as in its folders",
            fix=f"put {CONFIG_FILE} there, or give --format dinov3 if it is a DINOv3",
        )


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """A safetensors file that `timm.create_model(..., checkpoint_path=out)` loads; spec and provenance stand in its metadata."""
    write_safetensors(out, weights, spec, provenance)
