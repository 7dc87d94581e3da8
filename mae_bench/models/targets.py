"""What the decoder predicts of a removed patch (arXiv 2111.06377, Table 1d): pixels, PCA coefficients, HOG, discrete tokens.

Legend: N images, L patches, M patches that are scored, C channels, p patch side, dim numbers a patch.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from mae_bench.errors import UserError
from mae_bench.models.masking import gather_tokens
from mae_bench.spec import BackboneSpec

TargetName = Literal["pixels", "pca", "hog", "tokens"]
NORM_EPS = 1e-6  # under the root of a patch's variance (facebookresearch/mae models_mae.py)


class Target(nn.Module):
    """One kind of target. dim: numbers that the decoder predicts a patch; is_picture: whether they can be drawn."""

    is_picture = False

    def __init__(self, spec: BackboneSpec, dim: int):
        super().__init__()
        self.spec, self.dim = spec, dim

    def forward(self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W), the same as patches (N, L, C p p), targets (N, L) -> what stands in the patches ids (N, M)."""
        raise NotImplementedError

    def loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """pred (N, M, dim) -> (); the mean squared error but where a target says otherwise."""
        return F.mse_loss(pred, target)

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """pred (N, L, dim) and the image's own patches (N, L, p p C) -> pixels (N, L, p p C); UserError if not a picture."""
        raise UserError(
            f"the target {type(self).__name__.lower()} cannot be drawn",
            expected="a model that predicts pixels or PCA coefficients",
        )


class Pixels(Target):
    """Pixels (dim p p C), with `norm` normalised by the patch's own mean and unbiased variance (section 3)."""

    is_picture = True

    def __init__(self, spec: BackboneSpec, norm: bool):
        super().__init__(spec, patch_values(spec))
        self.norm = norm

    def forward(self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        target = channel_last(gather_tokens(patches, ids), self.spec.in_chans).float()
        if self.norm:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + NORM_EPS).sqrt()
        return target

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Normalised predictions are given the patch's own mean and deviation back, which the model never saw."""
        if not self.norm:
            return pred
        return pred * (patches.var(dim=-1, keepdim=True) + NORM_EPS).sqrt() + patches.mean(dim=-1, keepdim=True)


def patch_values(spec: BackboneSpec) -> int:
    """p p C"""
    return spec.patch_size[0] * spec.patch_size[1] * spec.in_chans


def channel_last(patches: torch.Tensor, in_chans: int) -> torch.Tensor:
    """(N, M, C p p) -> (N, M, p p C)"""
    n, m, _ = patches.shape
    return patches.reshape(n, m, in_chans, -1).transpose(2, 3).reshape(n, m, -1)


def build_target(name: TargetName, spec: BackboneSpec, *, norm_pix_loss: bool, num_pca: int, num_tokens: int) -> Target:
    """The target of that name; norm_pix_loss is for pixels, num_pca and num_tokens for theirs."""
    return Pixels(spec, norm_pix_loss)
