"""hf_beit: transformers' BEiT and data2vec vision models (plain, for masked images, classifiers), as their save_pretrained
writes them."""

from pathlib import Path
from typing import Any

import torch

from backbones.families import family
from backbones.reading.source import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from backbones.translating.hugging_face import (
    ANCHOR,
    BLOCK,
    BLOCKS,
    QKV,
    TOP,
    build_config,
    build_processor_config,
    get_model_type,
    note_missing_files,
    read_facts,
)
from backbones.translating.naming import Naming
from backbones.translating.structure import INDEX, INDEX_REASON, TABLE, infer_beit_facts
from backbones.translating.translation import HEAD, MASK_TOKEN, Translation, not_expressible
from backbones.writing import write_safetensors
from mae_bench.files import write_json
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-12  # of BeitConfig and Data2VecVisionConfig; the authors train with 1e-6
TYPES = {"beit": "beit", "data2vec-vision": "data2vec"}  # config.json's model_type -> our family
NAMES = Naming(
    top=TOP
    | {
        "pooler.layernorm": "fc_norm",
        f"encoder.relative_position_bias.{TABLE}": f"rel_pos_bias.{TABLE}",
        f"shared_position_bias.{TABLE}": f"rel_pos_bias.{TABLE}",
    },
    block=BLOCK
    | {
        "attention.attention.query.bias": "attn.q_bias",
        "attention.attention.value.bias": "attn.v_bias",
        f"attention.attention.relative_position_bias.{TABLE}": f"attn.{TABLE}",
        "attention.q_proj.bias": "attn.q_bias",
        "attention.v_proj.bias": "attn.v_bias",
        f"relative_position_bias.{TABLE}": f"attn.{TABLE}",
        "lambda_1": "gamma_1",
        "lambda_2": "gamma_2",
    },
    blocks=BLOCKS,
    qkv=QKV,
    drop={INDEX: INDEX_REASON, r"embeddings\.mask_token$": MASK_TOKEN},
)
OUTSIDE = {
    "lm_head.": "predicts the visual tokens of the pretraining: no part of the backbone",
    "classifier.": HEAD,
    "layernorm.": "a second norm, in front of the head that predicts visual tokens",
    "decode_head.": "segmentation head: no part of the backbone",
    "auxiliary_head.": "segmentation head: no part of the backbone",
}
VALUES = 0.1  # layer_scale_init_value of transformers' BeitConfig


def fits(checkpoint: Checkpoint) -> bool:
    """transformers' names with biases of query and value alone, and no config of another model."""
    keys = checkpoint.tensors
    biased = any(
        f"{blocks.format(0)}{q}.bias" in keys and f"{blocks.format(0)}{k}.bias" not in keys
        for blocks in BLOCKS
        for q, k, _ in QKV
    )
    return ANCHOR in keys and biased and get_model_type(checkpoint) in (None, *TYPES)


def read(checkpoint: Checkpoint) -> Translation:
    """Weights of query, key and value are stacked, biases stay two. Behind BeitForMaskedImageModeling the last norm stands
    outside of the model, behind mean pooling in its pooler."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    for name in checkpoint.outside:
        if reason := next((reason for start, reason in OUTSIDE.items() if name.startswith(start)), None):
            result.outside[name] = reason
    if not {"norm.weight", "fc_norm.weight"} & set(result.weights) and "lm_head.weight" in checkpoint.outside:
        _take_outer_norm(result, checkpoint)
    told = read_facts(checkpoint, DEFAULT_EPS)
    facts = infer_beit_facts(result.weights, checkpoint.source)
    config = checkpoint.beside.get(CONFIG_FILE, {})
    if "use_mean_pooling" in config:
        told["global_pool"] = "avg" if config["use_mean_pooling"] else "token"
    result.facts = facts | told | {"options": facts["options"] | told.get("options", {})}
    is_data2vec = get_model_type(checkpoint) == "data2vec-vision" or checkpoint.prefix == "data2vec_vision."
    result.assumed = {"norm_eps": DEFAULT_EPS} | family("data2vec" if is_data2vec else "hf_beit")
    result.notes = note_missing_files(checkpoint, "BEiT", DEFAULT_EPS)
    return result


def _take_outer_norm(result: Translation, checkpoint: Checkpoint) -> None:
    for kind in ("weight", "bias"):
        if (name := f"layernorm.{kind}") in checkpoint.outside:
            result.weights[f"norm.{kind}"] = checkpoint.outside[name]
            result.taken[name] = f"norm.{kind}"


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """A folder that `BeitModel.from_pretrained` loads; its tensors' metadata carry spec and provenance.

    UserError for what is no BEiT, and for one without query's biases or a last norm, which BeitModel always has."""
    pooled = "fc_norm.weight" in weights
    if (
        spec.arch != "beit"
        or "blocks.0.attn.q_bias" not in weights
        or not (pooled or "norm.weight" in weights)
    ):
        raise not_expressible(spec, "hf_beit", "a BEiT with biases and a last norm")
    config = build_config(spec, "BeitModel", "beit") | {
        "use_absolute_position_embeddings": "pos_embed" in weights,
        "use_relative_position_bias": f"blocks.0.attn.{TABLE}" in weights,
        "use_shared_relative_position_bias": f"rel_pos_bias.{TABLE}" in weights,
        "layer_scale_init_value": VALUES if "blocks.0.gamma_1" in weights else 0.0,
        "use_mean_pooling": pooled,
    }
    del config["qkv_bias"]
    write_safetensors(out / "model.safetensors", NAMES.write(weights), spec, provenance)
    write_json(
        out / PREPROCESSOR_FILE,
        dict(build_processor_config(spec)) | {"image_processor_type": "BeitImageProcessor"},
    )
    write_json(out / CONFIG_FILE, config)
