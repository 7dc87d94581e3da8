"""hf_dinov3: transformers' DINOv3ViTModel, from save_pretrained."""

from pathlib import Path
from typing import Any

import torch

from backbones.families import family
from backbones.formats.dinov2 import MASK_TOKEN
from backbones.formats.dinov3 import BASE, INIT_VALUES, ROTATIONS, SAT493M, infer_options
from backbones.reading.source import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from backbones.translating.hugging_face import (
    build_config,
    get_model_type,
    read_facts,
    write_folder,
)
from backbones.translating.naming import Naming
from backbones.translating.translation import (
    Translation,
    drop_empty_registers,
    not_expressible,
    parse_numbers,
)
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-5  # of DINOv3ViTConfig
ANCHOR = "embeddings.patch_embeddings.weight"
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "norm": "norm",
}
BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "gamma_1",
    "layer_scale2.lambda1": "gamma_2",
    "mlp.down_proj": "mlp.fc2",
}
BLOCKS = ("layer.{}.", "model.layer.{}.")  # in files; in the models of transformers 5
QKV = (("attention.q_proj", "attention.k_proj", "attention.v_proj"),)
PLAIN = {"mlp.up_proj": "mlp.fc1"}
GATED = {"mlp.gate_proj": "mlp.fc1_g", "mlp.up_proj": "mlp.fc1_x"}
NO_KEY_BIAS = {"attention.q_proj.bias": "attn.q_bias", "attention.v_proj.bias": "attn.v_bias"}


def _build_naming(gated: bool, key_bias: bool) -> Naming:
    block = BLOCK | (GATED if gated else PLAIN) | ({} if key_bias else NO_KEY_BIAS)
    return Naming(TOP, block, BLOCKS, QKV, {r"embeddings\.mask_token$": MASK_TOKEN})


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has transformers' names of a rotary ViT: a bare convolution, registers."""
    if not {ANCHOR, "embeddings.register_tokens"} <= set(checkpoint.tensors):
        return False
    return get_model_type(checkpoint) in (None, "dinov3_vit")


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a DINOv3: query, key and value are stacked, biases only where the key has one."""
    keys = checkpoint.tensors
    gated = any(name.endswith("mlp.gate_proj.weight") for name in keys)
    key_bias = any(name.endswith("k_proj.bias") for name in keys)
    result = _build_naming(gated, key_bias).read(keys, checkpoint.source)
    drop_empty_registers(result)
    result.assumed = family("dinov3")
    result.facts = _read_facts(checkpoint, result.weights, gated)
    if CONFIG_FILE not in checkpoint.beside and not checkpoint.stated_spec:
        result.sources["options"] = ROTATIONS
    if PREPROCESSOR_FILE not in checkpoint.beside:
        result.notes.append(SAT493M)
    return result


def _read_facts(checkpoint: Checkpoint, weights: dict[str, torch.Tensor], gated: bool) -> dict[str, Any]:
    facts = read_facts(checkpoint, DEFAULT_EPS)
    config = checkpoint.beside.get(CONFIG_FILE, {})
    activation = config.get("hidden_act", "gelu")
    expected = "silu" if gated else "gelu"
    if config and activation != expected:
        raise UserError(
            f"{checkpoint.source}: hidden_act {activation!r}",
            expected=f"{expected!r}, as in the published models",
        )
    base, init_values = config.get("rope_theta", BASE), config.get("layerscale_value", INIT_VALUES)
    stated = parse_numbers([base, init_values], "rope_theta and layerscale_value", checkpoint.source)
    options = infer_options(weights, *map(float, stated))
    return facts | {"arch": "eva", "pos_embed": "rope", "options": options}


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write a folder that `AutoModel.from_pretrained` loads.

    The mask token, which timm's models do not have, is zero, as transformers initialises it.
    """
    base, init_values = spec.options.get("rope_temperature", 0), spec.options.get("init_values", 0)
    has_options = init_values and infer_options(weights, base, init_values) == spec.options
    if spec.arch != "eva" or not has_options or "norm.weight" not in weights:
        raise not_expressible(spec, "hf_dinov3", "a DINOv3: rotary positions, layer scale, a final norm")
    gated, registers = "swiglu_mlp" in spec.options, spec.num_prefix_tokens - 1
    bias, key_bias = spec.options["qkv_bias"], "attn_type" in spec.options
    cls_token = weights["cls_token"]
    tensors = {
        "embeddings.register_tokens": cls_token.new_zeros(1, 0, spec.embed_dim),  # replaced if there are any
        "embeddings.mask_token": cls_token.new_zeros(1, 1, spec.embed_dim),
        **_build_naming(gated, key_bias).write(weights),
    }
    config = build_config(spec, "DINOv3ViTModel", "dinov3_vit") | {
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "layerscale_value": init_values,
        "rope_theta": base,
        "num_register_tokens": registers,
        "query_bias": bias,
        "key_bias": key_bias,
        "value_bias": bias,
    }
    del config["qkv_bias"]  # a DINOv3ViTConfig states three
    write_folder(out, tensors, config, spec, provenance)
