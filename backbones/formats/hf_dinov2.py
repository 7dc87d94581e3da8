"""hf_dinov2: transformers' Dinov2Model and Dinov2WithRegistersModel, bare or in a classifier, as save_pretrained writes them."""

from pathlib import Path
from typing import Any

import torch

from backbones.formats.dinov2 import MASK_TOKEN, SWIGLU, describe
from backbones.reading.source import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from backbones.translating.hugging_face import (
    ANCHOR,
    QKV,
    TOP,
    build_config,
    build_processor_config,
    get_model_type,
    read_facts,
)
from backbones.translating.naming import Naming
from backbones.translating.structure import is_gated
from backbones.translating.translation import HEAD, Translation, not_expressible, parse_numbers
from backbones.writing import write_safetensors
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-6  # of Dinov2Config
MODELS = {
    False: ("dinov2", "Dinov2Model"),
    True: ("dinov2_with_registers", "Dinov2WithRegistersModel"),
}  # by registers
NAMES_OF_BLOCK = {
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
    return Naming(top, NAMES_OF_BLOCK | mlp, ("encoder.layer.{}.",), QKV, drop)


def fits(checkpoint: Checkpoint) -> bool:
    """transformers' names with its config of a DINOv2; without a config, with a layer scale."""
    keys = checkpoint.tensors
    if ANCHOR not in keys or "embeddings.position_embeddings" not in keys:
        return False
    if told := get_model_type(checkpoint):
        return told in ("dinov2", "dinov2_with_registers")
    return any(name.endswith("layer_scale1.lambda1") for name in keys)


def read(checkpoint: Checkpoint) -> Translation:
    """Query, key and value are stacked, and so are the halves of a SwiGLU; what the JSON files say comes before the family."""
    result = _build_naming(PLAIN | GATED).read(checkpoint.tensors, checkpoint.source)
    _stack_halves(result, checkpoint.source)
    result.outside = {name: HEAD for name in checkpoint.outside if name.startswith("classifier.")}
    describe(result, checkpoint.source)
    facts = read_facts(checkpoint, DEFAULT_EPS)
    options = (
        facts.pop("options", {}) | result.facts["options"]
    )  # transformers gates by SiLU whatever hidden_act says
    if "init_values" in options and CONFIG_FILE in checkpoint.beside:
        value = checkpoint.beside[CONFIG_FILE].get("layerscale_value", 1.0)
        options["init_values"] = float(*parse_numbers([value], "layerscale_value", checkpoint.source))
    result.facts = facts | {"options": options}
    return result


def _stack_halves(result: Translation, source: str) -> None:
    """In the models of transformers 5 gate and value are two matrices; in its files they are one."""
    moved: dict[str, str] = {}
    for gate in [name for name in result.weights if ".mlp.gate_proj." in name]:
        value, ours = gate.replace("gate_proj", "up_proj"), gate.replace("gate_proj", "fc1")
        halves = [result.weights.pop(name) for name in (gate, value) if name in result.weights]
        if len(halves) != 2 or halves[0].shape != halves[1].shape or not halves[0].ndim:
            shapes = [tuple(half.shape) for half in halves]
            raise UserError(
                f"{source}: {ours} would be made of {shapes}", expected="gate_proj and up_proj of one shape"
            )
        result.weights[ours] = torch.cat(halves)
        result.reshaped[ours] = "gate and value stacked"
        moved |= {gate: ours, value: ours}
    result.renamed = {theirs: moved.get(ours, ours) for theirs, ours in result.renamed.items()}


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """A folder that `AutoModel.from_pretrained` loads; its tensors' metadata carry spec and provenance.

    The mask token, which our models do not have, is zero, as transformers starts it.
    """
    _require_dinov2(weights, spec)
    registers, gated = spec.num_prefix_tokens - 1, is_gated(weights)
    apart = dict(weights)
    if registers:  # the class token has taken its row of the table
        table = weights["pos_embed"]
        apart["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    theirs = _build_naming(GATED if gated else PLAIN).write(apart)
    theirs["embeddings.mask_token"] = torch.zeros(1, spec.embed_dim, dtype=weights["cls_token"].dtype)
    get_model_type, architecture = MODELS[registers > 0]
    config = build_config(spec, architecture, get_model_type) | {
        "mlp_ratio": _mlp_ratio(spec, gated),
        "use_swiglu_ffn": gated,
        "layerscale_value": spec.options["init_values"],
        "qkv_bias": spec.options.get("qkv_bias", True),
        **({"num_register_tokens": registers} if registers else {"use_mask_token": True}),
    }
    del config["intermediate_size"]  # a Dinov2Config has the ratio
    write_safetensors(out / "model.safetensors", theirs, spec, provenance)
    write_json(out / PREPROCESSOR_FILE, build_processor_config(spec))
    write_json(out / CONFIG_FILE, config)


def _require_dinov2(weights: dict[str, torch.Tensor], spec: BackboneSpec) -> None:
    registers = spec.num_prefix_tokens > 1
    fits = spec.arch == "vit" and {"cls_token", "pos_embed", "norm.weight"} <= set(weights)
    options = {key: value for key, value in spec.options.items() if key not in ("init_values", "qkv_bias")}
    expected = (SWIGLU if is_gated(weights) else {}) | ({"no_embed_class": True} if registers else {})
    if not fits or "init_values" not in spec.options or options != expected:
        wanted = "a ViT with class token, position table, layer scale, final norm, and registers, if any, without positions"
        raise not_expressible(spec, "hf_dinov2", wanted)


def _mlp_ratio(spec: BackboneSpec, gated: bool) -> int:
    """The whole ratio from which transformers computes the hidden width; UserError if there is none."""
    hidden = round(spec.embed_dim * spec.mlp_ratio)
    for ratio in range(1, 33):
        width = spec.embed_dim * ratio
        if hidden == (2 * ((int(width * 2 / 3) + 7) // 8 * 8) if gated else width):
            return ratio
    raise UserError(
        f"hidden layers of {hidden} in a width of {spec.embed_dim}", expected="a whole ratio, all that a Dinov2Config can say",
        fix="write it as mae_bench or timm",
    )  # fmt: skip
