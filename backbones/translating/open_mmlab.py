"""What the ViTs of OpenMMLab's libraries share: tensor names, relative tables and the stored config."""

import ast
from collections.abc import Mapping
from typing import Any

import torch

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.structure import (
    INDEX,
    INDEX_REASON,
    NO_PREFIX_ROWS,
    TABLE,
    infer_beit_facts,
    infer_vit_options,
)
from backbones.translating.translation import FILE, HEAD, MASK_TOKEN, Translation, explain
from mae_bench.errors import UserError

ANCHOR = "layers.0.ffn.layers.0.0.weight"
GATED = "layers.0.ffn.w12.weight"
TOP = {
    "cls_token": "cls_token",
    "dist_token": "reg_token",  # DeiT's distillation token: between class token and patches, like a register
    "pos_embed": "pos_embed",
    "patch_embed.projection": "patch_embed.proj",
    "ln_pre": "norm_pre",  # mmsegmentation
    "pre_norm": "norm_pre",  # mmpretrain
    "ln1": "norm",
    "ln2": "fc_norm",
    "rel_pos_bias": "rel_pos_bias",
}
BLOCK = {
    "ln1": "norm1",
    "attn.attn.in_proj_weight": "attn.qkv.weight",
    "attn.attn.in_proj_bias": "attn.qkv.bias",
    "attn.attn.out_proj": "attn.proj",
    "attn.gamma1.weight": "ls1.gamma",
    "ln2": "norm2",
    "ffn.layers.0.0": "mlp.fc1",
    "ffn.layers.1": "mlp.fc2",
    "ffn.w12": "mlp.fc1",
    "ffn.w3": "mlp.fc2",
    "ffn.gamma2.weight": "ls2.gamma",
}
DROP = {r"mask_token$": MASK_TOKEN, INDEX: INDEX_REASON}
VIT = Naming(TOP, BLOCK, ("layers.{}.",), drop=DROP)
OUTSIDE = {
    r"(decode|auxiliary)_head\.": "segmentation head: each task trains its own",
    r"head\.predictor\.": "pretraining predictor: not part of the backbone",
    r"head\.": HEAD,
    r"neck\.": "pretraining decoder or projection: not part of the backbone",
    r"target_generator\.": "computes the pretraining targets: not part of the backbone",
    r"(ema_|momentum_)": "a moving average of the weights that are read",
    r"data_preprocessor\.": "mean and std of the images",
}
ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "mmpretrain.QuickGELU": "quick_gelu"}
NAMED_HEADS = {"mocov3-s": 12, "mocov3-small": 12}  # arch -> heads, not the standard ones (selfsup/mocov3.py)
MAX_CONFIG = 1 << 20  # characters


def is_mmlab_vit(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether these are the names of an OpenMMLab ViT."""
    return "patch_embed.projection.weight" in tensors and (ANCHOR in tensors or GATED in tensors)


def is_mmseg(checkpoint: Checkpoint) -> bool:
    """Return whether mmsegmentation saved the file: torch's attention module or a segmentation head."""
    heads = any(name.startswith(("decode_head.", "auxiliary_head.")) for name in checkpoint.outside)
    return heads or "layers.0.attn.attn.in_proj_weight" in checkpoint.tensors


def read_mmlab_vit(checkpoint: Checkpoint, library: str) -> Translation:
    """Translate an OpenMMLab ViT, with the architecture that its names show and the facts of its config.

    library: its entry in families.yaml. Raise UserError for other names and for a config that is not
    supported.
    """
    if not is_mmlab_vit(checkpoint.tensors):
        raise UserError(
            f"{checkpoint.source} has no OpenMMLab names", expected="patch_embed.projection and layers.N.ffn"
        )
    result = VIT.read(checkpoint.tensors, checkpoint.source)
    result.outside = explain(checkpoint.outside, OUTSIDE)
    result.assumed = family(library)
    if any(name.endswith(TABLE) for name in result.weights):
        result.facts = _infer_beit(result, checkpoint.source)
    else:
        if library == "mmseg":
            _add_patch_bias(result)
        result.facts = {"arch": "vit", "options": infer_vit_options(result.weights)}
        if "no_embed_class" in result.facts["options"] and not checkpoint.stated_spec:
            result.sources["options"] = NO_PREFIX_ROWS
    if "fc_norm.weight" in result.weights:
        result.assumed["global_pool"] = "avg"
        _drop_second_norm(result)
    config = parse_config(checkpoint.extras)
    stated = _read_config(config, checkpoint.source, result)
    result.facts |= stated
    result.sources |= dict.fromkeys(stated, FILE)
    described = _get_section(config, "model", "backbone") or checkpoint.stated_spec
    if "norm_pre.weight" in result.weights and not described:
        # CLIP's towers have GELU or quick GELU (configs/clip), which only a config shows.
        result.needed = ("act_layer",)
    return result


def _add_patch_bias(result: Translation) -> None:
    """Add the patch embedding's zero bias.

    mmsegmentation's ViT has none unless its config sets patch_bias; timm's has one unless a norm follows.
    """
    if {"patch_embed.proj.bias", "norm_pre.weight"} & set(result.weights):
        return
    proj = result.weights.get("patch_embed.proj.weight")
    if proj is not None and proj.ndim:
        result.weights["patch_embed.proj.bias"] = proj.new_zeros(len(proj))
        result.new["patch_embed.proj.bias"] = "zeros: the file's patch embedding has no bias"


def _infer_beit(result: Translation, source: str) -> dict[str, Any]:
    for name in [name for name in result.weights if name.endswith("attn.qkv.bias")]:
        _split_bias(result, name, source)
    facts = infer_beit_facts(result.weights, source)
    if not {"norm.weight", "fc_norm.weight"} & set(result.weights):
        facts["options"]["final_norm"] = False
    return facts


def _split_bias(result: Translation, name: str, source: str) -> None:
    """Split the bias of qkv: timm's BEiT has no key bias, which shifts all logits of a query equally."""
    bias = result.weights.pop(name)
    if bias.ndim != 1 or len(bias) % 3:
        raise UserError(f"{source}: {name} is {tuple(bias.shape)}", expected="biases of query, key and value")
    block = name.removesuffix("qkv.bias")
    result.weights[block + "q_bias"], _, result.weights[block + "v_bias"] = bias.chunk(3)
    stored = next(stored for stored, new_name in result.renamed.items() if new_name == name)
    result.renamed[stored] = block + "q_bias"
    result.reshaped[block + "q_bias"] = (
        "the query's third; softmax cancels the key's, equal for all logits of a query"
    )
    result.new[block + "v_bias"] = f"the value's third of {stored}"


def _drop_second_norm(result: Translation) -> None:
    """Drop the norm after the pooling where there is a final norm too: it belongs to the classifier."""
    if "norm.weight" not in result.weights:
        return
    for stored in [stored for stored, new_name in result.renamed.items() if new_name.startswith("fc_norm.")]:
        del result.weights[result.renamed.pop(stored)]
        result.dropped[stored] = "a second norm, after the average pooling: part of the classifier"


def parse_config(extras: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config in `meta` as data; {} without one or for more than literals and dict()."""
    meta = extras.get("meta")
    text = (meta.get("cfg") or meta.get("config")) if isinstance(meta, dict) else None
    if not isinstance(text, str) or len(text) > MAX_CONFIG:
        return {}
    try:
        lines = [line for line in ast.parse(text).body if isinstance(line, ast.Assign)]
        names = [(line.targets[0], line.value) for line in lines]
        return {name.id: _parse_value(value) for name, value in names if isinstance(name, ast.Name)}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return {}


def _parse_value(node: ast.expr) -> Any:
    """Return the value of a literal or of dict(key=...); None for anything else. Nothing is run."""
    if isinstance(node, ast.Call):
        is_dict = isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args
        return {word.arg: _parse_value(word.value) for word in node.keywords} if is_dict else None
    if isinstance(node, ast.List | ast.Tuple):
        return [_parse_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _parse_value(value) for key, value in pairs if isinstance(key, ast.Constant)}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _read_config(config: dict[str, Any], source: str, result: Translation) -> dict[str, Any]:
    """Return heads, eps, mean and std of a config; the activation becomes an option, the image size evidence.

    Raise UserError for an unknown activation.
    """
    backbone = _get_section(config, "model", "backbone")
    facts: dict[str, Any] = {}
    arch = backbone.get("arch")
    named = NAMED_HEADS.get(arch) if isinstance(arch, str) else None
    of_arch = arch.get("num_heads") if isinstance(arch, dict) else named
    for num_heads in (of_arch, backbone.get("num_heads")):
        if isinstance(num_heads, int) and not isinstance(num_heads, bool):
            facts["num_heads"] = num_heads
    if backbone.get("with_cls_token") is False and "cls_token" in result.weights:
        raise UserError(
            f"{source}: its config leaves out the class token (with_cls_token=False) that the file has",
            expected="a class token that the model uses",
        )
    result.stated_sizes.append(backbone.get("img_size"))
    eps = _get_section(backbone, "norm_cfg").get("eps")
    if isinstance(eps, float):
        facts["norm_eps"] = eps
    for layers in (backbone, _get_section(backbone, "layer_cfgs")):
        activation = _get_section(layers, "act_cfg").get("type", "GELU")
        if activation not in ACTIVATIONS:
            raise UserError(
                f"{source}: its config's activation is {activation!r}",
                expected=f"one of {', '.join(ACTIVATIONS)}",
            )
        if activation != "GELU":
            result.facts["options"]["act_layer"] = ACTIVATIONS[activation]
    for place in (("img_norm_cfg",), ("data_preprocessor",), ("model", "data_preprocessor")):
        section = _get_section(config, *place)
        for key in ("mean", "std"):
            if _is_color(section.get(key)):
                facts[key] = tuple(x / 255 for x in section[key])
    if facts:
        result.notes.append(f"{', '.join(sorted(facts))}: as in the config in the file")
    return facts


def _get_section(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return a nested dict of the config, {} without one."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _is_color(value: Any) -> bool:
    """Return whether a value is a list of numbers on the scale of 8-bit images."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(x, int | float) and 0 < x <= 255 for x in value)
