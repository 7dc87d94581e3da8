"""dinov3: files of facebookresearch/dinov3 (rotary ViTs: backbones, teachers of its trainings)."""

from collections.abc import Mapping
from typing import Any

import torch

from backbones.families import family
from backbones.formats.dinov2 import MASK_TOKEN, OUTSIDE
from backbones.reading.source import Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.translation import Translation, drop_empty_registers, explain, get_embed_dim
from mae_bench.errors import UserError

INIT_VALUES = 1e-5  # of the layer scale, in dinov3/hub/backbones.py
BASE = 100.0  # of the rotary periods
PERIODS = "rope_embed.periods"
TOLERANCE = 0.02  # of periods computed in bfloat16, the default of the code
ROTARY = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True}
ROTATIONS = f"assumed: rotations of base {BASE:.0f}, as in all published models"
SAT493M = (
    "mean and std are those of the LVD-1689M models; "
    "weights of SAT-493M need mean 0.430 0.411 0.296, std 0.213 0.156 0.143"
)
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
        r"local_cls_norm\.": "norm of the local crops' class tokens: used only in pretraining",
        r"blocks\.\d+\.attn\.qkv\.bias_mask$": "applied to the bias: it switches the key's off",
    },
)


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether a timm ViT has rotary periods or storage tokens, and no position embedding."""
    keys = set(checkpoint.tensors)
    if not {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"} <= keys:
        return False
    return "pos_embed" not in keys and (PERIODS in keys or "storage_tokens" in keys)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a DINOv3, whose storage tokens are timm's registers.

    Where a mask switches the key's bias off, query and value have separate biases, as in timm's Eva. The
    number of rotary periods shows the number of heads.
    """
    keys, source = checkpoint.tensors, checkpoint.source
    if "cls_norm.weight" in keys:
        raise UserError(
            f"{source} has one final norm for its class token and another for its patches "
            "(untie_cls_and_patch_norms)",
            expected="one final norm, as in all published models and in timm's Eva",
        )
    result = NAMES.read(keys, source)
    drop_empty_registers(result)
    _apply_bias_masks(result, keys, source)
    result.outside = explain(checkpoint.outside, OUTSIDE)
    result.facts = {"arch": "eva", "pos_embed": "rope", "options": infer_options(result.weights)}
    result.assumed = family("dinov3")
    result.notes.append(SAT493M)
    if PERIODS not in keys:
        result.sources["options"] = ROTATIONS
    else:
        periods = keys[PERIODS]
        result.facts["num_heads"] = _infer_num_heads(periods, get_embed_dim(result.weights), source)
        if not torch.allclose(periods.float(), _compute_periods(periods.numel()), rtol=1e-5):
            result.notes.append(
                "the file's rotary periods are rounded; the model's are float32, as in timm and transformers"
            )
    return result


def infer_options(
    weights: Mapping[str, torch.Tensor], base: float = BASE, init_values: float = INIT_VALUES
) -> dict[str, Any]:
    """Return the options of timm's Eva that the weights' names show, here and in transformers' layout.

    swiglu_align_to=1 keeps gate and value apart, at any width.
    """
    has_key_bias = "blocks.0.attn.qkv.bias" in weights
    has_bias = has_key_bias or "blocks.0.attn.q_bias" in weights
    options: dict[str, Any] = {**ROTARY, "rope_temperature": base, "qkv_bias": has_bias}
    if has_key_bias:
        options["attn_type"] = "rope"
    if "blocks.0.gamma_1" in weights:
        options["init_values"] = init_values
    if "blocks.0.mlp.fc1_g.weight" in weights:
        options |= {"swiglu_mlp": True, "swiglu_align_to": 1}
    return options


def _apply_bias_masks(result: Translation, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Split biases of qkv with a mask into those of query and value; raise UserError for a key bias."""
    biases = [name for name in result.weights if name.endswith("attn.qkv.bias")]
    for name in biases:
        if f"{name}_mask" not in tensors:
            continue
        bias, mask = result.weights.pop(name), tensors[f"{name}_mask"]
        if bias.ndim != 1 or bias.shape != mask.shape or len(bias) % 3:
            raise UserError(
                f"{source}: {name} {tuple(bias.shape)} with a mask {tuple(mask.shape)}",
                expected="one value per channel in both",
            )
        query, key, value = (bias.float() * mask.float()).to(bias.dtype).chunk(3)
        if key.any():  # NaN counts too
            raise UserError(
                f"{source}: {name}_mask leaves a bias of the key",
                expected="1 for query and value, 0 for the key",
            )
        attn = name.removesuffix("qkv.bias")
        result.weights |= {f"{attn}q_bias": query.clone(), f"{attn}v_bias": value.clone()}
        result.renamed[name] = f"{attn}q_bias"
        result.new[f"{attn}v_bias"] = "the last third of the file's qkv.bias"
        result.reshaped[f"{attn}q_bias"] = "the first third of the file's qkv.bias"


def _compute_periods(num_periods: int) -> torch.Tensor:
    return BASE ** (torch.arange(num_periods) / num_periods)


def _infer_num_heads(periods: torch.Tensor, embed_dim: int, source: str) -> int:
    """Return the number of heads: one of 4 n channels has n periods, BASE ** (i / n), per direction.

    Raise UserError for other periods.
    """
    num_periods = periods.numel()
    if periods.ndim != 1 or not num_periods or embed_dim % (4 * num_periods):
        raise UserError(
            f"{source}: {PERIODS} is {tuple(periods.shape)}", expected=f"a divisor of {embed_dim} / 4"
        )
    if not torch.allclose(periods.float(), _compute_periods(num_periods), rtol=TOLERANCE):
        raise UserError(
            f"{source}: its rotary periods range from {periods[0]:.4g} to {periods[-1]:.4g}",
            expected=f"those of base {BASE:.0f}, as in all published models",
        )
    return embed_dim // (4 * num_periods)
