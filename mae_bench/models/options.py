"""Options of a masked autoencoder, shared by the model, its file and the pretraining config."""

from dataclasses import dataclass
from typing import Literal

TargetName = Literal["pixels", "pca", "hog", "tokens"]
Sampling = Literal["random", "block", "grid"]
LossOn = Literal["masked", "all"]


@dataclass(frozen=True)
class MAEOptions:
    """All that is needed to rebuild an `MAE` besides its BackboneSpec; stored in `mae.safetensors` as JSON.

    Defaults are those of the reference's constructor (facebookresearch/mae models_mae.py).

    decoder_embed_dim, decoder_depth, decoder_num_heads: size of the decoder (Tables 1a and 1b).
    norm_pix_loss: normalise each target patch by its own mean and variance; only used by the target "pixels".
    target: what the decoder predicts (Table 1d), see `mae_bench.models.targets`.
    num_pca: number of coefficients of the target "pca".
    num_tokens: size of the vocabulary of the target "tokens".
    loss_on: average the loss over the removed patches or over all patches.
    mask_sampling: distribution of the masks that the model draws itself (Table 1f).
    encoder_mask_tokens: let the encoder see all patches, with mask tokens in place of the removed ones. The
        decoder then has no mask token of its own (Table 1c, the slow baseline).
    activation_checkpointing: recompute each block in the backward pass to save memory.
    """

    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    norm_pix_loss: bool = False
    target: TargetName = "pixels"
    num_pca: int = 96
    num_tokens: int = 8192
    loss_on: LossOn = "masked"
    mask_sampling: Sampling = "random"
    encoder_mask_tokens: bool = False
    activation_checkpointing: bool = False
