"""hf_beit: transformers' BEiT and data2vec vision models (plain, masked-image, classifier)."""

from pathlib import Path
from typing import Any

import torch

from backbones.families import family
from backbones.reading.source import CONFIG_FILE, Checkpoint
from backbones.translating.hugging_face import (
    ANCHOR,
    BLOCK,
    BLOCKS,
    QKV,
    TOP,
    build_config,
    get_model_type,
    note_missing_files,
    read_facts,
    write_folder,
)
from backbones.translating.naming import Naming
from backbones.translating.structure import INDEX, INDEX_REASON, TABLE, infer_beit_facts
from backbones.translating.translation import HEAD, MASK_TOKEN, Translation, explain, not_expressible
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-12  # of BeitConfig and Data2VecVisionConfig; the authors train with 1e-6
MODEL_TYPES = ("beit", "data2vec-vision")  # in config.json
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
    r"lm_head\.": "predicts the visual tokens of the pretraining: not part of the backbone",
    r"classifier\.": HEAD,
    r"layernorm\.": "a second norm, before the head that predicts visual tokens",
    r"((decode|auxiliary)_head|fpn\d?)\.": "segmentation head: each task trains its own",
}
INIT_VALUES = 0.1  # layer_scale_init_value of transformers' BeitConfig


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has transformers' names, no key bias, and no other model's config."""
    keys = checkpoint.tensors
    if ANCHOR not in keys or get_model_type(checkpoint) not in (None, *MODEL_TYPES):
        return False
    for blocks in BLOCKS:
        block = blocks.format(0)
        if any(f"{block}{q}.bias" in keys and f"{block}{k}.bias" not in keys for q, k, _ in QKV):
            return True
    return False


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a BEiT or data2vec model.

    Weights of query, key and value are stacked; biases stay apart. The final norm of
    BeitForMaskedImageModeling is outside the model, that of mean pooling is in its pooler: a model with mean
    pooling that is saved without its pooler has none.
    """
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    result.outside = explain(checkpoint.outside, OUTSIDE)
    stated = read_facts(checkpoint, DEFAULT_EPS)
    facts = infer_beit_facts(result.weights, checkpoint.source)
    config = checkpoint.beside.get(CONFIG_FILE, {})
    if not {"norm.weight", "fc_norm.weight"} & set(result.weights):
        if "lm_head.weight" in checkpoint.outside:
            _take_outer_norm(result, checkpoint)
        elif config.get("use_mean_pooling", True):
            facts["options"]["final_norm"] = False
            result.notes.append("saved without a pooler, which holds the final norm: features are unnormed")
    if "use_mean_pooling" in config:
        stated["global_pool"] = "avg" if config["use_mean_pooling"] else "token"
    result.facts = facts | stated | {"options": facts["options"] | stated.get("options", {})}
    is_data2vec = get_model_type(checkpoint) == "data2vec-vision" or checkpoint.prefix == "data2vec_vision."
    result.assumed = {"norm_eps": DEFAULT_EPS} | family("data2vec" if is_data2vec else "hf_beit")
    result.notes += note_missing_files(checkpoint, "BEiT", DEFAULT_EPS)
    return result


def _take_outer_norm(result: Translation, checkpoint: Checkpoint) -> None:
    for kind in ("weight", "bias"):
        name = f"layernorm.{kind}"
        if name in checkpoint.outside:
            result.weights[f"norm.{kind}"] = checkpoint.outside[name]
            result.taken[name] = f"norm.{kind}"


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write a folder that `BeitModel.from_pretrained` loads.

    Raise UserError for other models, and for a BEiT without the query's biases or a final norm, which
    BeitModel has.
    """
    pooled = "fc_norm.weight" in weights
    has_norm = pooled or "norm.weight" in weights
    if spec.arch != "beit" or "blocks.0.attn.q_bias" not in weights or not has_norm:
        raise not_expressible(spec, "hf_beit", "a BEiT with biases and a final norm")
    config = build_config(spec, "BeitModel", "beit") | {
        "use_absolute_position_embeddings": "pos_embed" in weights,
        "use_relative_position_bias": f"blocks.0.attn.{TABLE}" in weights,
        "use_shared_relative_position_bias": f"rel_pos_bias.{TABLE}" in weights,
        "layer_scale_init_value": INIT_VALUES if "blocks.0.gamma_1" in weights else 0.0,
        "use_mean_pooling": pooled,
    }
    del config["qkv_bias"]
    write_folder(out, NAMES.write(weights), config, spec, provenance, "BeitImageProcessor")
