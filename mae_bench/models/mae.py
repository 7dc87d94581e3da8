"""The masked autoencoder (MAE, arXiv 2111.06377): encoder, decoder and loss.

Legend: N batch, L patches, K kept patches, M = L - K removed patches, T tokens, D encoder width, E decoder
width, C channels, H W image, h w grid of patches, p patch side, dim values that are predicted per patch.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from mae_bench.errors import UserError
from mae_bench.models.masking import Masking, build_masking, gather_tokens, sample_noise
from mae_bench.models.options import MAEOptions
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.models.targets import build_target
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec


class MAE(nn.Module):
    """Masked autoencoder with a timm ViT as encoder and the ablation axes of the paper's Table 1 as options.

    Methods and parameters are named as in facebookresearch/mae, with the prefix `encoder.` for the encoder's
    parameters. Compared with the reference, work that does not change the result is left out:

    - only kept patches are embedded, and the decoder keeps the shuffled order, as attention does not depend
      on it;
    - with `scored_only`, the last decoder block, its norm and the prediction are computed only for the
      patches that enter the loss. The pretraining job uses this path.

    The weights of a block are only used inside that block's own `forward`, so that blocks can be sharded,
    recomputed and compiled one by one.
    """

    def __init__(self, spec: BackboneSpec, options: MAEOptions | None = None):
        """Build the model with fresh weights. Raise UserError if the sizes do not fit together."""
        super().__init__()
        options = options or MAEOptions()
        _check_sizes(spec, options)
        self.spec, self.options = spec, options
        self._build_encoder()
        self.target = build_target(spec, options)
        self._build_decoder()

    def _build_encoder(self) -> None:
        encoder: Any = build_vit(self.spec)  # Any: timm types its parts more widely than they are here
        encoder.pos_embed.requires_grad_(False)
        self.encoder = encoder

    def _build_decoder(self) -> None:
        spec, width, num_heads = self.spec, self.options.decoder_embed_dim, self.options.decoder_num_heads
        norm: Any = partial(nn.LayerNorm, eps=spec.norm_eps)
        self.decoder_embed = nn.Linear(spec.embed_dim, width)
        mask_token_width = spec.embed_dim if self.options.encoder_mask_tokens else width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mask_token_width))
        self.decoder_pos_embed = nn.Parameter(sincos_2d(width, spec.grid_size), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(width, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm, mlp_layer=Mlp)
            for _ in range(self.options.decoder_depth)
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, self.target.dim)
        for module in (self.decoder_embed, *self.decoder_blocks.modules(), self.decoder_pred):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def can_reconstruct(self) -> bool:
        """Whether predictions can be shown as an image."""
        return self.target.is_picture

    # Images and patches

    def split_patches(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, L, C p p): channel first within a patch, as in the patch embedding."""
        n, c = imgs.shape[:2]
        (h, w), (p, q) = self.spec.grid_size, self.spec.patch_size
        return imgs.reshape(n, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, c * p * q)

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, L, p p C): channel last within a patch, as in `pred`."""
        n, c = imgs.shape[:2]
        (h, w), (p, q) = self.spec.grid_size, self.spec.patch_size
        return imgs.reshape(n, c, h, p, w, q).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, p * q * c)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """patches (N, L, p p C) -> imgs (N, C, H, W)."""
        n, c = patches.shape[0], self.spec.in_chans
        (h, w), (p, q) = self.spec.grid_size, self.spec.patch_size
        return patches.reshape(n, h, w, p, q, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * p, w * q)

    # Encoder, decoder, loss

    def encode(self, patches: torch.Tensor, masking: Masking) -> torch.Tensor:
        """patches (N, L, C p p) -> latent (N, 1 + K, D) of the class token and the kept patches.

        With `encoder_mask_tokens`: (N, 1 + L, D), patches in the order of `ids_shuffle`.
        """
        vit: Any = self.encoder
        projection = vit.patch_embed.proj
        # Embed the kept patches: (N, K, D)
        x = F.linear(gather_tokens(patches, masking.ids_keep), projection.weight.flatten(1), projection.bias)
        if self.options.encoder_mask_tokens:
            x = torch.cat([x, self._mask_tokens(x, masking.num_masked)], dim=1)
        # Add the position of each patch
        x = x + gather_tokens(vit.pos_embed[:, 1:], masking.ids_shuffle[:, : x.shape[1]])
        # Prepend the class token: (N, 1 + K, D)
        cls_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)
        # Apply the Transformer blocks and the final norm
        for block in vit.blocks:
            x = self._run_block(block, x)
        latent: torch.Tensor = vit.norm(x)
        return latent

    def decode(self, latent: torch.Tensor, masking: Masking, *, scored_only: bool = False) -> torch.Tensor:
        """latent (N, 1 + K, D) -> pred (N, L, dim).

        With `scored_only`: only the patches that enter the loss, in the order of `ids_shuffle`: (N, M,
        dim), or (N, L, dim) with loss_on "all".
        """
        # Project to the decoder's width and append mask tokens: class token, kept, removed patches (N, 1 +
        # L, E)
        x = self.decoder_embed(latent)
        if not self.options.encoder_mask_tokens:
            x = torch.cat([x, self._mask_tokens(x, masking.num_masked)], dim=1)
        # Add positions, gathered in the same shuffled order
        cls_pos = self.decoder_pos_embed[:, :1].expand(x.shape[0], -1, -1)
        patch_pos = gather_tokens(self.decoder_pos_embed[:, 1:], masking.ids_shuffle)
        x = x + torch.cat([cls_pos, patch_pos], dim=1)
        # Apply the Transformer blocks; the last one drops the class token, and the kept patches if not scored
        for block in self.decoder_blocks[:-1]:
            x = self._run_block(block, x)
        first = 1 + masking.len_keep if scored_only and self.options.loss_on == "masked" else 1
        x = self._run_block(self.decoder_blocks[-1], x, first)
        # Predict each patch
        pred: torch.Tensor = self.decoder_pred(self.decoder_norm(x))
        # Unshuffle: back to raster order
        return pred if scored_only else gather_tokens(pred, masking.ids_restore)

    def forward(
        self,
        imgs: torch.Tensor,
        mask_ratio: float = 0.75,
        noise: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        *,
        scored_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """imgs (N, C, H, W) -> loss (), pred (N, L, dim), mask (N, L) with 1 = removed.

        noise: (N, L); the patches with the smallest noise are kept. Drawn by `mask_sampling` if omitted.
        targets: (N, L) ids of a tokenizer, required by the target "tokens".
        scored_only: compute the prediction only for patches that enter the loss, see `decode` for its
            shape. The loss is the same up to rounding.
        """
        self._check_input(imgs, noise)
        masking = self._draw_masking(imgs, mask_ratio, noise)
        patches = self.split_patches(imgs)
        latent = self.encode(patches, masking)
        pred = self.decode(latent, masking, scored_only=scored_only)
        ids = masking.ids_masked if self.options.loss_on == "masked" else masking.ids_shuffle
        scored = pred if scored_only else gather_tokens(pred, ids)
        loss = self.target.loss(scored.float(), self.target(imgs, patches, targets, ids))
        return loss, pred, masking.mask

    # The steps with the signatures of facebookresearch/mae

    def random_masking(
        self, x: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (N, L, D) -> x_masked (N, K, D), mask (N, L) with 1 = removed, ids_restore (N, L)."""
        masking = self._draw_masking(x, mask_ratio, noise)
        return gather_tokens(x, masking.ids_keep), masking.mask, masking.ids_restore

    def forward_encoder(
        self, imgs: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """imgs (N, C, H, W) -> latent (N, 1 + K, D), mask (N, L), ids_restore (N, L)."""
        self._check_input(imgs, noise)
        masking = self._draw_masking(imgs, mask_ratio, noise)
        return self.encode(self.split_patches(imgs), masking), masking.mask, masking.ids_restore

    def forward_decoder(self, latent: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """latent (N, 1 + K, D), ids_restore (N, L) -> pred (N, L, dim)."""
        return self.decode(latent, Masking(ids_restore.argsort(dim=1), latent.shape[1] - 1))

    def forward_loss(
        self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """imgs (N, C, H, W), pred (N, L, dim), mask (N, L) -> loss (), the mean over removed patches.

        With loss_on "all": the mean over all patches. targets: as in `forward`.
        """
        ids = torch.arange(self.spec.num_patches, device=imgs.device).expand(imgs.shape[0], -1)
        target = self.target(imgs, self.split_patches(imgs), targets, ids)
        scored = mask.bool() if self.options.loss_on == "masked" else torch.ones_like(mask, dtype=torch.bool)
        return self.target.loss(pred[scored][None].float(), target[scored][None])

    def _draw_masking(self, x: torch.Tensor, mask_ratio: float, noise: torch.Tensor | None) -> Masking:
        """Masking of a batch x (N, ...) by the given noise (N, L), or by noise drawn here."""
        if noise is None:
            sampling = self.options.mask_sampling
            noise = sample_noise(sampling, len(x), self.spec.grid_size, mask_ratio, None, x.device)
        return build_masking(noise, mask_ratio)

    def _mask_tokens(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """(N, count, D or E), in the dtype of x (N, ...)."""
        return self.mask_token.expand(x.shape[0], count, -1).to(x.dtype)

    def _run_block(self, block: nn.Module, x: torch.Tensor, *args: int) -> torch.Tensor:
        if self.options.activation_checkpointing and self.training:
            # Blocks draw no random numbers, so there is no generator state to keep
            out: torch.Tensor = checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            out = block(x, *args)
        return out

    def _check_input(self, imgs: torch.Tensor, noise: torch.Tensor | None) -> None:
        shape = (self.spec.in_chans, *self.spec.img_size)
        if imgs.ndim != 4 or imgs.shape[1:] != shape:
            raise UserError(
                f"images of shape {tuple(imgs.shape)}",
                expected=f"(N, {', '.join(map(str, shape))}), the size that the model was built for",
                fix="resize the images, or build the model with their in_chans and img_size",
            )
        if not imgs.is_floating_point():
            raise UserError(
                f"images of {imgs.dtype}",
                expected="floating-point pixels",
                fix="normalise the pixels with the mean and std of the spec",
            )
        noise_shape = (imgs.shape[0], self.spec.num_patches)
        if noise is not None and noise.shape != noise_shape:
            raise UserError(f"noise of shape {tuple(noise.shape)}", expected=f"{noise_shape}")


def _check_sizes(spec: BackboneSpec, options: MAEOptions) -> None:
    width, depth, num_heads = options.decoder_embed_dim, options.decoder_depth, options.decoder_num_heads
    if spec.num_prefix_tokens != 1 or spec.pos_embed not in ("sincos", "learned"):
        raise UserError(
            f"an encoder with {spec.num_prefix_tokens} prefix tokens and {spec.pos_embed} positions",
            expected="one class token and an absolute position table",
        )
    if spec.pos_embed == "sincos" and spec.embed_dim % 4:
        raise UserError(f"embed_dim {spec.embed_dim}", expected="a multiple of 4, for the sine-cosine table")
    if min(width, depth, num_heads) < 1:
        raise UserError(
            f"decoder_embed_dim {width}, decoder_depth {depth}, decoder_num_heads {num_heads}",
            expected="at least 1 each",
        )
    if width % num_heads or width % 4:
        raise UserError(
            f"decoder_embed_dim {width} with decoder_num_heads {num_heads}",
            expected="a width that is divisible by the number of heads, and by 4 for the sine-cosine table",
        )


class DecoderBlock(Block):
    """timm's Block with the option to skip the queries, output projections and MLP of the first tokens."""

    def forward(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:  # type: ignore[override]
        """x (N, T, E) -> (N, T - first, E): the output of the full block without its first `first` tokens."""
        attn: Any = self.attn
        n, t, width = x.shape
        num_heads = attn.num_heads

        def split_heads(z: torch.Tensor) -> torch.Tensor:
            return z.reshape(n, -1, num_heads, width // num_heads).transpose(1, 2)

        # Attention: all tokens are keys and values, those from `first` on are queries
        y = self.norm1(x)
        if first == 0:
            # One chunk: autograd joins the three gradients in one copy, where timm's code needs two
            query, key, value = attn.qkv(y).chunk(3, dim=-1)
        else:
            weight, bias = attn.qkv.weight, attn.qkv.bias
            query = F.linear(y[:, first:], weight[:width], bias[:width])
            key, value = F.linear(y, weight[width:], bias[width:]).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(split_heads(query), split_heads(key), split_heads(value))
        x = x[:, first:] + attn.proj(y.transpose(1, 2).reshape(n, t - first, width))
        # MLP
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out
