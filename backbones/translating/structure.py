"""Infer the options of a ViT's timm class from the names and shapes of its tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from backbones.reading.source import CONFIG_FILE, Checkpoint
from mae_bench.errors import UserError

Weights = Mapping[str, torch.Tensor]
INIT_VALUES = 1e-5  # any number but 0 builds the layer scales; the file fills them
INDEX = r"(.*\.)?relative_position_index$"
INDEX_REASON = "index of each pair of patches in the bias table: follows from the grid, timm computes it"
TABLE = "relative_position_bias_table"
NO_PREFIX_ROWS = "assumed: as many patches as the position table has rows, a square number"


def has_timm_description(checkpoint: Checkpoint) -> bool:
    """Return whether a bare state_dict comes with timm's config.json or holds a BackboneSpec.

    Other families' marks do not count then.
    """
    described = bool(checkpoint.stated_spec) or "architecture" in checkpoint.beside.get(CONFIG_FILE, {})
    return described and not checkpoint.wrapper and not checkpoint.prefix


def is_beit(weights: Weights) -> bool:
    """Return whether these are the names of BEiT's ViT: no key bias in its qkv, and a plain MLP."""
    names = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "cls_token"}
    own = {"blocks.0.attn.q_bias", f"blocks.0.attn.{TABLE}", f"rel_pos_bias.{TABLE}"}
    return names <= set(weights) and bool(own & set(weights)) and not is_gated(weights)


def is_eva(weights: Weights) -> bool:
    """Return whether these are timm's names of an EVA that is no BEiT.

    Marks: split projections, a gated MLP, or biases of query and value without a relative bias table.
    """
    if not {"patch_embed.proj.weight", "blocks.0.mlp.fc2.weight"} <= set(weights):
        return False
    split = "blocks.0.attn.q_proj.weight" in weights
    gated = "blocks.0.mlp.fc1_g.weight" in weights
    return split or gated or ("blocks.0.attn.q_bias" in weights and find_bias_table(weights) is None)


def is_rotary(weights: Weights) -> bool:
    """Return whether timm gives these names to rotary ViTs only, which does not show the kind of rotation.

    Marks: layer scales named gamma_1, or CLIP's first norm with SigLIP's pooling. timm's other ViTs name
    layer scales ls1.gamma. BEiTs, whose layer scales are gamma_1 too, have bias tables, or a position
    embedding with biases of query and value.
    """
    beit = find_bias_table(weights) is not None or {"pos_embed", "blocks.0.attn.q_bias"} <= set(weights)
    perceives = "norm_pre.weight" in weights and any(name.startswith("attn_pool.") for name in weights)
    vit = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= set(weights)
    return vit and not beit and ("blocks.0.gamma_1" in weights or perceives)


def has_post_norms(weights: Weights) -> bool:
    """Return whether a ViT may have its norms after attention and MLP (timm's ResPostBlock).

    The names are those of a ViT with norms before them; timm's ResPostBlock models have neither prefix tokens
    nor biases of query, key and value.
    """
    return not {"cls_token", "reg_token", "blocks.0.attn.qkv.bias"} & set(weights)


def find_bias_table(weights: Weights) -> torch.Tensor | None:
    """Return the relative bias table ((2h - 1) (2w - 1) + 3, num_heads), shared or of the first block."""
    return weights.get(f"rel_pos_bias.{TABLE}", weights.get(f"blocks.0.attn.{TABLE}"))


def infer_global_pool(weights: Weights) -> str:
    """Return timm's `global_pool` for the layout of the weights.

    "avg" with `fc_norm`, else "token" with a class token, else "" (no pooling), which keeps the final norm of
    a ViT without a class token.
    """
    if "fc_norm.weight" in weights:
        return "avg"
    return "token" if "cls_token" in weights else ""


def count_blocks(names: Iterable[str], stem: str = "blocks") -> int:
    """Return the number of blocks that tensors named `stem`.N.* belong to: the depth of a ViT."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{stem}.")})


def infer_vit_options(weights: Weights) -> dict[str, Any]:
    """Return the options of timm's VisionTransformer that the tensors show, which excludes activations."""
    options: dict[str, Any] = {}
    if "blocks.0.attn.qkv.bias" not in weights:
        options["qkv_bias"] = False
    if "blocks.0.attn.proj.bias" not in weights:
        options["proj_bias"] = False
    if "blocks.0.attn.q_norm.weight" in weights:
        options["qk_norm"] = True
    if "blocks.0.ls1.gamma" in weights:
        options["init_values"] = INIT_VALUES
    if "norm_pre.weight" in weights:
        options["pre_norm"] = True
    if not {"norm.weight", "fc_norm.weight"} & set(weights):
        options["final_norm"] = False
    if is_gated(weights):
        options |= {"mlp_layer": "swiglu_packed", "act_layer": "silu"}
    return options | _class_token_option(weights) | _no_embed_class_option(weights)


def infer_beit_facts(weights: Weights, source: str) -> dict[str, Any]:
    """Return arch, options, and the heads of the bias tables, for a BEiT in timm's names."""
    options: dict[str, Any] = {
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_rel_pos_bias": f"blocks.0.attn.{TABLE}" in weights,
        "use_shared_rel_pos_bias": f"rel_pos_bias.{TABLE}" in weights,
    }
    if "blocks.0.attn.q_bias" not in weights:
        options["qkv_bias"] = False
    if "blocks.0.gamma_1" in weights:
        options["init_values"] = INIT_VALUES
    facts: dict[str, Any] = {"arch": "beit", "options": options}
    table = find_bias_table(weights)
    if table is None:
        return facts
    if table.ndim != 2:
        raise UserError(
            f"{source}: a relative bias table of shape {tuple(table.shape)}", expected="(rows, heads)"
        )
    return facts | {"num_heads": table.shape[1], "pos_embed": "relative"}


def infer_eva_options(weights: Weights) -> dict[str, Any]:
    """Return the options of timm's Eva that the tensors show; rotary positions are not among them."""
    options: dict[str, Any] = {"use_abs_pos_emb": "pos_embed" in weights}
    if "blocks.0.attn.q_proj.weight" in weights:
        options["qkv_fused"] = False
    if not {f"blocks.0.attn.{name}" for name in ("q_bias", "qkv.bias", "q_proj.bias")} & set(weights):
        options["qkv_bias"] = False
    if "blocks.0.attn.norm.weight" in weights:
        options["scale_attn_inner"] = True
    if "blocks.0.mlp.norm.weight" in weights:
        options["scale_mlp"] = True
    if "blocks.0.mlp.fc1_g.weight" in weights:
        options["swiglu_mlp"] = True
        if "scale_mlp" not in options:
            options["swiglu_align_to"] = 1  # timm keeps gate and value apart where this is set
    elif is_gated(weights):
        options["swiglu_mlp"] = True
    if "blocks.0.gamma_1" in weights:
        options["init_values"] = INIT_VALUES
    if "norm_pre.weight" in weights:
        options["use_pre_transformer_norm"] = True
    return options | _class_token_option(weights) | _no_embed_class_option(weights)


def _class_token_option(weights: Weights) -> dict[str, Any]:
    """Return `class_token=False` where registers are the only prefix tokens."""
    return {"class_token": False} if "reg_token" in weights and "cls_token" not in weights else {}


def is_gated(weights: Weights) -> bool:
    """Return whether fc1 computes gate and value at once: twice the channels of fc2's input."""
    fc1, fc2 = weights.get("blocks.0.mlp.fc1.weight"), weights.get("blocks.0.mlp.fc2.weight")
    if fc1 is None or fc2 is None or fc1.ndim != 2 or fc2.ndim != 2:
        return False
    return fc1.shape[0] == 2 * fc2.shape[1]


def _no_embed_class_option(weights: Weights) -> dict[str, Any]:
    """Return `no_embed_class=True` where the position embedding has no rows for prefix tokens.

    Inferred from a square number of rows, and only with registers or layer scales: in another ViT the table
    may as well be one for images that are not square, which only the user can say.
    """
    if not {"reg_token", "blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(weights):
        return {}
    table = weights.get("pos_embed")
    registers = weights.get("reg_token")
    num_prefix_tokens = int("cls_token" in weights)
    if registers is not None and registers.ndim == 3:
        num_prefix_tokens += registers.shape[1]
    if table is None or table.ndim != 3 or not num_prefix_tokens:
        return {}
    if _is_square(table.shape[1] - num_prefix_tokens):
        return {}
    return {"no_embed_class": True} if _is_square(table.shape[1]) else {}


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number
