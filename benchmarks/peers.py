"""Peers of pretraining: Hugging Face's ViTMAE, and timm blocks composed as in the reference.

Legend: N batch, L patches, K kept patches, D encoder width, C channels, H W image, p patch side.
"""

import re
from functools import partial
from typing import Any

import torch
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_bench.models.mae import MAE
from mae_bench.models.options import MAEOptions
from mae_bench.spec import BackboneSpec

SIZES = {  # patch side, embed_dim, depth, num_heads, decoder_depth
    "toy": (16, 32, 2, 2, 1),
    "small": (16, 384, 12, 6, 8),
    "base": (16, 768, 12, 12, 8),
    "large": (16, 1024, 24, 16, 8),
    "huge": (14, 1280, 32, 16, 8),
}
DECODER_DIM, DECODER_HEADS = 512, 16
MASK_RATIO = 0.75
HF_MODULES = {  # within a block, ours -> Hugging Face's
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
HF_PREFIXES = {  # ours -> Hugging Face's
    "encoder.cls_token": "vit.embeddings.cls_token",
    "encoder.pos_embed": "vit.embeddings.position_embeddings",
    "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "encoder.blocks": "vit.layers",
    "encoder.norm": "vit.layernorm",
    "decoder_blocks": "decoder.decoder_layers",
}
_IN_BLOCK = re.compile(r"(.*layers\.\d+)\.(.+)\.(weight|bias)$")


def vit_spec(size: str) -> BackboneSpec:
    """Return the ViT of a size at 224 pixels (toy: 64)."""
    patch, width, depth, heads, _ = SIZES[size]
    side = 64 if size == "toy" else 224
    return BackboneSpec("vit", (side, side), (patch, patch), 3, width, depth, heads, pos_embed="sincos")


def decoder_depth_of(size: str) -> int:
    """Return the paper's 8 blocks (toy: 1)."""
    return SIZES[size][4]


def build_ours(spec: BackboneSpec, decoder_depth: int, **more: Any) -> MAE:
    """Build our MAE with the paper's decoder and normalised pixels."""
    options = MAEOptions(
        decoder_embed_dim=DECODER_DIM,
        decoder_depth=decoder_depth,
        decoder_num_heads=DECODER_HEADS,
        norm_pix_loss=True,
        **more,
    )
    return MAE(spec, options).train()


def build_hf(ours: MAE, attention: str) -> ViTMAEForPreTraining:
    """Build transformers' ViTMAE with the weights of `ours`; attention is "sdpa" or "eager"."""
    spec = ours.spec
    # A keyword of every transformers config that is missing from its type
    implementation: Any = {"attn_implementation": attention}
    config = ViTMAEConfig(
        hidden_size=spec.embed_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        intermediate_size=round(spec.embed_dim * spec.mlp_ratio),
        layer_norm_eps=spec.norm_eps,
        image_size=spec.img_size[0],
        patch_size=spec.patch_size[0],
        decoder_hidden_size=DECODER_DIM,
        decoder_num_hidden_layers=len(ours.decoder_blocks),
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=4 * DECODER_DIM,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
        **implementation,
    )
    model: ViTMAEForPreTraining = ViTMAEForPreTraining(config)
    model.load_state_dict(_rename_to_hf(ours.state_dict()))
    model.train()
    return model


def _rename_to_hf(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed_weights: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        prefix = next((ours for ours in HF_PREFIXES if name.startswith(f"{ours}.") or name == ours), None)
        renamed = HF_PREFIXES[prefix] + name.removeprefix(prefix) if prefix else f"decoder.{name}"
        match = _IN_BLOCK.match(renamed)
        if match and match[2] == "attn.qkv":
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                renamed_weights[f"{match[1]}.attention.{part}_proj.{match[3]}"] = value
            continue
        if match:
            renamed = f"{match[1]}.{HF_MODULES[match[2]]}.{match[3]}"
        renamed_weights[renamed] = tensor
    return renamed_weights


class TimmMAE(nn.Module):
    """MAE of timm's blocks after section 3 and appendix A.1 of the paper, composed as in the reference.

    Every patch is embedded and predicted, tokens are unshuffled before the decoder, and the mask selects
    the loss. Parameters are named as in `MAE`.
    """

    def __init__(self, spec: BackboneSpec, decoder_depth: int):
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=spec.norm_eps)
        block = partial(Block, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm, mlp_layer=Mlp)
        p, width = spec.patch_size[0], spec.embed_dim
        encoder: Any = nn.Module()
        encoder.patch_embed = PatchEmbed(spec.img_size[0], p, spec.in_chans, width)
        encoder.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        encoder.pos_embed = nn.Parameter(torch.zeros(1, 1 + spec.num_patches, width), requires_grad=False)
        encoder.blocks = nn.ModuleList(block(width, spec.num_heads) for _ in range(spec.depth))
        encoder.norm = norm(width)
        self.encoder, self.patch = encoder, p
        self.decoder_embed = nn.Linear(width, DECODER_DIM)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, DECODER_DIM))
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, 1 + spec.num_patches, DECODER_DIM), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(block(DECODER_DIM, DECODER_HEADS) for _ in range(decoder_depth))
        self.decoder_norm = norm(DECODER_DIM)
        self.decoder_pred = nn.Linear(DECODER_DIM, p * p * spec.in_chans)

    def encode(
        self, imgs: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """imgs (N, C, H, W), noise (N, L) -> latent (N, 1 + K, D), mask (N, L), ids_restore (N, L)."""
        vit = self.encoder
        x = vit.patch_embed(imgs) + vit.pos_embed[:, 1:]
        order = noise.argsort(dim=1)
        ids_restore = order.argsort(dim=1)
        ids_keep = order[:, : int(x.shape[1] * (1 - MASK_RATIO))]
        mask = (ids_restore >= ids_keep.shape[1]).to(x.dtype)
        x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in vit.blocks:
            x = block(x)
        return vit.norm(x), mask, ids_restore

    def decode(self, latent: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """latent (N, 1 + K, D), ids_restore (N, L) -> pred (N, L, p p C)."""
        x = self.decoder_embed(latent)
        n, num_patches = ids_restore.shape
        mask_tokens = self.mask_token.expand(n, num_patches + 1 - x.shape[1], -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred: torch.Tensor = self.decoder_pred(self.decoder_norm(x))
        return pred[:, 1:]

    def target(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> normalised pixels (N, L, p p C)."""
        n, c, h, w = imgs.shape
        p = self.patch
        target = imgs.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)
        return (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()

    def forward(self, imgs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W), noise (N, L) -> loss ()."""
        latent, mask, ids_restore = self.encode(imgs, noise)
        error = (self.decode(latent, ids_restore) - self.target(imgs)).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


def build_timm(ours: MAE) -> TimmMAE:
    """Build a `TimmMAE` with the weights of `ours`."""
    model = TimmMAE(ours.spec, len(ours.decoder_blocks))
    model.load_state_dict(ours.state_dict())
    return model.train()
