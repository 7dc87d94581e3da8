"""dinov3: files of facebookresearch/dinov3 (rotary ViTs: backbones, teachers of its trainings)."""

from collections.abc import Mapping
from typing import Any

import torch

from backbones.families import family
from backbones.formats.dinov2 import MASK_TOKEN, explain_projections
from backbones.reading.source import Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.translation import Translation, drop_empty_registers, get_embed_dim
from mae_bench.errors import UserError

HEADS_OF_7B = {4096: 32}  # the other sizes have heads of 64 channels (dinov3/models/vision_transformer.py)
HEAD_DIM = 64
INIT_VALUES = 1e-5  # of the layer scale, in dinov3/hub/backbones.py
BASE = 100.0  # of the rotary periods
PERIODS = "rope_embed.periods"
ROUNDED = 0.02  # of a period that was computed in bfloat16, which the code's default is
ROTARY = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True}
SAT493M = "mean and std are those of the LVD-1689M models; weights of SAT-493M want mean 0.430 0.411 0.296, std 0.213 0.156 0.143"
NAMES = Naming(
    top={"storage_tokens": "reg_token"},
    block={
        "ls1.gamma": "gamma_1",
        "ls2.gamma": "gamma_2",
        "mlp.w1": "mlp.fc1_g",
        "mlp.w2": "mlp.fc1_x",
        "mlp.w3": "mlp.fc2",
    },
    blocks=("blocks.{}.",),
    drop={
        r"mask_token$": MASK_TOKEN,
        r"rope_embed\.periods$": "rotary periods: computed from their base",
        r"local_cls_norm\.": "norm of the local crops' class tokens: pretraining alone has them",
        r"blocks\.\d+\.attn\.qkv\.bias_mask$": "applied to the bias: it switches the key's off",
    },
)


def fits(checkpoint: Checkpoint) -> bool:
    """Names of a timm ViT without a position table, with rotary periods or storage tokens."""
    keys = set(checkpoint.tensors)
    vit = {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "norm.weight",
    } <= keys and "pos_embed" not in keys
    return vit and (PERIODS in keys or "storage_tokens" in keys)


def read(checkpoint: Checkpoint) -> Translation:
    """Storage tokens are timm's registers. Where a mask switches the key's bias off, query and value keep theirs apart, as in
    timm's Eva; heads follow from the number of rotary periods."""
    keys, source = checkpoint.tensors, checkpoint.source
    if "cls_norm.weight" in keys:
        raise UserError(
            f"{source} has one final norm for its class token and another for its patches (untie_cls_and_patch_norms)",
            expected="one final norm, as in all published models and in timm's Eva",
        )
    result = NAMES.read(keys, source)
    drop_empty_registers(result)
    _apply_bias_masks(result, keys, source)
    result.outside = explain_projections(checkpoint)
    result.facts = {"arch": "eva", "pos_embed": "rope", "options": infer_options(result.weights)}
    result.assumed = family("dinov3") | {"num_heads": get_num_heads(result.weights)}
    result.notes.append(SAT493M)
    if PERIODS in keys:
        result.facts["num_heads"] = _infer_num_heads(keys[PERIODS], get_embed_dim(result.weights), source)
        if not torch.allclose(keys[PERIODS].float(), _compute_periods(keys[PERIODS].numel()), rtol=1e-5):
            result.notes.append(
                "the file's rotary periods are rounded; the model's are of float32, as timm's and transformers'"
            )
    return result


def infer_options(
    weights: Mapping[str, torch.Tensor], base: float = BASE, init_values: float = INIT_VALUES
) -> dict[str, Any]:
    """Keywords of timm's Eva that the names of the weights, in ours, tell; here and in transformers' layout.

    swiglu_align_to=1 keeps gate and value apart, at any width.
    """
    names = set(weights)
    biased = "blocks.0.attn.qkv.bias" in names  # the key's too
    return {
        **ROTARY,
        "rope_temperature": base,
        "qkv_bias": biased or "blocks.0.attn.q_bias" in names,
        **({"attn_type": "rope"} if biased else {}),
        **({"init_values": init_values} if "blocks.0.gamma_1" in names else {}),
        **({"swiglu_mlp": True, "swiglu_align_to": 1} if "blocks.0.mlp.fc1_g.weight" in names else {}),
    }


def get_num_heads(weights: Mapping[str, torch.Tensor]) -> int:
    """Heads of the family's model of this width."""
    channels = get_embed_dim(weights)
    return HEADS_OF_7B.get(channels, channels // HEAD_DIM)


def _apply_bias_masks(result: Translation, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    for name in [
        name for name in result.weights if name.endswith("attn.qkv.bias") and f"{name}_mask" in tensors
    ]:
        bias, mask = result.weights.pop(name), tensors[f"{name}_mask"]
        if bias.ndim != 1 or bias.shape != mask.shape or len(bias) % 3:
            raise UserError(
                f"{source}: {name} {tuple(bias.shape)} with a mask {tuple(mask.shape)}",
                expected="one of each channel",
            )
        query, key, value = (bias.float() * mask.float()).to(bias.dtype).chunk(3)
        if key.any():  # so is NaN
            raise UserError(
                f"{source}: {name}_mask leaves a bias of the key",
                expected="1 for query and value, 0 for the key",
            )
        ours = name.removesuffix("qkv.bias")
        result.weights |= {f"{ours}q_bias": query.clone(), f"{ours}v_bias": value.clone()}
        result.renamed[name] = f"{ours}q_bias"
        result.new[f"{ours}v_bias"] = "the last third of the file's qkv.bias"
        result.reshaped[f"{ours}q_bias"] = "the first third of the file's qkv.bias"


def _compute_periods(number: int) -> torch.Tensor:
    return BASE ** (torch.arange(number) / number)


def _infer_num_heads(periods: torch.Tensor, channels: int, source: str) -> int:
    """A head of 4 n channels has n periods, BASE ** (i / n), for each direction; UserError for others."""
    number = periods.numel()
    if periods.ndim != 1 or not number or channels % (4 * number):
        raise UserError(
            f"{source}: {PERIODS} is {tuple(periods.shape)}", expected=f"a divisor of {channels} / 4"
        )
    if not torch.allclose(periods.float(), _compute_periods(number), rtol=ROUNDED):
        raise UserError(
            f"{source}: its rotary periods go from {periods[0]:.4g} to {periods[-1]:.4g}",
            expected=f"those of base {BASE:.0f}, as in all published models",
        )
    return channels // (4 * number)
