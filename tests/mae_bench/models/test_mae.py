"""The MAE against an independent implementation of the paper's equations, and its invariances."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mae_bench.errors import UserError
from mae_bench.models.mae import MAE
from mae_bench.models.masking import build_masking
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.spec import BackboneSpec

SPEC = BackboneSpec("vit", (32, 48), (8, 8), 3, embed_dim=32, depth=2, num_heads=2, pos_embed="sincos")


def make(norm_pix_loss: bool = True, spec: BackboneSpec = SPEC) -> MAE:
    torch.manual_seed(0)
    model = MAE(spec, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, norm_pix_loss=norm_pix_loss)
    for parameter in model.parameters():  # zeros and ones hide mistakes
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(spec: BackboneSpec = SPEC, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, spec.in_chans, *spec.img_size, generator=generator), torch.rand(
        n, spec.num_patches, generator=generator
    )


def reference(model: MAE, imgs: torch.Tensor, noise: torch.Tensor, mask_ratio: float) -> tuple[float, np.ndarray, np.ndarray]:
    """MAE in numpy, step by step as the paper's section 3 describes it: every patch embedded, unshuffled, decoded and
    predicted."""
    w = {name.removeprefix("encoder."): tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    p, c, eps = SPEC.patch_size[0], SPEC.in_chans, SPEC.norm_eps

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def block(x: np.ndarray, name: str, heads: int) -> np.ndarray:
        n, t, d = x.shape
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").reshape(n, t, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].transpose(0, 1, 3, 2) / math.sqrt(d // heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ qkv[2]
        x = x + linear(y.transpose(0, 2, 1, 3).reshape(n, t, d), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        return x + linear(gelu, f"{name}.mlp.fc2")

    x = imgs.double().numpy()
    n, _, height, width = x.shape
    patches = x.reshape(n, c, height // p, p, width // p, p).transpose(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)
    filters = w["patch_embed.proj.weight"].transpose(0, 2, 3, 1).reshape(SPEC.embed_dim, -1)
    tokens = patches @ filters.T + w["patch_embed.proj.bias"] + w["pos_embed"][:, 1:]
    order = noise.numpy().argsort(axis=1)
    keep = int(tokens.shape[1] * (1 - mask_ratio))
    mask = np.ones(noise.shape)
    np.put_along_axis(mask, order[:, :keep], 0, axis=1)

    visible = np.take_along_axis(tokens, order[:, :keep, None], axis=1)
    latent = np.concatenate([np.repeat(w["cls_token"] + w["pos_embed"][:, :1], n, axis=0), visible], axis=1)
    for i in range(SPEC.depth):
        latent = block(latent, f"blocks.{i}", SPEC.num_heads)
    latent = linear(norm(latent, "norm"), "decoder_embed")

    full = np.repeat(np.repeat(w["mask_token"], n, axis=0), tokens.shape[1], axis=1).copy()
    np.put_along_axis(full, np.repeat(order[:, :keep, None], full.shape[-1], axis=2), latent[:, 1:], axis=1)
    decoded = np.concatenate([latent[:, :1], full], axis=1) + w["decoder_pos_embed"]
    for i in range(2):
        decoded = block(decoded, f"decoder_blocks.{i}", 2)
    pred = linear(norm(decoded, "decoder_norm"), "decoder_pred")[:, 1:]

    target = patches
    if model.norm_pix_loss:
        target = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    loss = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    return float(loss), pred, mask


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.5, 0.9])
def test_equals_the_equations(norm_pix_loss: bool, mask_ratio: float) -> None:
    model = make(norm_pix_loss).eval()
    imgs, noise = inputs()
    loss, pred, mask = model(imgs, mask_ratio, noise)
    want_loss, want_pred, want_mask = reference(model, imgs, noise, mask_ratio)
    assert loss.item() == pytest.approx(want_loss, rel=1e-5)
    np.testing.assert_allclose(pred.detach().numpy(), want_pred, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(mask.numpy(), want_mask)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_training_path_has_the_same_loss_and_gradients(norm_pix_loss: bool) -> None:
    model = make(norm_pix_loss)
    imgs, noise = inputs()
    gradients = []
    for mode in (True, False):
        model.train(mode).zero_grad()
        loss = model(imgs, 0.75, noise)[0]
        loss.backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_prediction_of_visible_patches_does_not_touch_the_loss() -> None:
    model = make().train()
    imgs, noise = inputs()
    masking = build_masking(noise, 0.75)
    changed = model.patchify(imgs).clone()
    loss = model(imgs, 0.75, noise)[0]
    removed = masking.ids_masked[0, 0]
    changed[0, removed] += torch.randn(changed.shape[-1])
    assert model(model.unpatchify(changed), 0.75, noise)[0] != loss, "a removed patch is a target"
    assert model.train()(imgs, 0.75, noise)[1].shape[1] == masking.ids_masked.shape[1]


def test_patchify_is_channel_last_row_by_row_and_invertible() -> None:
    model = make()
    imgs = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).reshape(2, 3, 32, 48)
    patches = model.patchify(imgs)
    assert patches.shape == (2, 24, 192)
    torch.testing.assert_close(patches[0, 0, :3], imgs[0, :, 0, 0])
    torch.testing.assert_close(patches[0, 1, :3], imgs[0, :, 0, 8])
    torch.testing.assert_close(model.unpatchify(patches), imgs)


def test_position_table_encodes_width_first_then_height() -> None:
    table = sincos_2d(8, (2, 3), num_prefix_tokens=1)
    assert table.shape == (1, 7, 8)
    assert table.dtype == torch.float32
    assert not table[0, 0].any()
    row, column = 1, 2
    want = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)]
    want += [math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
    np.testing.assert_allclose(table[0, 1 + row * 3 + column], want, rtol=1e-6)


def test_masking_keeps_the_smallest_noise_and_truncates() -> None:
    masking = build_masking(torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, 0.0]]), 0.75)
    assert masking.ids_keep.tolist() == [[9, 1]], "int(10 x 0.25) = 2"
    assert masking.mask.tolist() == [[1, 0, 1, 1, 1, 1, 1, 1, 1, 0]]
    assert masking.ids_shuffle.gather(1, masking.ids_restore).tolist() == [list(range(10))]


@pytest.mark.parametrize("mask_ratio", [0.0, 0.99])
def test_ratio_without_visible_or_removed_patches_is_refused(mask_ratio: float) -> None:
    with pytest.raises(UserError, match="keeps"):
        build_masking(torch.rand(1, 16), mask_ratio)


def test_other_channel_counts_and_frozen_tables() -> None:
    spec = replace(SPEC, in_chans=5, mean=(0.5,) * 5, std=(0.2,) * 5)
    model = make(spec=spec)
    imgs, noise = inputs(spec)
    assert model(imgs, 0.75, noise)[1].shape[-1] == 8 * 8 * 5
    assert not model.encoder.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad
