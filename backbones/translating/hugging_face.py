"""What transformers' ViTs share: tensor names, config.json and preprocessor_config.json."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backbones.reading.source import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.translation import is_sincos, parse_numbers
from backbones.writing import write_safetensors
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.spec import BackboneSpec

BLOCKS = ("encoder.layer.{}.", "layers.{}.")  # in files; in the models of transformers 5
QKV = (
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
)
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
}
VIT = Naming(TOP, BLOCK, BLOCKS, QKV)  # ViT, ViTMAE, DeiT and I-JEPA
ANCHOR = "embeddings.patch_embeddings.projection.weight"
NORMS = ("encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight")
ACTIVATIONS = {  # hidden_act -> act_layer of the spec; plain GELU needs none
    "gelu": None,
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
NOT_VIT = re.compile("lambda_|relative_position")  # in names of BEiT
VIT_ONLY = ("pooler.", "embeddings.mask_token", "embeddings.distillation_token")  # ViTMAE has none of them


def is_hf_vit(checkpoint: Checkpoint) -> bool:
    """Return whether the names are those that transformers' ViT, ViTMAE, DeiT and I-JEPA share.

    BEiT has more, DINOv2 has others.
    """
    keys = checkpoint.tensors
    if any(NOT_VIT.search(name) for name in keys):
        return False
    has_norm = any(name in keys for name in NORMS)
    return ANCHOR in keys and "embeddings.position_embeddings" in keys and has_norm


def infer_model_type(checkpoint: Checkpoint) -> str | None:
    """Return "vit" or "vit_mae" for a file without a config, None where they look the same."""
    keys, outside = checkpoint.tensors, checkpoint.outside
    if any(name.startswith(VIT_ONLY) for name in keys) or any("classifier." in name for name in outside):
        return "vit"
    if any(name.endswith("decoder.mask_token") for name in outside):
        return "vit_mae"
    table = keys.get("embeddings.position_embeddings")
    return "vit_mae" if table is not None and table.ndim == 3 and is_sincos(table) else None


def get_model_type(checkpoint: Checkpoint) -> str | None:
    """Return config.json's model_type; None without a config."""
    config = checkpoint.beside.get(CONFIG_FILE)
    return None if config is None else str(config.get("model_type"))


def get_vision_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return config.json or its section for the image tower; None without a config."""
    config = checkpoint.beside.get(CONFIG_FILE)
    section = config.get("vision_config", config) if config else config
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{checkpoint.source}: vision_config is {section!r}", expected="an object")
    return section


def read_facts(checkpoint: Checkpoint, default_eps: float, hidden_act: str = "gelu") -> dict[str, Any]:
    """Return the BackboneSpec fields that config.json and preprocessor_config.json state.

    default_eps, hidden_act: defaults of the model's config class. Raise UserError for an unsupported
    activation.
    """
    source, facts = checkpoint.source, _read_preprocessing(checkpoint)
    config = get_vision_config(checkpoint)
    if config is None:
        return facts
    activation = config.get("hidden_act", hidden_act)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{source}: hidden_act {activation!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
    options: dict[str, Any] = {}
    if ACTIVATIONS[activation]:
        options["act_layer"] = ACTIVATIONS[activation]
    if config.get("qkv_bias", True) is False:
        options["qkv_bias"] = False
    size = config.get("image_size", 224)
    facts["norm_eps"] = config.get("layer_norm_eps", default_eps)
    facts["img_size"] = parse_numbers(size if isinstance(size, list) else [size, size], "image_size", source)
    if len(facts["img_size"]) != 2:
        raise UserError(f"{source}: image_size is {size}", expected="a number, or height and width")
    if "num_attention_heads" in config:
        facts["num_heads"] = config["num_attention_heads"]
    if not isinstance(facts["norm_eps"], int | float) or not isinstance(facts.get("num_heads", 1), int):
        raise UserError(
            f"{source}: layer_norm_eps and num_attention_heads in {CONFIG_FILE}", expected="numbers"
        )
    if options:
        facts["options"] = options
    return facts


def note_missing_files(checkpoint: Checkpoint, model: str, eps: float) -> list[str]:
    """Return notes on what is assumed without config.json or preprocessor_config.json."""
    assumptions = {
        CONFIG_FILE: f"eps {eps} is the default of transformers' {model}",
        PREPROCESSOR_FILE: "mean, std and interpolation are its family's",
    }
    return [
        f"no {name} next to the file: {assumption}"
        for name, assumption in assumptions.items()
        if name not in checkpoint.beside
    ]


def _read_preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return mean, std and interpolation that preprocessor_config.json states."""
    processor = checkpoint.beside.get(PREPROCESSOR_FILE, {})
    facts: dict[str, Any] = {}
    for key, name in (("image_mean", "mean"), ("image_std", "std")):
        if key in processor:
            facts[name] = parse_numbers(processor[key], key, checkpoint.source)
    number = processor.get("resample")
    if isinstance(number, int) and number in RESAMPLE:
        facts["interpolation"] = RESAMPLE[number]
    return facts


def build_config(spec: BackboneSpec, architecture: str, model_type: str) -> dict[str, Any]:
    """Return config.json of a plain ViT; raise UserError for images or patches that are not square."""
    if len(set(spec.img_size)) > 1 or len(set(spec.patch_size)) > 1:
        raise UserError(
            f"images {spec.img_size}, patches {spec.patch_size}",
            expected=f"squares for transformers' {architecture}",
        )
    return {
        "architectures": [architecture],
        "model_type": model_type,
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


def _build_processor_config(spec: BackboneSpec) -> dict[str, Any]:
    """Return preprocessor_config.json, which states the preprocessing."""
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


def write_folder(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    spec: BackboneSpec,
    provenance: dict[str, Any],
    image_processor: str = "ViTImageProcessor",
) -> None:
    """Write a folder for `from_pretrained`, with spec and provenance in the tensors' metadata."""
    processor = {**_build_processor_config(spec), "image_processor_type": image_processor}
    write_safetensors(out / "model.safetensors", tensors, spec, provenance)
    write_json(out / PREPROCESSOR_FILE, processor)
    write_json(out / CONFIG_FILE, dict(config))
