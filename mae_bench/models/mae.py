"""The masked autoencoder: a timm ViT over the visible patches, a light decoder over all of them, a loss on the removed ones.

Legend: N images, L patches, K kept, M = L - K removed, T tokens, D encoder width, E decoder width, C channels, p patch side.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from mae_bench.errors import UserError
from mae_bench.models.masking import Masking, Sampling, build_masking, gather_tokens, sample_noise
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.models.targets import TargetName, build_target
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec


class MAE(nn.Module):
    """MAE (arXiv 2111.06377) with the axes of its Table 1. Without the prefix `encoder.` parameters bear the reference's names.

    In training mode only what the loss needs is computed: the patch embedding of kept patches, no unshuffle (attention does not
    mind the order), and the last decoder block, norm and prediction for scored patches alone. The loss is the same.
    Weights of a block are touched in that block's own forward alone, so that blocks can be sharded, recomputed and compiled.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        target: TargetName = "pixels",
        num_pca: int = 96,
        num_tokens: int = 8192,
        loss_on: Literal["masked", "all"] = "masked",
        mask_sampling: Sampling = "random",
        encoder_mask_tokens: bool = False,
        activation_checkpointing: bool = False,
    ):
        """target: what is predicted (Table 1d), see `mae_bench.models.targets`; norm_pix_loss: of pixels, for "pixels".

        mask_sampling: how noise is drawn where `forward` is given none (Table 1f). encoder_mask_tokens: the encoder sees all
        patches, mask tokens in the place of removed ones, and the decoder has none of its own (Table 1c, the slow baseline).
        """
        super().__init__()
        self.options = {  # all that rebuilds it beside the spec
            "decoder_embed_dim": decoder_embed_dim, "decoder_depth": decoder_depth, "decoder_num_heads": decoder_num_heads,
            "norm_pix_loss": norm_pix_loss, "target": target, "num_pca": num_pca, "num_tokens": num_tokens, "loss_on": loss_on,
            "mask_sampling": mask_sampling, "encoder_mask_tokens": encoder_mask_tokens,
            "activation_checkpointing": activation_checkpointing,
        }  # fmt: skip
        _check(spec, decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.spec, self.norm_pix_loss, self.loss_on, self.mask_sampling = (
            spec,
            norm_pix_loss,
            loss_on,
            mask_sampling,
        )
        self.encoder_mask_tokens, self.activation_checkpointing = (
            encoder_mask_tokens,
            activation_checkpointing,
        )
        encoder: Any = build_vit(
            spec
        )  # Any: timm's parts are typed as what they might be, not as what they are here
        encoder.pos_embed.requires_grad_(False)
        self.encoder = encoder
        self.target = build_target(
            target, spec, norm_pix_loss=norm_pix_loss, num_pca=num_pca, num_tokens=num_tokens
        )
        self._build_decoder(decoder_embed_dim, decoder_depth, decoder_num_heads)

    def _build_decoder(self, width: int, depth: int, num_heads: int) -> None:
        spec = self.spec
        norm: Any = partial(nn.LayerNorm, eps=spec.norm_eps)
        self.decoder_embed = nn.Linear(spec.embed_dim, width)
        self.mask_token = nn.Parameter(
            torch.zeros(1, 1, spec.embed_dim if self.encoder_mask_tokens else width)
        )
        self.decoder_pos_embed = nn.Parameter(sincos_2d(width, spec.grid_size), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(width, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm, mlp_layer=Mlp)
            for _ in range(depth)
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
        """Whether predictions can be drawn as a picture."""
        return self.target.is_picture

    def split_patches(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, L, C p p), channel first inside a patch, as the patch embedding's filters are."""
        n, c = imgs.shape[:2]
        (h, w), (p, q) = self.spec.grid_size, self.spec.patch_size
        return imgs.reshape(n, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, c * p * q)

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, L, p p C), channel last inside a patch: the layout of a `pred` of pixels."""
        n, c = imgs.shape[:2]
        (h, w), (p, q) = self.spec.grid_size, self.spec.patch_size
        return imgs.reshape(n, c, h, p, w, q).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, p * q * c)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, L, p p C) -> (N, C, H, W)."""
        n, c = patches.shape[0], self.spec.in_chans
        (h, w), (p, q) = self.spec.grid_size, self.spec.patch_size
        return patches.reshape(n, h, w, p, q, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * p, w * q)

    def _run(self, block: nn.Module, x: torch.Tensor, *args: int) -> torch.Tensor:
        if self.activation_checkpointing and self.training:  # no block draws random numbers: no state to keep
            out: torch.Tensor = checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
            return out
        return block(x, *args)

    def forward_encoder(self, patches: torch.Tensor, masking: Masking) -> torch.Tensor:
        """patches (N, L, C p p) -> latent (N, 1 + K, D): only kept patches are embedded and encoded.

        With `encoder_mask_tokens` (N, 1 + L, D), in the order of `ids_shuffle`.
        """
        vit: Any = self.encoder
        projection = vit.patch_embed.proj
        x = F.linear(gather_tokens(patches, masking.ids_keep), projection.weight.flatten(1), projection.bias)
        if self.encoder_mask_tokens:
            x = torch.cat([x, self._mask_tokens(x, masking)], dim=1)
        x = x + gather_tokens(vit.pos_embed[:, 1:], masking.ids_shuffle[:, : x.shape[1]])
        cls_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)
        for block in vit.blocks:
            x = self._run(block, x)
        return vit.norm(x)

    def _mask_tokens(self, x: torch.Tensor, masking: Masking) -> torch.Tensor:
        return self.mask_token.expand(x.shape[0], masking.num_masked, -1).to(x.dtype)

    def forward_decoder(self, latent: torch.Tensor, masking: Masking) -> torch.Tensor:
        """latent (N, 1 + K, D) -> pred (N, L, dim) in eval mode; in training that of the scored patches (`forward`).

        The sequence is cls, kept, removed: patches stay shuffled, with their positions gathered, until the prediction is done.
        """
        x = self.decoder_embed(latent)
        if not self.encoder_mask_tokens:
            x = torch.cat([x, self._mask_tokens(x, masking)], dim=1)
        positions = gather_tokens(self.decoder_pos_embed[:, 1:], masking.ids_shuffle)
        x = x + torch.cat([self.decoder_pos_embed[:, :1].expand(x.shape[0], -1, -1), positions], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = self._run(block, x)
        first = 1 + masking.len_keep if self.training and self.loss_on == "masked" else 1
        x = self._run(self.decoder_blocks[-1], x, first)
        pred = self.decoder_pred(self.decoder_norm(x))
        return pred if self.training else gather_tokens(pred, masking.ids_restore)

    def forward(
        self,
        imgs: torch.Tensor,
        mask_ratio: float = 0.75,
        noise: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """imgs (N, C, H, W), noise (N, L), targets (N, L) token ids -> loss (), pred, mask (N, L) with 1 = removed.

        Patches of smallest noise are kept. The loss is the mean over removed patches, or over all with loss_on "all".
        pred is (N, L, dim) in eval mode; in training (N, M, dim) of the removed patches in the order of their noise, with
        loss_on "all" of all of them in that order. targets: what a tokenizer made of the images, for the target "tokens".
        """
        self._check_input(imgs, noise)
        if noise is None:
            noise = sample_noise(
                self.mask_sampling, len(imgs), self.spec.grid_size, mask_ratio, None, imgs.device
            )
        masking = build_masking(noise, mask_ratio)
        patches = self.split_patches(imgs)
        pred = self.forward_decoder(self.forward_encoder(patches, masking), masking)
        ids = masking.ids_masked if self.loss_on == "masked" else masking.ids_shuffle
        scored = pred if self.training else gather_tokens(pred, ids)
        loss = self.target.loss(scored.float(), self.target(imgs, patches, targets, ids))
        return loss, pred, masking.mask

    def _check_input(self, imgs: torch.Tensor, noise: torch.Tensor | None) -> None:
        want = (self.spec.in_chans, *self.spec.img_size)
        if imgs.ndim != 4 or imgs.shape[1:] != want:
            raise UserError(
                f"images of shape {tuple(imgs.shape)}", expected=f"(N, {', '.join(map(str, want))}), as the model was built",
                fix="resize the images, or build the model with their in_chans and img_size",
            )  # fmt: skip
        if not imgs.is_floating_point():
            raise UserError(
                f"images of {imgs.dtype}",
                expected="floats",
                fix="normalise pixels by the spec's mean and std",
            )
        if noise is not None and noise.shape != (imgs.shape[0], self.spec.num_patches):
            raise UserError(
                f"noise of shape {tuple(noise.shape)}", expected=f"{(imgs.shape[0], self.spec.num_patches)}"
            )


def _check(spec: BackboneSpec, decoder_embed_dim: int, decoder_depth: int, decoder_num_heads: int) -> None:
    if spec.num_prefix_tokens != 1 or spec.pos_embed not in ("sincos", "learned"):
        raise UserError(
            f"an encoder with {spec.num_prefix_tokens} prefix tokens and {spec.pos_embed} positions",
            expected="one class token and a position table",
        )
    if spec.pos_embed == "sincos" and spec.embed_dim % 4:
        raise UserError(f"embed_dim {spec.embed_dim}", expected="a multiple of 4, for the sine-cosine table")
    if min(decoder_embed_dim, decoder_depth, decoder_num_heads) < 1:
        raise UserError(
            f"a decoder {decoder_embed_dim} wide and {decoder_depth} deep with {decoder_num_heads} heads",
            expected="one of each at least",
        )
    if decoder_embed_dim % decoder_num_heads or decoder_embed_dim % 4:
        raise UserError(
            f"decoder_embed_dim {decoder_embed_dim} with {decoder_num_heads} heads",
            expected="a width that the heads divide, and 4 (for the sine-cosine table)",
        )


class DecoderBlock(Block):
    """timm's Block, which can leave out the queries, projections and MLP of the tokens before `first`."""

    def forward(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:  # type: ignore[override]
        """x (N, T, E) -> (N, T - first, E), the same as all of them without the first ones."""
        attn: Any = self.attn
        n, t, width = x.shape
        y = self.norm1(x)
        if first == 0:
            query, key, value = attn.qkv(y).chunk(
                3, dim=-1
            )  # their gradients are put together in one copy, where timm needs two
        else:
            weight, bias = attn.qkv.weight, attn.qkv.bias
            query = F.linear(y[:, first:], weight[:width], bias[:width])
            key, value = F.linear(y, weight[width:], bias[width:]).chunk(2, dim=-1)
        heads = lambda z: z.reshape(n, -1, attn.num_heads, width // attn.num_heads).transpose(1, 2)  # noqa: E731
        y = F.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        x = x[:, first:] + attn.proj(y.transpose(1, 2).reshape(n, t - first, width))
        return x + self.mlp(self.norm2(x))
