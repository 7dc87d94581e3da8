"""hf_vitmae: transformers' ViTMAEModel and ViTMAEForPreTraining, as their save_pretrained writes them."""

import re
from pathlib import Path
from typing import Any

import torch

from backbones.carry import write_safetensors
from backbones.source import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from backbones.translation import Translation, is_sincos, numbers, require_plain
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.spec import BackboneSpec

MODULES = {  # theirs -> ours, with the tensor's own name (weight, bias) left off
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
PREFIX = "vit."  # of the encoder in ViTMAEForPreTraining
QKV = ("query", "key", "value")
DEFAULT_EPS = 1e-12  # of ViTMAEConfig; the reference trained with 1e-6
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_BLOCK_KEY = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$")


def fits(checkpoint: Checkpoint) -> bool:
    """transformers' names with its ViTMAE config, MAE's decoder or MAE's fixed position table (its ViT has the same encoder)."""
    keys = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.tensors.items()}
    if "embeddings.patch_embeddings.projection.weight" not in keys or "embeddings.position_embeddings" not in keys:
        return False
    if config := checkpoint.beside.get(CONFIG_FILE):
        return config.get("model_type") == "vit_mae"
    return "decoder.mask_token" in keys or is_sincos(keys["embeddings.position_embeddings"])


def read(checkpoint: Checkpoint) -> Translation:
    """Query, key and value are stacked to qkv; the decoder is dropped; eps, heads, mean and std come from the JSON files."""
    result = Translation()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("decoder."):
            result.dropped[name] = "decoder of the pretraining: no part of the backbone"
            continue
        ours, part = _our_name(name.removeprefix(PREFIX))
        result.renamed[name] = ours
        if part:
            parts.setdefault(ours, {})[part] = tensor
        else:
            result.weights[ours] = tensor
    for ours, tensors in parts.items():
        result.weights[ours] = _stack(checkpoint.source, ours, tensors)
        result.reshaped[ours] = "query, key and value stacked"
    _describe(result, checkpoint)
    return result


def _our_name(name: str) -> tuple[str, str]:
    """Our name for one of theirs, and which of query, key, value it is ("" for other tensors); an unknown name stays."""
    if match := _BLOCK_KEY.match(name):
        number, module, tensor = match.groups()
        if (part := module.removeprefix("attention.attention.")) in QKV:
            return f"blocks.{number}.attn.qkv.{tensor}", part
        return f"blocks.{number}.{BLOCK.get(module, module)}.{tensor}", ""
    if name in MODULES:
        return MODULES[name], ""
    module, _, tensor = name.rpartition(".")
    return f"{MODULES[module]}.{tensor}" if module in MODULES else name, ""


def _stack(source: str, ours: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
    if set(tensors) != set(QKV) or len(set(shapes.values())) != 1:
        raise UserError(f"{source}: {ours} would be made of {shapes}", expected="query, key and value of one shape")
    return torch.cat([tensors[part] for part in QKV])


def _describe(result: Translation, checkpoint: Checkpoint) -> None:
    config, processor = checkpoint.beside.get(CONFIG_FILE), checkpoint.beside.get(PREPROCESSOR_FILE, {})
    result.assumed = {"norm_eps": DEFAULT_EPS, "pretrain_method": "mae", "pretrain_data": "unknown"}
    if config:
        if (activation := config.get("hidden_act", "gelu")) != "gelu":
            raise UserError(f"{checkpoint.source}: hidden_act {activation!r}", expected="'gelu', as in timm's ViT")
        result.facts["norm_eps"] = config.get("layer_norm_eps", DEFAULT_EPS)
        size = config.get("image_size", 224)
        sizes = size if isinstance(size, list) else [size, size]
        result.facts["img_size"] = numbers(sizes, "image_size", checkpoint.source)
        if "num_attention_heads" in config:
            result.facts["num_heads"] = config["num_attention_heads"]
    else:
        result.notes.append(f"no {CONFIG_FILE} beside the file: eps {DEFAULT_EPS} is the default of transformers' ViTMAE")
    if result.facts.get("norm_eps", DEFAULT_EPS) != 1e-6:
        result.notes.append("the reference trains with a LayerNorm eps of 1e-6; this file's own is followed")
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in processor:
            result.facts[ours] = numbers(processor[theirs], theirs, checkpoint.source)
    if processor.get("resample") in RESAMPLE:
        result.facts["interpolation"] = RESAMPLE[processor["resample"]]


def write(weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]) -> None:
    """A folder that `ViTMAEModel.from_pretrained` loads; its tensors' metadata carry spec and provenance."""
    require_plain(spec, weights, "hf_vitmae", fc_norm=False)
    if len(set(spec.img_size)) > 1 or len(set(spec.patch_size)) > 1:
        raise UserError(f"images {spec.img_size}, patches {spec.patch_size}", expected="squares for transformers' ViTMAE")
    theirs = {name: part for ours, tensor in weights.items() for name, part in _their_tensors(ours, tensor).items()}
    write_safetensors(out / "model.safetensors", theirs, spec, provenance)
    write_json(out / PREPROCESSOR_FILE, _processor(spec))
    write_json(out / CONFIG_FILE, _config(spec))


def _their_tensors(ours: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    theirs = {ours_: theirs_ for theirs_, ours_ in MODULES.items()}
    if ours in theirs:
        return {theirs[ours]: tensor}
    module, _, name = ours.rpartition(".")
    if not module.startswith("blocks."):
        return {f"{theirs[module]}.{name}": tensor}
    _, number, inside = module.split(".", 2)
    if inside == "attn.qkv":
        parts = zip(QKV, tensor.chunk(3), strict=True)
        return {f"encoder.layer.{number}.attention.attention.{part}.{name}": value.clone() for part, value in parts}
    in_block = {ours_: theirs_ for theirs_, ours_ in BLOCK.items()}
    return {f"encoder.layer.{number}.{in_block[inside]}.{name}": tensor}


def _config(spec: BackboneSpec) -> dict[str, Any]:
    return {
        "architectures": ["ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": round(spec.embed_dim * spec.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": spec.norm_eps,
        "image_size": spec.img_size[0],
        "patch_size": spec.patch_size[0],
        "num_channels": spec.in_chans,
        "qkv_bias": True,
    }


def _processor(spec: BackboneSpec) -> dict[str, Any]:
    resample = {name: number for number, name in RESAMPLE.items()}.get(spec.interpolation)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": spec.img_size[0], "width": spec.img_size[1]},
        **({} if resample is None else {"resample": resample}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
