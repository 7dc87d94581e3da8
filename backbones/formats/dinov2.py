"""dinov2: files of facebookresearch/dinov2 (backbones with and without registers, teachers of its trainings)."""

import re
from typing import Any

import torch

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.structure import is_gated
from backbones.translating.translation import Translation, drop_empty_registers, get_embed_dim
from mae_bench.errors import UserError

HEAD_DIM = 64  # channels of a head, in every size of the family (dinov2/models/vision_transformer.py)
INIT_VALUES = 1e-5  # of the layer scale, in the training's default config; only a fresh model would show it
SWIGLU = {"mlp_layer": "swiglu_packed", "act_layer": "silu"}  # timm's block hands its act_layer on to the MLP
MASK_TOKEN = "stands for masked patches in pretraining: no part of the backbone"
PROJECTION = "projection head of the pretraining: no part of the backbone"
CHUNK = re.compile(
    r"^blocks\.\d+\.(\d+)\."
)  # trainings may chunk the blocks for FSDP; the second number is the block's own
NAMES = Naming(
    top={"register_tokens": "reg_token"},
    block={"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"},
    blocks=("blocks.{}.",),
    drop={r"mask_token$": MASK_TOKEN},
)


def fits(checkpoint: Checkpoint) -> bool:
    """Names of a timm ViT with a position table, and what no other such ViT has: a flat mask token, registers or w12."""
    keys = checkpoint.tensors
    if not {"patch_embed.proj.weight", "pos_embed", "norm.weight"} <= set(keys):
        return False
    flat = "mask_token" in keys and keys["mask_token"].ndim == 2
    gated = (
        any(name.endswith("mlp.w12.weight") for name in keys) and "blocks.0.attn.q_bias" not in keys
    )  # as EVA-02 has
    return flat or "register_tokens" in keys or gated


def read(checkpoint: Checkpoint) -> Translation:
    """Chunks of blocks are dissolved, w12 and w3 of the SwiGLU are timm's fc1 and fc2 (the gate is the first half in both)."""
    plain: dict[str, torch.Tensor] = {}
    theirs: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        ours = CHUNK.sub(r"blocks.\1.", name)
        if ours in plain:
            raise UserError(
                f"{checkpoint.source}: {theirs[ours]} and {name} are one weight", expected="each weight once"
            )
        plain[ours], theirs[ours] = tensor, name
    result = NAMES.read(plain, checkpoint.source)
    result.renamed = {theirs[name]: ours for name, ours in result.renamed.items()}
    result.outside = explain_projections(checkpoint)
    describe(result, checkpoint.source)
    return result


def explain_projections(checkpoint: Checkpoint) -> dict[str, str]:
    """Reasons for the heads that stand beside a backbone in a training's file."""
    return {name: PROJECTION for name in checkpoint.outside if re.search(r"(^|\.)(dino|ibot)_head\.", name)}


def describe(result: Translation, source: str) -> None:
    """What names and shapes tell of a DINOv2, here and in transformers' layout; the class token's row of the table is taken
    into the token where there are registers, which have none (timm's no_embed_class)."""
    drop_empty_registers(result)
    weights, options = result.weights, dict[str, Any]()
    if "blocks.0.ls1.gamma" in weights:
        options["init_values"] = INIT_VALUES
    if is_gated(weights):
        options |= SWIGLU
    if "blocks.0.attn.qkv.bias" not in weights:
        options["qkv_bias"] = False
    result.assumed = family("dinov2") | {"num_heads": get_embed_dim(weights) // HEAD_DIM}
    if "reg_token" in weights:
        _add_class_row(result, source)
        options["no_embed_class"] = True
        result.assumed["pos_resample"] = (
            "bicubic_antialias"  # as the models with registers do (dinov2/hub/backbones.py)
        )
    result.facts = {"options": options}


def _add_class_row(result: Translation, source: str) -> None:
    token, table = result.weights.get("cls_token"), result.weights.get("pos_embed")
    registers = result.weights["reg_token"]
    if (
        token is None
        or table is None
        or not token.ndim == table.ndim == registers.ndim == 3
        or token.shape[2] != table.shape[2]
    ):
        raise UserError(
            f"{source} has registers",
            expected="cls_token, pos_embed and registers of three axes and one width",
        )
    wide = (
        torch.float32 if token.dtype in (torch.float16, torch.bfloat16) else token.dtype
    )  # half precision would round the sum
    result.weights |= {"cls_token": token.to(wide) + table[:, :1].to(wide), "pos_embed": table[:, 1:]}
    result.reshaped["cls_token"] = "its row of the position table added"
    result.reshaped["pos_embed"] = "without the class token's row, which the token has taken"
