"""The MAE against an independent implementation of the paper's equations, and its invariances."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mae_bench.engine.optim import build_param_groups, pretrain_no_decay
from mae_bench.errors import UserError
from mae_bench.models.mae import MAE
from mae_bench.models.masking import build_masking, gather_tokens
from mae_bench.models.options import MAEOptions
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.spec import BackboneSpec
from tests.parity import MEAN, assert_parity, assert_within_rounding

SPEC = BackboneSpec("vit", (32, 48), (8, 8), 3, embed_dim=32, depth=2, num_heads=2, pos_embed="sincos")


def small_decoder(**options: Any) -> MAEOptions:
    return MAEOptions(**{"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2} | options)


def make(norm_pix_loss: bool = True, spec: BackboneSpec = SPEC, **options: Any) -> MAE:
    torch.manual_seed(0)
    model = MAE(spec, small_decoder(norm_pix_loss=norm_pix_loss, **options))
    for parameter in model.parameters():  # zeros and ones hide mistakes
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def inputs(spec: BackboneSpec = SPEC, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    imgs = torch.randn(n, spec.in_chans, *spec.img_size, generator=generator).double()
    return imgs, torch.rand(n, spec.num_patches, generator=generator)


def reference(
    model: MAE, imgs: torch.Tensor, noise: torch.Tensor, mask_ratio: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """MAE in numpy, following section 3 of the paper: embed, unshuffle, decode and predict every patch."""
    w = {
        name.removeprefix("encoder."): tensor.detach().double().numpy()
        for name, tensor in model.state_dict().items()
    }
    p, c, eps = SPEC.patch_size[0], SPEC.in_chans, SPEC.norm_eps

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w[
            f"{name}.weight"
        ] + w[f"{name}.bias"]

    def block(x: np.ndarray, name: str, heads: int) -> np.ndarray:
        n, t, d = x.shape
        qkv = (
            linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            .reshape(n, t, 3, heads, d // heads)
            .transpose(2, 0, 3, 1, 4)
        )
        scores = qkv[0] @ qkv[1].transpose(0, 1, 3, 2) / math.sqrt(d // heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ qkv[2]
        x = x + linear(y.transpose(0, 2, 1, 3).reshape(n, t, d), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        return x + linear(gelu, f"{name}.mlp.fc2")

    x = imgs.double().numpy()
    n, _, height, width = x.shape
    patches = (
        x.reshape(n, c, height // p, p, width // p, p).transpose(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)
    )
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
    if model.options.norm_pix_loss:
        target = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(
            patches.var(-1, ddof=1, keepdims=True) + 1e-6
        )
    loss = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    return float(loss), pred, mask


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.5, 0.9])
def test_equals_the_equations(norm_pix_loss: bool, mask_ratio: float) -> None:
    model = make(norm_pix_loss).eval()
    imgs, noise = inputs()
    loss, pred, mask = model(imgs, mask_ratio, noise)
    want_loss, want_pred, want_mask = reference(model, imgs, noise, mask_ratio)
    assert_within_rounding(loss, want_loss, roundings=MEAN)
    assert_parity(pred, want_pred)
    np.testing.assert_array_equal(mask.numpy(), want_mask)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_path_of_scored_patches_has_the_same_loss_and_gradients(norm_pix_loss: bool) -> None:
    model = make(norm_pix_loss)
    imgs, noise = inputs()
    gradients = []
    for scored_only in (True, False):
        model.zero_grad()
        loss = model(imgs, 0.75, noise, scored_only=scored_only)[0]
        loss.backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            | {"loss": loss.detach()}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_within_rounding(gradient.float(), gradients[1][name], roundings=MEAN, msg=name)  # as the loss


def test_prediction_of_visible_patches_does_not_touch_the_loss() -> None:
    model = make().train()
    imgs, noise = inputs()
    masking = build_masking(noise, 0.75)
    changed = model.patchify(imgs).clone()
    loss = model(imgs, 0.75, noise)[0]
    removed = masking.ids_masked[0, 0]
    changed[0, removed] += torch.randn(changed.shape[-1])
    assert model(model.unpatchify(changed), 0.75, noise)[0] != loss, "a removed patch is a target"
    pred = model(imgs, 0.75, noise)[1]
    scored = model(imgs, 0.75, noise, scored_only=True)[1]
    assert_parity(scored, gather_tokens(pred, masking.ids_masked))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"loss_on": "all"}, {"encoder_mask_tokens": True}])
def test_the_references_methods_make_up_forward(training: bool, options: dict[str, Any]) -> None:
    """Shapes and signatures of facebookresearch/mae models_mae.py, in training and in evaluation mode."""
    model = make(**options).train(training)
    imgs, noise = inputs()
    latent, mask, ids_restore = model.forward_encoder(imgs, 0.75, noise)
    assert latent.shape == (3, 1 + (24 if options.get("encoder_mask_tokens") else 6), SPEC.embed_dim)
    assert mask.shape == ids_restore.shape == (3, 24)
    pred = model.forward_decoder(latent, ids_restore)
    assert pred.shape == (3, 24, 8 * 8 * 3)
    found = (model.forward_loss(imgs, pred, mask), pred, mask)
    for one, other in zip(found, model(imgs, 0.75, noise), strict=True):
        assert_within_rounding(one, other, roundings=MEAN)


def test_forward_loss_of_tokens() -> None:
    model = make(target="tokens", num_tokens=5)
    imgs, noise = inputs()
    ids = torch.randint(5, noise.shape, generator=torch.Generator().manual_seed(3))
    loss, pred, mask = model(imgs, 0.75, noise, ids)
    assert_within_rounding(model.forward_loss(imgs, pred, mask, ids), loss, roundings=MEAN)


def test_random_masking_is_the_references() -> None:
    x = torch.randn(3, 24, 5)
    noise = inputs()[1]
    x_masked, mask, ids_restore = make().random_masking(x, 0.75, noise)
    ids_shuffle = noise.argsort(dim=1)
    assert torch.equal(x_masked, gather_tokens(x, ids_shuffle[:, :6]))
    assert torch.equal(ids_restore, ids_shuffle.argsort(dim=1))
    assert torch.equal(mask, (ids_restore >= 6).float())
    drawn = make().random_masking(x, 0.5)
    assert drawn[0].shape == (3, 12, 5)
    assert drawn[1].sum(dim=1).tolist() == [12] * 3


def test_patchify_is_channel_last_row_by_row_and_invertible() -> None:
    model = make()
    imgs = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).reshape(2, 3, 32, 48)
    patches = model.patchify(imgs)
    assert patches.shape == (2, 24, 192)
    assert torch.equal(patches[0, 0, :3], imgs[0, :, 0, 0])
    assert torch.equal(patches[0, 1, :3], imgs[0, :, 0, 8])
    assert torch.equal(model.unpatchify(patches), imgs)


def test_position_table_encodes_width_first_then_height() -> None:
    table = sincos_2d(8, (2, 3), num_prefix_tokens=1)
    assert table.shape == (1, 7, 8)
    assert table.dtype == torch.float32
    assert not table[0, 0].any()
    row, column = 1, 2
    want = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)]
    want += [math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
    assert_within_rounding(table[0, 1 + row * 3 + column], np.array(want), roundings=1)


def test_position_table_is_computed_in_double_precision() -> None:
    """Rounded once, at the end: single precision would change hundreds of entries of ViT-L's table."""
    table = sincos_2d(1024, (28, 28), num_prefix_tokens=0)[0].numpy()
    frequency = 10000 ** (-np.arange(256, dtype=np.float64) / 256)
    down, across = np.divmod(np.arange(784, dtype=np.float64), 28)
    want = np.concatenate(
        [wave(place[:, None] * frequency) for place in (across, down) for wave in (np.sin, np.cos)], axis=1
    )
    assert (table != want.astype(np.float32)).mean() < 1e-3


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.75, 49), (0.7, 58), (0.9, 19), (0.6, 78)])
def test_the_kept_count_is_truncated_as_the_references(mask_ratio: float, kept: int) -> None:
    assert build_masking(torch.rand(1, 196), mask_ratio).ids_keep.shape[1] == kept


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


@pytest.mark.parametrize("shape", [(2, 1, 32, 48), (2, 3, 48, 32), (2, 3, 32, 40), (3, 32, 48)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="images of shape"):
        make()(torch.zeros(shape))


def test_pixels_that_are_not_normalised_are_refused() -> None:
    with pytest.raises(UserError, match="normalise"):
        make()(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match="noise of shape"):
        make()(inputs()[0], 0.75, torch.rand(3, 23))


@pytest.mark.parametrize("key", ["decoder_embed_dim", "decoder_depth", "decoder_num_heads"])
def test_a_decoder_of_nothing_is_refused(key: str) -> None:
    sizes: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, key: 0}
    with pytest.raises(UserError, match="at least"):
        MAE(SPEC, MAEOptions(**sizes))


def test_activation_checkpointing_changes_no_bit() -> None:
    imgs, noise = inputs()
    found = []
    for recompute in (False, True):
        model = make(activation_checkpointing=recompute).train()
        loss = model(imgs, 0.75, noise, scored_only=True)[0]
        loss.backward()
        found.append([loss] + [p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_activation_checkpointing_keeps_fewer_activations() -> None:
    """Autograd saves the inputs of the blocks instead of everything computed inside them."""
    imgs, noise = inputs()
    sizes = []
    for recompute in (False, True):
        model = make(activation_checkpointing=recompute).train()
        saved: list[int] = []

        def count(tensor: torch.Tensor, to: list[int] = saved) -> torch.Tensor:
            to.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(imgs, 0.75, noise, scored_only=True)
        sizes.append(sum(saved))
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("encoder_mask_tokens", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_blocks_weights_are_touched_in_its_own_forward_alone(
    encoder_mask_tokens: bool, recompute: bool
) -> None:
    """Sharded weights are only whole between the hooks of a block; here they are NaN outside."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "encoder_mask_tokens": encoder_mask_tokens,
        "activation_checkpointing": recompute,
    }
    model = MAE(SPEC, small_decoder(**options))
    imgs, noise = inputs()
    imgs = imgs.float()
    want = model(imgs, 0.75, noise, scored_only=True)[0]
    for block in [*model.encoder.blocks, *model.decoder_blocks]:
        whole = {name: p.detach().clone() for name, p in block.named_parameters()}

        def gather(block, args, whole=whole):  # type: ignore[no-untyped-def]
            for name, p in block.named_parameters():
                p.data = whole[name]

        def scatter(block, args, out):  # type: ignore[no-untyped-def]
            for p in block.parameters():
                p.data = torch.full_like(p, math.nan)

        block.register_forward_pre_hook(gather)
        block.register_forward_hook(scatter)
        scatter(block, None, None)
    assert torch.equal(model(imgs, 0.75, noise, scored_only=True)[0], want)


@pytest.mark.parametrize(
    "options", [{}, {"encoder_mask_tokens": True}, {"target": "hog"}, {"activation_checkpointing": True}]
)
def test_the_training_step_is_one_graph(options: dict[str, Any]) -> None:
    """Nothing in forward depends on values or waits for the device."""
    torch.manual_seed(0)
    model = MAE(SPEC, small_decoder(**options)).double().train()
    imgs, noise = inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for scored_only in (True, False):
        loss = model(imgs, 0.75, noise, scored_only=scored_only)[0]
        found = compiled(imgs, 0.75, noise, scored_only=scored_only)[0]
        assert_within_rounding(found, loss, roundings=MEAN)


def with_mask_tokens_in_the_encoder(model: MAE, imgs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Table 1c in raster order: embed every patch, replace removed ones by the mask token, encode all."""
    vit = model.encoder
    tokens = vit.patch_embed(imgs)
    tokens = torch.where(mask[..., None].bool(), model.mask_token, tokens)
    x = torch.cat([vit.cls_token.expand(len(imgs), -1, -1), tokens], dim=1) + vit.pos_embed
    x = model.decoder_embed(vit.norm(vit.blocks(x))) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    return model.decoder_pred(model.decoder_norm(x))[:, 1:]


def test_mask_tokens_in_the_encoder() -> None:
    torch.manual_seed(0)
    model = MAE(SPEC, small_decoder(encoder_mask_tokens=True))
    torch.nn.init.normal_(model.mask_token)
    model.double()
    imgs, noise = inputs()
    lengths = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    loss, pred, mask = model.eval()(imgs, 0.75, noise)
    assert lengths == [1 + SPEC.num_patches] * SPEC.depth, "the encoder pays for every patch"
    want = with_mask_tokens_in_the_encoder(model, imgs, mask)
    assert_parity(pred, want)
    error = ((want - model.patchify(imgs)) ** 2).mean(-1)
    assert_within_rounding(loss, (error * mask).sum() / mask.sum(), roundings=MEAN)
    training = model.train()(imgs, 0.75, noise, scored_only=True)[0]
    assert_within_rounding(training, loss, roundings=MEAN)
    training.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    removed = mask[0].argmax()
    changed = model.patchify(imgs).clone()
    changed[0, removed] += 1
    assert torch.equal(model.eval()(model.unpatchify(changed), 0.75, noise)[1], pred), (
        "the encoder must not see removed pixels"
    )


def test_initialisation_is_the_references() -> None:
    """Xavier uniform for Linear layers and the patch embedding, zero biases, tokens with deviation 0.02."""
    torch.manual_seed(0)
    spec = replace(SPEC, embed_dim=96, img_size=(16, 16))
    model = MAE(spec, MAEOptions(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2))
    for name, tensor in model.named_parameters():
        if tensor.ndim in (2, 4):
            matrix = tensor.flatten(1)
            bound = math.sqrt(6 / (matrix.shape[0] + matrix.shape[1]))
            assert tensor.abs().max() <= bound, name
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
        elif name.endswith("token"):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.3), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
    assert model.encoder.patch_embed.proj.bias.abs().max() <= 1 / math.sqrt(192), (
        "torch's own, in the reference too"
    )


def test_every_norm_has_the_same_eps() -> None:
    norms = [
        m for m in make(spec=replace(SPEC, norm_eps=1e-3)).modules() if isinstance(m, torch.nn.LayerNorm)
    ]
    assert {norm.eps for norm in norms} == {1e-3}
    assert len(norms) == 2 * (2 + 2) + 2


def test_cls_and_mask_tokens_are_decayed_and_tables_are_not_trained() -> None:
    """The reference's timm only exempts 1-D parameters and biases (add_weight_decay)."""
    model = make()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        g["weight_decay"]: {names[id(p)] for p in g["params"]}
        for g in build_param_groups(model.named_parameters(), 0.05, pretrain_no_decay)
    }
    assert {"encoder.cls_token", "mask_token", "encoder.patch_embed.proj.weight"} <= groups[0.05]
    assert {"encoder.norm.weight", "decoder_pred.bias"} <= groups[0.0]
    assert not any("pos_embed" in name for group in groups.values() for name in group)


def test_the_class_token_is_never_masked_and_has_no_position() -> None:
    model = make().eval()
    imgs, noise = inputs()
    first: dict[str, torch.Tensor] = {}
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: first.setdefault("x", args[0]))
    model(imgs, 0.75, noise)
    assert first["x"].shape[1] == 1 + 6
    expected = model.encoder.cls_token.expand(3, -1, -1)
    assert torch.equal(first["x"][:, :1], expected), "row 0 of the table is zero"
