"""What the decoder predicts of a removed patch (arXiv 2111.06377, Table 1d): pixels, PCA coefficients, HOG, discrete tokens.

Legend: N images, L patches, M patches that are scored, C channels, p patch side, dim numbers a patch.
"""

import math
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

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """imgs (N, C, H, W), the same as patches (N, L, C p p), targets (N, L) -> what stands in the patches ids (N, M)."""
        raise NotImplementedError

    def loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """pred (N, M, dim) -> (); the mean squared error but where a target says otherwise."""
        return F.mse_loss(pred, target)

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """pred (N, L, dim) and the image's own patches (N, L, p p C) -> pixels (N, L, p p C); UserError if not a picture."""
        raise UserError(
            f"a model that predicts {type(self).__name__} has no picture to draw",
            expected="one that predicts pixels or PCA",
        )


class Pixels(Target):
    """Pixels (dim p p C), with `norm` normalised by the patch's own mean and unbiased variance (section 3)."""

    is_picture = True

    def __init__(self, spec: BackboneSpec, norm: bool):
        super().__init__(spec, patch_values(spec))
        self.norm = norm

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """(N, M, p p C)"""
        target = channel_last(gather_tokens(patches, ids), self.spec.in_chans).float()
        if self.norm:
            target = (target - target.mean(dim=-1, keepdim=True)) / (
                target.var(dim=-1, keepdim=True) + NORM_EPS
            ).sqrt()
        return target

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Normalised predictions are given the patch's own mean and deviation back, which the model never saw."""
        if not self.norm:
            return pred
        return pred * (patches.var(dim=-1, keepdim=True) + NORM_EPS).sqrt() + patches.mean(
            dim=-1, keepdim=True
        )


class PCA(Target):
    """The largest PCA coefficients of a patch's pixels (section 4, 'Reconstruction target': 96 of them; dim num).

    The paper says no more than that PCA is done in the space of patches. Here: patches of all three channels together, their
    mean taken off, coefficients in the scale of pixels (not whitened). `fit` once before training; until then the loss is NaN.
    """

    is_picture = True
    mean: torch.Tensor
    basis: torch.Tensor

    def __init__(self, spec: BackboneSpec, num: int):
        values = patch_values(spec)
        if num > values:
            raise UserError(f"num_pca {num} of a patch of {values} values", expected=f"at most {values}")
        super().__init__(spec, num)
        self.register_buffer("mean", torch.full((values,), math.nan))
        self.register_buffer("basis", torch.full((num, values), math.nan))

    def fit(self, patches: torch.Tensor) -> None:
        """patches (n, p p C) as `MAE.patchify` gives them, sampled from the training images as the model sees them."""
        for own, fitted in zip((self.mean, self.basis), fit_pca(patches, self.dim), strict=True):
            own.copy_(fitted)

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """(N, M, num)"""
        pixels = channel_last(gather_tokens(patches, ids), self.spec.in_chans).float()
        with torch.autocast(imgs.device.type, enabled=False):
            return (pixels - self.mean) @ self.basis.T

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """The patches that have these coefficients and are average in every other direction."""
        return pred @ self.basis + self.mean


class HOG(Target):
    """Histograms of oriented gradients, as MaskFeat predicts them (arXiv 2112.09133, section 3.2); dim cells x C x 9.

    Sobel gradients of each channel, their lengths summed in 9 bins of unsigned orientation over cells of 8 x 8 pixels (or the
    largest cell under that which divides the patch), each histogram divided by its L2 norm; no weighting inside a cell.
    """

    bins = 9
    cell = 8

    def __init__(self, spec: BackboneSpec):
        p, q = (max(side for side in range(1, self.cell + 1) if size % side == 0) for size in spec.patch_size)
        self.cell_size = (p, q)
        super().__init__(spec, patch_values(spec) // (p * q) * self.bins)

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """(N, M, dim): a cell after the other, in it a channel after the other, in it the bins."""
        return gather_tokens(self.histograms(imgs.float()), ids)

    @torch.no_grad()
    def histograms(self, imgs: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, L, dim); gradients see the pixels beside a cell, those at the border their mirror image."""
        down, across = _sobel(imgs)
        bins = (torch.atan2(down, across) * (self.bins / math.pi)).floor() % self.bins
        length = torch.hypot(down, across)
        (h, w), (p, q), (n, c) = self.spec.grid_size, self.cell_size, imgs.shape[:2]
        a, b = self.spec.patch_size[0] // p, self.spec.patch_size[1] // q
        in_cells = [
            ((bins == i) * length).reshape(n, c, h, a, p, w, b, q).sum(dim=(4, 7)) for i in range(self.bins)
        ]
        histograms = F.normalize(torch.stack(in_cells, dim=-1), dim=-1)  # (N, C, h, a, w, b, bins)
        return histograms.permute(0, 2, 4, 3, 5, 1, 6).reshape(n, h * w, self.dim)


class Tokens(Target):
    """The ids (N, L) that a tokenizer gives the patches, told apart by cross-entropy as in BEiT (Table 1d: dVAE; dim ids)."""

    def __init__(self, spec: BackboneSpec, num: int):
        super().__init__(spec, num)

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """(N, M)"""
        if targets is None or targets.shape != patches.shape[:2]:
            given = "none" if targets is None else f"shape {tuple(targets.shape)}"
            raise UserError(
                f"the target 'tokens' with targets of {given}", expected=f"ids {tuple(patches.shape[:2])}"
            )
        return targets.gather(1, ids)

    def loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of pred (N, M, ids)."""
        return F.cross_entropy(pred.flatten(0, 1), target.flatten())


def patch_values(spec: BackboneSpec) -> int:
    """p p C"""
    return spec.patch_size[0] * spec.patch_size[1] * spec.in_chans


def channel_last(patches: torch.Tensor, in_chans: int) -> torch.Tensor:
    """(N, M, C p p) -> (N, M, p p C)"""
    n, m, _ = patches.shape
    return patches.reshape(n, m, in_chans, -1).transpose(2, 3).reshape(n, m, -1)


@torch.no_grad()
def fit_pca(patches: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """patches (n, dim) -> mean (dim,) and the `num` directions of largest variance (num, dim), computed in float64.

    Of each direction and its opposite the one is taken whose largest component is positive.
    """
    if len(patches) <= num:
        raise UserError(
            f"{len(patches)} patches for {num} PCA coefficients", expected="more patches than coefficients"
        )
    values = patches.double()
    mean = values.mean(dim=0)
    basis = torch.linalg.eigh((values - mean).T @ (values - mean)).eigenvectors.T.flip(0)[:num]
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    return mean.float(), (basis * largest.sign()).float()


def _sobel(imgs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, H, W) -> derivative down and across, of the same shape."""
    x = F.pad(imgs, (1, 1, 1, 1), mode="reflect")
    down, across = x[..., 2:, :] - x[..., :-2, :], x[..., 2:] - x[..., :-2]
    return (
        down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:],
        across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :],
    )


def build_target(
    name: TargetName, spec: BackboneSpec, *, norm_pix_loss: bool, num_pca: int, num_tokens: int
) -> Target:
    """The target of that name; norm_pix_loss is for pixels, num_pca and num_tokens for theirs."""
    if name == "pixels":
        return Pixels(spec, norm_pix_loss)
    if name == "pca":
        return PCA(spec, num_pca)
    if name == "hog":
        return HOG(spec)
    if name == "tokens":
        return Tokens(spec, num_tokens)
    raise UserError(f"target {name!r}", expected="pixels, pca, hog or tokens")
