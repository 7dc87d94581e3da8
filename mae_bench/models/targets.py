"""Prediction targets of the decoder (Table 1d of arXiv 2111.06377): pixels, PCA, HOG, discrete tokens.

Legend: N batch, L patches, M scored patches, C channels, H W image, h w grid of patches, p patch side,
dim predicted values per patch.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mae_bench.errors import UserError
from mae_bench.models.masking import gather_tokens
from mae_bench.models.options import MAEOptions
from mae_bench.spec import BackboneSpec

NORM_EPS = 1e-6  # added to the variance of a patch (facebookresearch/mae models_mae.py)


class Target(nn.Module):
    """One kind of target.

    dim: number of values that the decoder predicts per patch.
    is_picture: whether predictions can be shown as an image.
    """

    is_picture = False

    def __init__(self, spec: BackboneSpec, dim: int):
        super().__init__()
        self.spec, self.dim = spec, dim

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the targets of the patches ids (N, M).

        imgs: (N, C, H, W); patches: the same pixels as (N, L, C p p); targets: ids (N, L) of a tokenizer,
            or None.
        """
        raise NotImplementedError

    def loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """pred (N, M, dim), target as returned by `forward` -> (): the mean squared error by default."""
        return F.mse_loss(pred, target)

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """pred (N, L, dim), patches (N, L, p p C) of the image -> pixels (N, L, p p C).

        Raise UserError if the target is not a picture.
        """
        raise UserError(
            f"a model that predicts {type(self).__name__} has no picture to draw",
            expected="a model that predicts pixels or PCA coefficients",
        )


class Pixels(Target):
    """Pixels, optionally normalised by the mean and unbiased variance of the patch (section 3); dim p p C."""

    is_picture = True

    def __init__(self, spec: BackboneSpec, norm: bool):
        super().__init__(spec, patch_values(spec))
        self.norm = norm

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """Return (N, M, p p C)."""
        target = channel_last(gather_tokens(patches, ids), self.spec.in_chans).float()
        if self.norm:
            mean = target.mean(dim=-1, keepdim=True)
            var = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + NORM_EPS).sqrt()
        return target

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation with the mean and deviation of the true patch, which the model never saw."""
        if not self.norm:
            return pred
        mean = patches.mean(dim=-1, keepdim=True)
        var = patches.var(dim=-1, keepdim=True)
        return pred * (var + NORM_EPS).sqrt() + mean


class PCA(Target):
    """The largest PCA coefficients of a patch's pixels; dim num.

    Section 4 ("Reconstruction target") uses 96. The paper only states that PCA is done in the space of
    patches. Here: patches of all channels together, with their mean subtracted, and coefficients in the
    scale of pixels (not whitened). Call `fit` once before training; until then the loss is NaN.
    """

    is_picture = True
    mean: torch.Tensor
    basis: torch.Tensor

    def __init__(self, spec: BackboneSpec, num: int):
        values = patch_values(spec)
        if num > values:
            raise UserError(f"num_pca {num} for patches of {values} values", expected=f"at most {values}")
        super().__init__(spec, num)
        self.register_buffer("mean", torch.full((values,), math.nan))
        self.register_buffer("basis", torch.full((num, values), math.nan))

    def fit(self, patches: torch.Tensor) -> None:
        """Fit the basis to patches (n, p p C) of normalised training images, from `MAE.patchify`."""
        mean, basis = fit_pca(patches, self.dim)
        self.mean.copy_(mean)
        self.basis.copy_(basis)

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """Return coefficients (N, M, num), in full precision under autocast too."""
        pixels = channel_last(gather_tokens(patches, ids), self.spec.in_chans).float()
        with torch.autocast(imgs.device.type, enabled=False):
            return (pixels - self.mean) @ self.basis.T

    def to_pixels(self, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return the patches with these coefficients and the mean in all other directions."""
        return pred @ self.basis + self.mean


class HOG(Target):
    """Histograms of oriented gradients as in MaskFeat (arXiv 2112.09133, section 3.2); dim cells x C x 9.

    Sobel gradients per channel; their lengths are summed in 9 bins of unsigned orientation over cells of 8
    x 8 pixels (or the largest smaller cell that divides the patch); each histogram is divided by its L2
    norm. Pixels are not weighted within a cell.
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
        """Return (N, M, dim), ordered by cell, then channel, then bin."""
        return gather_tokens(self.histograms(imgs.float()), ids)

    @torch.no_grad()
    def histograms(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, L, dim). Gradients cross cell borders; image borders are reflected."""
        # Gradient of each pixel: orientation bin and length, both (N, C, H, W)
        down, across = _sobel(imgs)
        bins = (torch.atan2(down, across) * (self.bins / math.pi)).floor() % self.bins
        length = torch.hypot(down, across)
        # Sum the lengths per bin within each cell: (N, C, h, a, w, b), for a x b cells per patch
        (h, w), (p, q), (n, c) = self.spec.grid_size, self.cell_size, imgs.shape[:2]
        a, b = self.spec.patch_size[0] // p, self.spec.patch_size[1] // q
        in_cells = [
            ((bins == i) * length).reshape(n, c, h, a, p, w, b, q).sum(dim=(4, 7)) for i in range(self.bins)
        ]
        # Normalise each histogram and group by patch
        histograms = F.normalize(torch.stack(in_cells, dim=-1), dim=-1)  # (N, C, h, a, w, b, bins)
        return histograms.permute(0, 2, 4, 3, 5, 1, 6).reshape(n, h * w, self.dim)


class Tokens(Target):
    """Token ids of a tokenizer, classified by cross-entropy as in BEiT; dim number of ids."""

    def __init__(self, spec: BackboneSpec, num: int):
        super().__init__(spec, num)

    def forward(
        self, imgs: torch.Tensor, patches: torch.Tensor, targets: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the token ids (N, M)."""
        if targets is None or targets.shape != patches.shape[:2]:
            given = "no targets" if targets is None else f"targets of shape {tuple(targets.shape)}"
            raise UserError(
                f"the target 'tokens' got {given}", expected=f"token ids of shape {tuple(patches.shape[:2])}"
            )
        return targets.gather(1, ids)

    def loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """pred (N, M, dim), target (N, M) -> (): cross-entropy."""
        return F.cross_entropy(pred.flatten(0, 1), target.flatten())


def patch_values(spec: BackboneSpec) -> int:
    """Return the number of values per patch, p p C."""
    return spec.patch_size[0] * spec.patch_size[1] * spec.in_chans


def channel_last(patches: torch.Tensor, in_chans: int) -> torch.Tensor:
    """(N, M, C p p) -> (N, M, p p C)."""
    n, m, _ = patches.shape
    return patches.reshape(n, m, in_chans, -1).transpose(2, 3).reshape(n, m, -1)


@torch.no_grad()
def fit_pca(patches: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """patches (n, p p C) -> mean (p p C,) and the `num` directions of largest variance (num, p p C).

    Computed in float64. The sign of each direction is chosen so that its largest component is positive.
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
    """imgs (N, C, H, W) -> derivatives down and across, each (N, C, H, W)."""
    x = F.pad(imgs, (1, 1, 1, 1), mode="reflect")
    down, across = x[..., 2:, :] - x[..., :-2, :], x[..., 2:] - x[..., :-2]
    return (
        down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:],
        across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :],
    )


def build_target(spec: BackboneSpec, options: MAEOptions) -> Target:
    """Build the target that `options.target` names; raise UserError for an unknown name."""
    if options.target == "pixels":
        return Pixels(spec, options.norm_pix_loss)
    if options.target == "pca":
        return PCA(spec, options.num_pca)
    if options.target == "hog":
        return HOG(spec)
    if options.target == "tokens":
        return Tokens(spec, options.num_tokens)
    raise UserError(f"target {options.target!r}", expected="pixels, pca, hog or tokens")
