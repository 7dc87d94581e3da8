"""hf_dinov2: transformers' Dinov2Model and Dinov2WithRegistersModel, bare or in a classifier."""

from pathlib import Path
from typing import Any

import torch

from backbones.formats.dinov2 import MASK_TOKEN, SWIGLU, describe
from backbones.reading.source import CONFIG_FILE, Checkpoint
from backbones.translating.hugging_face import (
    ANCHOR,
    QKV,
    TOP,
    build_config,
    get_model_type,
    read_facts,
    write_folder,
)
from backbones.translating.naming import Naming
from backbones.translating.structure import is_gated
from backbones.translating.translation import HEAD, Translation, explain, not_expressible, parse_numbers
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-6  # of Dinov2Config
MODELS = {  # whether there are registers -> model_type and architecture in config.json
    False: ("dinov2", "Dinov2Model"),
    True: ("dinov2_with_registers", "Dinov2WithRegistersModel"),
}
BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "layer_scale2.lambda1": "ls2.gamma",
}
PLAIN = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
GATED = {"mlp.weights_in": "mlp.fc1", "mlp.weights_out": "mlp.fc2", "mlp.down_proj": "mlp.fc2"}


def _build_naming(mlp: dict[str, str]) -> Naming:
    top = TOP | {"embeddings.register_tokens": "reg_token"}
    drop = {r"embeddings\.mask_token$": MASK_TOKEN}
    return Naming(top, BLOCK | mlp, ("encoder.layer.{}.",), QKV, drop)


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has transformers' names, and a config of a DINOv2 or else a layer scale."""
    keys = checkpoint.tensors
    if ANCHOR not in keys or "embeddings.position_embeddings" not in keys:
        return False
    model_type = get_model_type(checkpoint)
    if model_type:
        return model_type in ("dinov2", "dinov2_with_registers")
    return any(name.endswith("layer_scale1.lambda1") for name in keys)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a DINOv2: query, key and value are stacked, like the halves of a SwiGLU.

    Facts of the JSON files take precedence over the family's.
    """
    result = _build_naming(PLAIN | GATED).read(checkpoint.tensors, checkpoint.source)
    _stack_halves(result, checkpoint.source)
    result.outside = explain(checkpoint.outside, {r"classifier\.": HEAD})
    describe(result, checkpoint.source)
    facts = read_facts(checkpoint, DEFAULT_EPS)
    # transformers' SwiGLU uses SiLU for any hidden_act, so options from the weights take precedence.
    options = facts.pop("options", {}) | result.facts["options"]
    if "init_values" in options and CONFIG_FILE in checkpoint.beside:
        value = checkpoint.beside[CONFIG_FILE].get("layerscale_value", 1.0)
        options["init_values"] = float(*parse_numbers([value], "layerscale_value", checkpoint.source))
    result.facts = facts | {"options": options}
    return result


def _stack_halves(result: Translation, source: str) -> None:
    """Stack gate and value, which are two matrices in the models of transformers 5 and one in its files."""
    moved: dict[str, str] = {}
    for gate in [name for name in result.weights if ".mlp.gate_proj." in name]:
        value, fc1 = gate.replace("gate_proj", "up_proj"), gate.replace("gate_proj", "fc1")
        halves = [result.weights.pop(name) for name in (gate, value) if name in result.weights]
        if len(halves) != 2 or halves[0].shape != halves[1].shape or not halves[0].ndim:
            shapes = [tuple(half.shape) for half in halves]
            raise UserError(
                f"{source}: {fc1} would be made of {shapes}", expected="gate_proj and up_proj of one shape"
            )
        result.weights[fc1] = torch.cat(halves)
        result.reshaped[fc1] = "gate and value stacked"
        moved |= {gate: fc1, value: fc1}
    result.renamed = {stored: moved.get(name, name) for stored, name in result.renamed.items()}


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write a folder that `AutoModel.from_pretrained` loads.

    The mask token, which timm's models do not have, is zero, as transformers initialises it.
    """
    _require_dinov2(weights, spec)
    registers, gated = spec.num_prefix_tokens - 1, is_gated(weights)
    weights = dict(weights)
    if registers:  # the class token's row of the position embedding is already added to the token
        table = weights["pos_embed"]
        weights["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    tensors = _build_naming(GATED if gated else PLAIN).write(weights)
    tensors["embeddings.mask_token"] = torch.zeros(1, spec.embed_dim, dtype=weights["cls_token"].dtype)
    get_model_type, architecture = MODELS[registers > 0]
    config = build_config(spec, architecture, get_model_type) | {
        "mlp_ratio": _mlp_ratio(spec, gated),
        "use_swiglu_ffn": gated,
        "layerscale_value": spec.options["init_values"],
        "qkv_bias": spec.options.get("qkv_bias", True),
        **({"num_register_tokens": registers} if registers else {"use_mask_token": True}),
    }
    del config["intermediate_size"]  # a Dinov2Config states the ratio
    write_folder(out, tensors, config, spec, provenance)


def _require_dinov2(weights: dict[str, torch.Tensor], spec: BackboneSpec) -> None:
    registers = spec.num_prefix_tokens > 1
    fits = spec.arch == "vit" and {"cls_token", "pos_embed", "norm.weight"} <= set(weights)
    options = {key: value for key, value in spec.options.items() if key not in ("init_values", "qkv_bias")}
    expected = (SWIGLU if is_gated(weights) else {}) | ({"no_embed_class": True} if registers else {})
    if not fits or "init_values" not in spec.options or options != expected:
        needed = (
            "a ViT with class token, position embedding, layer scale and final norm; "
            "registers, if any, without positions"
        )
        raise not_expressible(spec, "hf_dinov2", needed)


def _mlp_ratio(spec: BackboneSpec, gated: bool) -> int:
    """Return the whole mlp_ratio of transformers' hidden width; raise UserError if there is none."""
    hidden = round(spec.embed_dim * spec.mlp_ratio)
    for ratio in range(1, 33):
        width = spec.embed_dim * ratio
        if gated:
            width = 2 * ((int(width * 2 / 3) + 7) // 8 * 8)
        if hidden == width:
            return ratio
    raise UserError(
        f"hidden layers of {hidden} for a width of {spec.embed_dim}",
        expected="a whole ratio, which is all that a Dinov2Config can state",
        fix="write it as mae_bench or timm",
    )
