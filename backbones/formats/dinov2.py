"""dinov2: facebookresearch/dinov2 (backbones with and without registers, teachers of its trainings)."""

import re
from typing import Any

import torch

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.structure import is_gated
from backbones.translating.translation import Translation, drop_empty_registers, explain
from mae_bench.errors import UserError

INIT_VALUES = 1e-5  # of the layer scale in the training's default config; only shows in a new model
SWIGLU = {"mlp_layer": "swiglu_packed", "act_layer": "silu"}  # timm's block passes its act_layer to the MLP
MASK_TOKEN = "mask token, replaces masked patches in pretraining: not part of the backbone"
OUTSIDE = {r"(.*\.)?(dino|ibot)_head\.": "pretraining projection head: not part of the backbone"}
CHUNK = re.compile(
    r"^blocks\.\d+\.(\d+)\."
)  # trainings may chunk blocks for FSDP; the block is the second number
NAMES = Naming(
    top={"register_tokens": "reg_token"},
    block={"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"},
    blocks=("blocks.{}.",),
    drop={r"mask_token$": MASK_TOKEN},
)


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there is a timm ViT with a position embedding and a mark that only DINOv2 has.

    Marks: a flat mask token, registers or w12.
    """
    keys = checkpoint.tensors
    if not {"patch_embed.proj.weight", "pos_embed", "norm.weight"} <= set(keys):
        return False
    if "register_tokens" in keys or ("mask_token" in keys and keys["mask_token"].ndim == 2):
        return True
    is_eva02 = "blocks.0.attn.q_bias" in keys
    return not is_eva02 and any(name.endswith("mlp.w12.weight") for name in keys)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a DINOv2.

    Chunks of blocks are flattened. w12 and w3 of the SwiGLU are timm's fc1 and fc2, with the gate as first
    half in both.
    """
    flat: dict[str, torch.Tensor] = {}
    stored: dict[str, str] = {}  # flat name -> stored name
    for name, tensor in checkpoint.tensors.items():
        flat_name = CHUNK.sub(r"blocks.\1.", name)
        if flat_name in flat:
            raise UserError(
                f"{checkpoint.source}: {stored[flat_name]} and {name} are one weight",
                expected="each weight once",
            )
        flat[flat_name], stored[flat_name] = tensor, name
    result = NAMES.read(flat, checkpoint.source)
    result.renamed = {stored[name]: new_name for name, new_name in result.renamed.items()}
    result.dropped = {stored[name]: reason for name, reason in result.dropped.items()}
    result.outside = explain(checkpoint.outside, OUTSIDE)
    describe(result, checkpoint.source)
    return result


def describe(result: Translation, source: str) -> None:
    """Set the facts that names and shapes of a DINOv2 show, here and in transformers' layout.

    With registers, which have no positions, the class token's row of the position embedding is added to the
    token (timm's no_embed_class).
    """
    drop_empty_registers(result)
    weights = result.weights
    options: dict[str, Any] = {}
    if "blocks.0.ls1.gamma" in weights:
        options["init_values"] = INIT_VALUES
    if is_gated(weights):
        options |= SWIGLU
    if "blocks.0.attn.qkv.bias" not in weights:
        options["qkv_bias"] = False
    result.assumed = family("dinov2")
    if "reg_token" in weights:
        _add_class_row(result, source)
        options["no_embed_class"] = True
        result.assumed["pos_resample"] = "bicubic_antialias"  # with registers (dinov2/hub/backbones.py)
    result.facts = {"options": options}


def _add_class_row(result: Translation, source: str) -> None:
    tokens = [result.weights.get(name) for name in ("cls_token", "pos_embed", "reg_token")]
    cls_token, table, _ = tokens
    if (
        cls_token is None
        or table is None
        or any(token is not None and token.ndim != 3 for token in tokens)
        or cls_token.shape[2] != table.shape[2]
    ):
        raise UserError(
            f"{source} has registers",
            expected="cls_token, pos_embed and registers of three axes and one width",
        )
    is_half = cls_token.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if is_half else cls_token.dtype  # half precision would round the sum
    result.weights["cls_token"] = cls_token.to(dtype) + table[:, :1].to(dtype)
    result.weights["pos_embed"] = table[:, 1:]
    result.reshaped["cls_token"] = "its row of the position embedding added"
    result.reshaped["pos_embed"] = "without the class token's row, which is added to the token"
