"""eva02: EVA-02 of baaivision/EVA (pretrained, fine-tuned): rotary positions, SwiGLU, sub-LN."""

import math
from collections.abc import Mapping

import torch

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.structure import infer_eva_options
from backbones.translating.translation import HEAD, MASK_TOKEN, Translation, get_embed_dim
from mae_bench.errors import UserError

SEQ_LEN = 16  # side of the grid in which rotations count, for any image size (pt_hw_seq_len: 224 / 14)
FREQS = ("rope.freqs_cos", "rope.freqs_sin")
BASE = 10000.0
TOLERANCE = 0.02  # of a cosine in float16 at positions up to 16
SPLIT = {"attn.q_bias": "attn.q_proj.bias", "attn.v_bias": "attn.v_proj.bias"}  # with three projections
GATED = {
    "attn.inner_attn_ln": "attn.norm",
    "mlp.ffn_ln": "mlp.norm",
    "mlp.w12": "mlp.fc1",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
}
DROP = {
    r"(.*\.)?rope\.freqs_(cos|sin)$": "rotations of each patch: computed from the grid",
    r"head\.": HEAD,
    r"mask_token$": MASK_TOKEN,
    r"lm_head\.": "predicts the CLIP features of the pretraining: not part of the backbone",
}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether a ViT with positions and a query bias has a SwiGLU in xFormers' or EVA's names."""
    keys = set(checkpoint.tensors)
    if not {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.q_bias", "blocks.0.mlp.w3.weight"} <= keys:
        return False
    return "blocks.0.mlp.w1.weight" in keys or "blocks.0.mlp.w12.weight" in keys


def read(checkpoint: Checkpoint) -> Translation:
    """Translate an EVA-02; the first half of a packed w12 is the gate, as in timm.

    Raise UserError for stored rotations that differ from the computed ones.
    """
    tensors, source = checkpoint.tensors, checkpoint.source
    block = GATED | (SPLIT if "blocks.0.attn.q_proj.weight" in tensors else {})
    result = Naming(top={}, block=block, blocks=("blocks.{}.",), drop=DROP).read(tensors, source)
    rotary = {"use_rot_pos_emb": True, "ref_feat_shape": [_infer_seq_len(tensors, source)] * 2}
    options = infer_eva_options(result.weights) | rotary
    result.facts = {"arch": "eva", "options": options, "pos_embed": "rope"}
    width = get_embed_dim(result.weights)
    if FREQS[0] in tensors and tensors[FREQS[0]].ndim == 2:
        result.facts["num_heads"] = width // tensors[FREQS[0]].shape[1]
    if not set(FREQS) <= set(tensors):
        result.sources["options"] = f"assumed: rotations for a grid of {SEQ_LEN} x {SEQ_LEN} patches"
    result.assumed = family("eva02") | {"norm_eps": 1e-6}
    if "fc_norm.weight" in result.weights:
        result.assumed["pretrain_method"] += ", fine-tuned"
    return result


def _infer_seq_len(tensors: Mapping[str, torch.Tensor], source: str) -> int:
    """Return the side of the grid in which rotations count, from the stored angles (L, head width).

    Between two neighbours in a row they turn by `seq_len` / grid side times the frequency. The family's
    default where no angles are stored.
    """
    if not set(FREQS) <= set(tensors):
        return SEQ_LEN
    cosine, sine = (tensors[name].float() for name in FREQS)
    side = math.isqrt(cosine.shape[0]) if cosine.ndim == 2 else 0
    if side < 2 or side * side != cosine.shape[0] or cosine.shape != sine.shape or cosine.shape[1] % 4:
        raise UserError(
            f"{source}: rotations of shape {tuple(cosine.shape)}",
            expected="one row per patch of a square grid",
        )
    channels = cosine.shape[1] // 2  # of each direction
    frequencies = BASE ** (-torch.arange(0, channels, 2) / channels)
    seq_len = round(math.atan2(sine[1, -1].item(), cosine[1, -1].item()) / frequencies[-1].item() * side)
    angles = (torch.arange(side) / side * seq_len)[:, None] * frequencies.repeat_interleave(2)
    expected = torch.cat([angles.repeat_interleave(side, 0), angles.repeat(side, 1)], dim=1)
    cosine_fits = torch.allclose(cosine, expected.cos(), atol=TOLERANCE)
    if not cosine_fits or not torch.allclose(sine, expected.sin(), atol=TOLERANCE):
        raise UserError(
            f"{source}: its rotations are not those of its grid",
            expected=f"axial rotations of base {BASE:.0f}",
        )
    return seq_len
