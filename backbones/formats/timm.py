"""timm: the state_dict of a timm VisionTransformer, with the model's name and data config where they are known."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from backbones.carry import write_safetensors
from backbones.formats.official_mae import is_marked
from backbones.source import CONFIG_FILE, Checkpoint
from backbones.translation import HEAD, Translation, is_sincos, is_vit, keep_names, numbers
from mae_bench.errors import UserError
from mae_bench.export import SPEC_FILE
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec

DROP = {r"head\.": HEAD, r"attn_pool\.": "attention pooling: a part of the classifier"}


def fits(checkpoint: Checkpoint) -> bool:
    """Names of a timm ViT without MAE's decoder; under `model` only where nothing marks the file as MAE's (DeiT's files)."""
    keys = checkpoint.tensors
    if not is_vit(keys) or SPEC_FILE in checkpoint.beside or "mask_token" in keys:
        return False
    return checkpoint.wrapper != "model" or not is_marked(keys)


def read(checkpoint: Checkpoint) -> Translation:
    """The names are timm's; facts come from the folder's config.json where there is one."""
    result = keep_names(checkpoint.tensors, DROP)
    pos_embed = result.weights.get("pos_embed")
    is_mae = pos_embed is not None and "head.weight" not in checkpoint.tensors and is_sincos(pos_embed)
    result.assumed = {"norm_eps": 1e-6, "pretrain_method": "mae" if is_mae else "unknown", "pretrain_data": "unknown"}
    if "fc_norm.weight" in result.weights or "cls_token" not in result.weights:
        result.assumed["global_pool"] = "avg"
    if config := checkpoint.beside.get(CONFIG_FILE):
        result.facts = _facts(config, checkpoint.source)
    return result


def _facts(config: dict[str, Any], source: str) -> dict[str, Any]:
    """What timm's config.json says: how to feed the model, and by its architecture's name how it is built."""
    cfg, args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    facts: dict[str, Any] = {key: numbers(cfg[key], key, source) for key in ("mean", "std") if key in cfg}
    facts |= {"interpolation": cfg["interpolation"]} if "interpolation" in cfg else {}
    if "num_heads" in args:
        facts["num_heads"] = args["num_heads"]
    name = str(config.get("architecture", ""))
    if args or not name:
        return facts
    if not timm.is_model(name):
        raise UserError(f"{source}: {CONFIG_FILE} names the architecture {name!r}", expected="one that the installed timm knows")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{source}: {name} is a {type(model).__name__}", expected="a timm VisionTransformer")
    return facts | _built_as(name, model)


def _built_as(name: str, model: Any) -> dict[str, Any]:
    """Fields that only the built model tells; a model that is exactly our plain ViT is called "vit"."""
    norm = model.norm if hasattr(model.norm, "eps") else model.fc_norm
    facts = {
        "arch": "vit",
        "img_size": model.patch_embed.img_size,
        "num_heads": model.blocks[0].attn.num_heads,
        "norm_eps": getattr(norm, "eps", 1e-6),
        "num_prefix_tokens": model.num_prefix_tokens,
    }
    if model.global_pool in ("token", "avg"):
        facts["global_pool"] = model.global_pool
    shape = {
        "patch_size": model.patch_embed.patch_size,
        "in_chans": model.patch_embed.proj.in_channels,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "mlp_ratio": model.blocks[0].mlp.fc1.out_features / model.embed_dim,
    }
    with torch.device("meta"):
        ours = build_vit(BackboneSpec(**{**facts, **shape}), global_pool=model.global_pool)
    same = repr(ours) == repr(model) and not model.no_embed_class
    return facts if same else {**facts, "arch": name}


def write(weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]) -> None:
    """A safetensors file that `timm.create_model(..., checkpoint_path=out)` loads; spec and provenance stand in its metadata."""
    write_safetensors(out, weights, spec, provenance)
