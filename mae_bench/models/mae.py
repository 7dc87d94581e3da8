"""The masked autoencoder: a timm ViT over the visible patches, a light decoder over all of them, a loss on the removed ones.

Legend: N images, L patches, K kept, M = L - K removed, D encoder width, E decoder width, C channels, p patch side.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from mae_bench.models.masking import Masking, gather_tokens, random_masking
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec


class MAE(nn.Module):
    """MAE (arXiv 2111.06377). Without the prefix `encoder.` its parameters bear the reference's names.

    In training mode only what the loss needs is computed: the patch embedding of kept patches, no unshuffle (attention does not
    mind the order), and the last decoder block, norm and prediction for removed patches alone. The loss is the same.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
    ):
        super().__init__()
        self.spec, self.norm_pix_loss = spec, norm_pix_loss
        encoder: Any = build_vit(spec)  # Any: timm's parts are typed as what they might be, not as what they are here
        encoder.pos_embed.requires_grad_(False)
        self.encoder = encoder
        self.decoder_embed = nn.Linear(spec.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_2d(decoder_embed_dim, spec.grid_size), requires_grad=False)
        norm: Any = partial(nn.LayerNorm, eps=spec.norm_eps)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm, mlp_layer=Mlp)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, spec.patch_size[0] * spec.patch_size[1] * spec.in_chans)
        self._init_decoder()

    def _init_decoder(self) -> None:
        for module in (self.decoder_embed, *self.decoder_blocks.modules(), self.decoder_pred):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def split_patches(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, L, C p p), channel first inside a patch, as the patch embedding's filters are."""
        n, c = imgs.shape[:2]
        (h, w), (p, q) = self.spec.grid_size, self.spec.patch_size
        return imgs.reshape(n, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, c * p * q)

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, L, p p C), channel last inside a patch: the layout of `pred`."""
        return self._channel_last(self.split_patches(imgs))

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, L, p p C) -> (N, C, H, W)."""
        n, c = patches.shape[0], self.spec.in_chans
        (h, w), (p, q) = self.spec.grid_size, self.spec.patch_size
        return patches.reshape(n, h, w, p, q, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * p, w * q)

    def _channel_last(self, patches: torch.Tensor) -> torch.Tensor:
        n, m, _ = patches.shape
        return patches.reshape(n, m, self.spec.in_chans, -1).transpose(2, 3).reshape(n, m, -1)

    def forward_encoder(self, patches: torch.Tensor, masking: Masking) -> torch.Tensor:
        """patches (N, L, C p p) -> latent (N, 1 + K, D): only kept patches are embedded and encoded."""
        vit: Any = self.encoder
        projection = vit.patch_embed.proj
        x = F.linear(gather_tokens(patches, masking.ids_keep), projection.weight.flatten(1), projection.bias)
        x = x + gather_tokens(vit.pos_embed[:, 1:], masking.ids_keep)
        cls_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)
        return vit.norm(vit.blocks(x))

    def forward_decoder(self, latent: torch.Tensor, masking: Masking) -> torch.Tensor:
        """latent (N, 1 + K, D) -> pred (N, L, p p C) in eval mode, (N, M, p p C) of the removed patches in training.

        The sequence is cls, kept, removed: patches stay shuffled, with their positions gathered, until the prediction is done.
        """
        x = self.decoder_embed(latent)
        positions = gather_tokens(self.decoder_pos_embed[:, 1:], masking.ids_shuffle)
        mask_tokens = self.mask_token.expand(x.shape[0], positions.shape[1] - masking.len_keep, -1).to(x.dtype)
        x = torch.cat([x, mask_tokens], dim=1)
        x = x + torch.cat([self.decoder_pos_embed[:, :1].expand(x.shape[0], -1, -1), positions], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        first = 1 + masking.len_keep if self.training else 1
        x = last_tokens(self.decoder_blocks[-1], x, first)
        pred = self.decoder_pred(self.decoder_norm(x))
        return pred if self.training else gather_tokens(pred, masking.ids_restore)

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """patches (N, M, C p p) -> pixels (N, M, p p C), normalised a patch by its own mean and unbiased variance if
        norm_pix_loss."""
        target = self._channel_last(patches).float()
        if self.norm_pix_loss:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return target

    def forward(
        self, imgs: torch.Tensor, mask_ratio: float = 0.75, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """imgs (N, C, H, W), noise (N, L) -> loss (), pred (see `forward_decoder`), mask (N, L) with 1 = removed.

        The loss is the mean squared error over removed patches.
        """
        if noise is None:
            noise = torch.rand(imgs.shape[0], self.spec.num_patches, device=imgs.device)
        masking = random_masking(noise, mask_ratio)
        patches = self.split_patches(imgs)
        pred = self.forward_decoder(self.forward_encoder(patches, masking), masking)
        removed = pred if self.training else gather_tokens(pred, masking.ids_masked)
        loss = F.mse_loss(removed.float(), self.target(gather_tokens(patches, masking.ids_masked)))
        return loss, pred, masking.mask


def last_tokens(block: Any, x: torch.Tensor, first: int) -> torch.Tensor:
    """block(x)[:, first:] for x (N, T, E), without the queries, projections and MLP of the tokens before `first`."""
    attn = block.attn
    n, t, width = x.shape
    y = block.norm1(x)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    heads = lambda z: z.reshape(n, -1, attn.num_heads, width // attn.num_heads).transpose(1, 2)  # noqa: E731
    query = heads(F.linear(y[:, first:], weight[:width], bias[:width]))
    key, value = F.linear(y, weight[width:], bias[width:]).chunk(2, dim=-1)
    y = F.scaled_dot_product_attention(query, heads(key), heads(value))
    x = x[:, first:] + attn.proj(y.transpose(1, 2).reshape(n, t - first, width))
    return x + block.mlp(block.norm2(x))
