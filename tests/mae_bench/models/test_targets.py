"""Targets: PCA, HOG and tokens against independent implementations, and errors for bad input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mae_bench.errors import UserError
from mae_bench.models.mae import MAE
from mae_bench.models.options import MAEOptions
from mae_bench.models.targets import HOG, fit_pca
from mae_bench.spec import BackboneSpec
from tests.parity import MEAN, assert_parity, assert_within_rounding

SPEC = BackboneSpec("vit", (32, 48), (16, 8), 3, embed_dim=16, depth=1, num_heads=2, pos_embed="sincos")


def make(**options):
    torch.manual_seed(0)
    return MAE(SPEC, MAEOptions(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, **options))


def images(n=3):
    return torch.randn(n, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def noise(n=3):
    return torch.rand(n, SPEC.num_patches, generator=torch.Generator().manual_seed(2))


def test_pca_is_the_singular_vectors_in_order_with_one_sign():
    patches = torch.randn(400, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + 5
    patches = patches.double()
    mean, basis = fit_pca(patches, 4)
    _, _, directions = np.linalg.svd(patches.numpy() - patches.numpy().mean(0))
    # computed in float64, rounded once to float32
    signs = np.sign((basis.numpy() * directions[:4]).sum(1, keepdims=True))
    assert_within_rounding(basis, signs * directions[:4], roundings=2)
    assert_within_rounding(mean, patches.mean(0), roundings=2)
    assert all(row[row.abs().argmax()] > 0 for row in basis)
    variance = ((patches - mean) @ basis.double().T).var(0)
    assert torch.equal(variance, variance.sort(descending=True).values), "the largest coefficients"
    assert_within_rounding(fit_pca(patches.flip(0), 4)[1], basis, roundings=2)


def test_pca_target_is_the_projection_and_goes_back_to_pixels():
    imgs = images(30)
    values = 16 * 8 * 3
    model = make(target="pca", num_pca=5)
    assert model.decoder_pred.out_features == 5
    assert model(imgs, 0.5)[0].isnan(), "not fitted"
    patches = model.patchify(images(80)).flatten(0, 1)
    model.target.fit(patches)
    model.eval()
    loss, pred, mask = model(imgs, 0.5)
    want = (model.patchify(imgs) - model.target.mean) @ model.target.basis.T
    expected = (((pred - want) ** 2).mean(-1) * mask).sum() / mask.sum()
    assert_within_rounding(loss, expected, roundings=MEAN)
    whole = make(target="pca", num_pca=values)
    whole.target.fit(patches)
    coefficients = (model.patchify(imgs) - whole.target.mean) @ whole.target.basis.T
    found = whole.target.to_pixels(coefficients, patches)
    assert_within_rounding(found, model.patchify(imgs), roundings=2 * values)  # two products with the basis
    assert model.can_reconstruct


def test_pca_needs_patches_and_fits_a_patch():
    with pytest.raises(UserError, match="more patches"):
        fit_pca(torch.randn(8, 20), 8)
    with pytest.raises(UserError, match="num_pca 400"):
        make(target="pca", num_pca=400)


def hog_by_loops(img, cell, patch):
    """MaskFeat's descriptor of one image (C, H, W), pixel by pixel -> (L, dim)."""
    c, height, width = img.shape
    x = np.pad(img.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    histogram = np.zeros((height // cell[0], width // cell[1], c, 9))
    for k in range(c):
        for i in range(height):
            for j in range(width):
                window = x[k, i : i + 3, j : j + 3]
                gx = (window[:, 2] - window[:, 0]) @ [1, 2, 1]
                gy = (window[2] - window[0]) @ [1, 2, 1]
                angle = math.degrees(math.atan2(gy, gx)) % 180
                histogram[i // cell[0], j // cell[1], k, int(angle // 20) % 9] += math.hypot(gx, gy)
    histogram /= np.maximum(np.linalg.norm(histogram, axis=-1, keepdims=True), 1e-12)
    a, b = patch[0] // cell[0], patch[1] // cell[1]
    blocks = histogram.reshape(height // patch[0], a, width // patch[1], b, c, 9).transpose(0, 2, 1, 3, 4, 5)
    return blocks.reshape(-1, a * b * c * 9)


@pytest.mark.parametrize(
    ("img_size", "patch", "cell"),
    [((32, 48), (16, 8), (8, 8)), ((28, 14), (14, 14), (7, 7)), ((8, 12), (4, 4), (4, 4))],
)
def test_hog_equals_loops(img_size, patch, cell):
    spec = BackboneSpec("vit", img_size, patch, 2, 16, 1, 2, mean=(0.5,) * 2, std=(0.5,) * 2)
    target = HOG(spec).double()
    img = torch.randn(1, 2, *img_size, generator=torch.Generator().manual_seed(0)).double()
    assert target.cell_size == cell
    found = target.histograms(img)
    assert found.shape == (1, spec.num_patches, target.dim)
    assert_parity(found[0], hog_by_loops(img[0].numpy(), cell, patch))


def test_hog_sees_edges_and_not_brightness():
    target = HOG(SPEC).double()
    # rises across: the gradient has angle 0, the first bin
    ramp = torch.arange(48.0, dtype=torch.float64).expand(1, 3, 32, 48).clone()
    histograms = target.histograms(ramp).reshape(SPEC.num_patches, -1, 9)
    assert_parity(histograms, F.one_hot(torch.zeros(histograms.shape[:2], dtype=torch.long), 9).double())
    imgs = images().double()
    assert_parity(target.histograms(imgs), target.histograms(imgs * 7 + 3))
    assert not target.histograms(torch.ones(1, 3, 32, 48).double()).any(), "a flat image has none"


def test_tokens_are_told_apart_by_cross_entropy():
    model = make(target="tokens", num_tokens=11).eval()
    ids = torch.randint(11, (3, SPEC.num_patches), generator=torch.Generator().manual_seed(3))
    loss, pred, mask = model(images(), 0.5, noise(), ids)
    assert pred.shape == (3, SPEC.num_patches, 11)
    chosen = pred.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert_within_rounding(loss, -(chosen * mask).sum() / mask.sum(), roundings=MEAN)
    assert_within_rounding(model.train()(images(), 0.5, noise(), ids)[0], loss, roundings=MEAN)
    for wrong in (None, ids[:, :-1]):
        with pytest.raises(UserError, match="tokens"):
            model(images(), 0.5, noise(), wrong)


@pytest.mark.parametrize("target", ["hog", "tokens"])
def test_what_is_no_picture_says_so(target):
    model = make(target=target)
    assert not model.can_reconstruct
    with pytest.raises(UserError, match="no picture"):
        model.target.to_pixels(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("target", ["pixels", "pca", "hog", "tokens"])
@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_every_target_trains_the_loss_that_it_evaluates(target, loss_on):
    model = make(target=target, loss_on=loss_on, num_pca=7, num_tokens=5)
    if target == "pca":
        model.target.fit(model.patchify(images(20)).flatten(0, 1))
    ids = torch.randint(5, (3, SPEC.num_patches)) if target == "tokens" else None
    losses = []
    for scored_only in (True, False):
        loss, pred, _ = model(images(), 0.75, noise(), ids, scored_only=scored_only)
        losses.append(loss)
        num_patches = 9 if scored_only and loss_on == "masked" else SPEC.num_patches
        assert pred.shape[1:] == (num_patches, model.target.dim)
    assert_within_rounding(*losses, roundings=MEAN)
    losses[0].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), (
        "DDP waits for every gradient"
    )


def test_loss_on_all_patches_is_the_mean_over_them():
    model = make(loss_on="all").eval()
    loss, pred, _ = model(images(), 0.75, noise())
    assert_within_rounding(loss, F.mse_loss(pred, model.patchify(images())), roundings=MEAN)
    removed = make(loss_on="masked").eval()(images(), 0.75, noise())[0]
    assert removed != loss


def test_an_unknown_target_is_refused():
    with pytest.raises(UserError, match="colours"):
        make(target="colours")
