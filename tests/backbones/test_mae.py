"""load_mae: our file, the reference's and transformers' give the same loss, prediction and mask."""

import argparse
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from typer.testing import CliRunner

import mae_bench
from backbones.mae import load_mae
from backbones.translating.infer import MissingHeads
from mae_bench.cli.app import app
from mae_bench.errors import UserError
from mae_bench.export import write_export
from mae_bench.models.mae import MAE
from mae_bench.models.options import MAEOptions
from mae_bench.pretrain.reconstruct import reconstruct, save_mae
from mae_bench.spec import BackboneSpec
from tests.backbones.formats.reference import fill
from tests.backbones.formats.toys_official_mae import decoder_shapes
from tests.parity import MEAN, assert_parity, assert_within_rounding, in_float64, weights_in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")

SPEC = BackboneSpec(
    "vit", (32, 16), (8, 8), 3, 48, 2, 4, mean=(0.4,) * 3, pos_embed="sincos", pretrain_method="mae"
)
SMALL: dict[str, Any] = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}


def randomise(module):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def drawn(spec_size, num_patches, n=2):
    generator = torch.Generator().manual_seed(6)
    return torch.randn(n, 3, *spec_size, generator=generator), torch.rand(n, num_patches, generator=generator)


@pytest.fixture(scope="module")
def theirs():
    config = ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
        norm_pix_loss=True,
        mask_ratio=0.75,
    )
    torch.manual_seed(0)
    return randomise(ViTMAEForPreTraining(config)).eval()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_equals_transformers(tmp_path, theirs, norm_pix_loss, mask_ratio):
    theirs.config.norm_pix_loss, theirs.config.mask_ratio = norm_pix_loss, mask_ratio
    theirs.save_pretrained(tmp_path)
    ours = mae_bench.load_mae(tmp_path)[0]
    assert ours.spec.norm_eps == theirs.config.layer_norm_eps == 1e-12
    assert ours.target.norm is norm_pix_loss
    imgs, noise = drawn((32, 32), 16)
    ours, imgs = in_float64(ours), imgs.double()
    with torch.no_grad():
        loss, pred, mask = ours(imgs, mask_ratio, noise)
        want = in_float64(theirs)(imgs, noise=noise)
        training = ours.train()(imgs, mask_ratio, noise)[0]
    assert_within_rounding(loss, want.loss, roundings=MEAN)
    assert_within_rounding(training, want.loss, roundings=MEAN)
    assert_parity(pred, want.logits)
    assert torch.equal(mask, want.mask.to(mask.dtype))


def test_transformers_older_names_of_the_decoder(tmp_path, theirs):
    """Files that are on the hub say decoder_layers; version 5 writes decoder_encoder.layer."""
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    older = {
        name.replace("decoder_encoder.layer.", "decoder_layers."): tensor for name, tensor in weights.items()
    }
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.json").write_text((tmp_path / "config.json").read_text())
    save_file(older, tmp_path / "older" / "model.safetensors")
    one, other = load_mae(tmp_path)[0].state_dict(), load_mae(tmp_path / "older")[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_in_shards(tmp_path, theirs):
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "in_shards", max_shard_size="100KB")
    assert (tmp_path / "in_shards/model.safetensors.index.json").is_file()
    one, other = load_mae(tmp_path / "one")[0].state_dict(), load_mae(tmp_path / "in_shards")[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_of_transformers_memory(tmp_path, theirs, prefix):
    """Version 5 has other names in memory than in files; without config, heads, eps and loss are unknown."""
    theirs.save_pretrained(tmp_path / "folder")
    torch.save(
        {prefix + name: tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "memory.pth"
    )
    said = {"num_heads": 4, "norm_eps": 1e-12}
    model = load_mae(tmp_path / "memory.pth", norm_pix_loss=True, decoder_num_heads=2, overrides=said)[0]
    folder = load_mae(tmp_path / "folder", norm_pix_loss=True)[0]
    assert (model.spec, model.options) == (folder.spec, folder.options)
    assert model.state_dict().keys() == folder.state_dict().keys()
    assert all(torch.equal(tensor, folder.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_training_state_with_an_average_of_the_weights_asks_for_one(tmp_path, toys):
    average = {f"module.{name}": tensor * 2 for name, tensor in toys["full"].items()}
    torch.save({"model": toys["full"], "model_ema": average, "epoch": 7}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="model_ema"):
        load_mae(tmp_path / "x.pth")[0]
    for weights, factor in (("model", 1), ("model_ema", 2)):
        found = load_mae(tmp_path / "x.pth", weights=weights, decoder_num_heads=16)[0].state_dict()
        for ours, name in (
            ("encoder.blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"),
            ("decoder_norm.bias",) * 2,
        ):
            assert torch.equal(found[ours], toys["full"][name] * factor)


def reference_forward(w, imgs, noise, mask_ratio, heads, decoder_heads, norm_pix_loss):
    """facebookresearch/mae in tensor algebra, in the order of its code."""
    w = weights_in_float64(w)
    n, p = len(imgs), w["patch_embed.proj.weight"].shape[-1]

    def norm(z, name):
        return F.layer_norm(z, z.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def block(x, name, num_heads):
        q, k, v = F.linear(
            norm(x, f"{name}.norm1"), w[f"{name}.attn.qkv.weight"], w[f"{name}.attn.qkv.bias"]
        ).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        y = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + F.linear(
            y.transpose(1, 2).flatten(2), w[f"{name}.attn.proj.weight"], w[f"{name}.attn.proj.bias"]
        )
        y = F.gelu(F.linear(norm(x, f"{name}.norm2"), w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc1.bias"]))
        return x + F.linear(y, w[f"{name}.mlp.fc2.weight"], w[f"{name}.mlp.fc2.bias"])

    x = (
        F.conv2d(imgs, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=p)
        .flatten(2)
        .transpose(1, 2)
    )
    x = x + w["pos_embed"][:, 1:]
    order = noise.argsort(1)
    keep = int(x.shape[1] * (1 - mask_ratio))
    x = torch.stack([x[i, order[i, :keep]] for i in range(n)])
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(n, -1, -1), x], 1)
    for i in range(sum(name.startswith("blocks.") and name.endswith("norm1.weight") for name in w)):
        x = block(x, f"blocks.{i}", heads)
    x = F.linear(norm(x, "norm"), w["decoder_embed.weight"], w["decoder_embed.bias"])
    full = w["mask_token"].expand(n, noise.shape[1], -1).clone()
    for i in range(n):
        full[i, order[i, :keep]] = x[i, 1:]
    x = torch.cat([x[:, :1], full], 1) + w["decoder_pos_embed"]
    for i in range(sum(name.startswith("decoder_blocks.") and name.endswith("norm1.weight") for name in w)):
        x = block(x, f"decoder_blocks.{i}", decoder_heads)
    pred = F.linear(norm(x, "decoder_norm"), w["decoder_pred.weight"], w["decoder_pred.bias"])[:, 1:]
    target = F.unfold(imgs, p, stride=p).transpose(1, 2).unflatten(-1, (3, p * p)).transpose(2, 3).flatten(2)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True, unbiased=True) + 1e-6
        ) ** 0.5
    mask = torch.ones_like(noise)
    for i in range(n):
        mask[i, order[i, :keep]] = 0
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum(), pred, mask


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("file", ["checkpoint-7.pth", "full.pth"])
def test_equals_the_reference(tmp_path, toys, file, norm_pix_loss):
    """A training state has its arguments, a bare file gets the reference's default: raw pixels."""
    content = {"model": toys["full"]}
    if file == "checkpoint-7.pth":
        content |= {"args": argparse.Namespace(norm_pix_loss=norm_pix_loss), "epoch": 7}
    torch.save(content, tmp_path / file)
    given = {} if file == "checkpoint-7.pth" else {"norm_pix_loss": norm_pix_loss}
    with pytest.raises(MissingHeads, match="decoder_num_heads cannot be inferred .* depth 1"):
        load_mae(tmp_path / file, **given)
    model, spec, report = load_mae(tmp_path / file, decoder_num_heads=16, **given)
    assert (spec, spec.num_heads) == (model.spec, 3)
    assert set(report.renamed) == set(toys["full"])
    assert not report.dropped
    assert (model.options.decoder_num_heads, model.options.norm_pix_loss) == (16, norm_pix_loss)
    imgs, noise = drawn((32, 32), 16)
    model, imgs = in_float64(model), imgs.double()
    with torch.no_grad():
        loss, pred, mask = model(imgs, 0.75, noise)
        want_loss, want_pred, want_mask = reference_forward(
            toys["full"], imgs, noise, 0.75, 3, 16, norm_pix_loss
        )
    assert_within_rounding(loss, want_loss, roundings=MEAN)
    assert_parity(pred, want_pred)
    assert torch.equal(mask, want_mask)
    other_heads = load_mae(tmp_path / file, decoder_num_heads=4, **given)[0]
    assert other_heads.options.decoder_num_heads == 4
    assert not torch.equal(in_float64(other_heads)(imgs, 0.75, noise)[1], pred)


def test_a_file_that_is_silent_takes_the_constructors_default(files):
    assert not load_mae(files["full"][0], decoder_num_heads=16)[0].options.norm_pix_loss
    assert load_mae(files["checkpoint-7"][0], decoder_num_heads=16)[0].options.norm_pix_loss, (
        "its saved arguments say so"
    )


def test_reconstruct_prints_what_is_assumed(files, tmp_path):
    """norm_pix_loss decides how predictions become pixels; an option states it."""
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "x.png")
    given = ["reconstruct", str(tmp_path / "x.png"), "--decoder-num-heads", "16"]
    given += ["--checkpoint", str(files["full"][0]), "--out", str(tmp_path / "y.png")]
    done = CliRunner().invoke(app, given)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'y.png'}\n")
    assert f"{files['full'][0]}: norm_pix_loss False: assumed" in done.stderr
    assert "num_heads 3: the only number that official_mae builds" in done.stderr
    plain = (tmp_path / "y.png").read_bytes()
    done = CliRunner().invoke(app, [*given, "--norm-pix-loss"])
    assert done.exit_code == 0
    assert "norm_pix_loss" not in done.stderr
    assert (tmp_path / "y.png").read_bytes() != plain


@pytest.mark.parametrize(
    "options",
    [
        {"norm_pix_loss": True},
        {"target": "pca", "num_pca": 7},
        {"target": "hog", "loss_on": "all"},
        {"target": "tokens", "num_tokens": 13, "mask_sampling": "grid"},
        {"encoder_mask_tokens": True, "mask_sampling": "block", "activation_checkpointing": True},
    ],
)
def test_our_file_gives_the_same_model_back(tmp_path, options):
    torch.manual_seed(0)
    model = randomise(MAE(SPEC, MAEOptions(**SMALL, **options))).eval()
    imgs, noise = drawn(SPEC.img_size, SPEC.num_patches)
    if options.get("target") == "pca":
        model.target.fit(model.patchify(torch.randn(9, 3, 32, 16)).flatten(0, 1))
    ids = torch.randint(13, (2, SPEC.num_patches)) if options.get("target") == "tokens" else None
    save_mae(model, tmp_path)
    for source in (tmp_path, f"run:{tmp_path}", tmp_path / "mae.safetensors"):
        again = load_mae(source)[0]
        assert (again.spec, again.options) == (model.spec, model.options)
        assert again.state_dict().keys() == model.state_dict().keys()
        for one, other in zip(again(imgs, 0.75, noise, ids), model(imgs, 0.75, noise, ids), strict=True):
            assert torch.equal(one, other)
        trained = {name for name, p in again.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_renamed_file_of_ours_is_known_by_its_content(tmp_path):
    save_mae(MAE(SPEC, MAEOptions(**SMALL)), tmp_path)
    (tmp_path / "mae.safetensors").rename(tmp_path / "mine.safetensors")
    assert load_mae(tmp_path / "mine.safetensors")[0].spec == SPEC


def test_another_image_size_resamples_both_tables(tmp_path, toys, theirs):
    torch.save({"model": toys["full"]}, tmp_path / "full.pth")
    theirs.save_pretrained(tmp_path / "hf")
    for source in (tmp_path / "full.pth", tmp_path / "hf"):
        given: dict[str, Any] = {"decoder_num_heads": 16} if source.suffix else {}
        small, large = load_mae(source, **given)[0], load_mae(source, img_size=64, **given)[0]
        for name in ("encoder.pos_embed", "decoder_pos_embed"):
            table, resampled = small.state_dict()[name], large.state_dict()[name]
            assert resampled.shape == (1, 65, table.shape[2])
            assert torch.equal(resampled[:, 0], table[:, 0])
            grid = lambda t, side: t[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # noqa: E731
            want = F.interpolate(grid(table, 4).double(), size=(8, 8), mode="bicubic")
            assert_within_rounding(grid(resampled, 8), want, roundings=16)  # of 16 neighbours
        assert large.spec.img_size == (64, 64)
        assert not large.encoder.pos_embed.requires_grad
        imgs, noise = drawn((64, 64), 64)
        assert large(imgs, 0.75, noise)[1].shape == (2, 64, 192)
        wide = load_mae(source, img_size=(32, 64), **given)[0]
        assert wide.spec.grid_size == (4, 8)
        same = load_mae(source, img_size=32, **given)[0]
        assert torch.equal(same.encoder.pos_embed, small.encoder.pos_embed)
    assert torch.equal(
        load_mae(tmp_path / "full.pth", decoder_num_heads=16)[0].encoder.pos_embed, toys["full"]["pos_embed"]
    )
    with pytest.raises(UserError, match="not divisible"):
        load_mae(tmp_path / "full.pth", img_size=60, decoder_num_heads=16)


def test_a_file_without_a_decoder_says_so(tmp_path, files):
    mae = MAE(SPEC, MAEOptions(**SMALL))
    write_export(tmp_path / "export", mae.encoder.state_dict(), SPEC, {})
    sources = [
        files["encoder"][0],
        files["fine"][0],
        files["timm.safetensors"][0],
        tmp_path / "export",
        tmp_path,
    ]
    for source in sources:
        with pytest.raises(UserError, match="no decoder"):
            load_mae(source)[0]
    with pytest.raises(UserError, match="no such file"):
        load_mae(tmp_path / "nowhere")[0]


def test_damaged_files_are_refused(tmp_path, toys, theirs):
    def refuse(tensors, match):
        torch.save({"model": tensors}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=match):
            load_mae(tmp_path / "x.pth", decoder_num_heads=16)

    full = toys["full"]
    refuse(
        {name: t for name, t in full.items() if name != "decoder_norm.weight"}, "missing: decoder_norm.weight"
    )
    refuse({name: t for name, t in full.items() if name != "decoder_embed.weight"}, "no decoder")
    refuse(full | {"decoder_extra": torch.zeros(2)}, "unexpected: decoder_extra")
    refuse(full | {"decoder_pred.bias": torch.full((192,), math.nan)}, "NaN")
    refuse(full | {"decoder_pred.bias": torch.zeros(3)}, "wrong shape")
    save_mae(MAE(SPEC, MAEOptions(**SMALL)), tmp_path)
    weights = load_file(tmp_path / "mae.safetensors")
    save_file(
        weights,
        tmp_path / "mae.safetensors",
        {"decoder": json.dumps({"colours": 3, "decoder_num_heads": 2}), "spec": json.dumps(SPEC.to_dict())},
    )
    with pytest.raises(UserError, match="description"):
        load_mae(tmp_path)[0]
    save_file(weights, tmp_path / "mae.safetensors", {"decoder": "{", "spec": "{"})
    with pytest.raises(UserError, match="description"):
        load_mae(tmp_path)[0]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_is_drawn_as_the_image(norm_pix_loss, monkeypatch):
    model = MAE(SPEC, MAEOptions(**SMALL, norm_pix_loss=norm_pix_loss))
    pixels = torch.randint(
        0, 256, (2, 3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    def perfect(imgs, mask_ratio, noise):
        ids = torch.arange(SPEC.num_patches).expand(2, -1)
        return None, model.target(imgs, model.split_patches(imgs), None, ids), torch.ones(2, SPEC.num_patches)

    monkeypatch.setattr(model, "forward", perfect)
    original, _, painted = reconstruct(model, pixels, 0.75, torch.rand(2, SPEC.num_patches))
    assert_within_rounding(painted, original, roundings=64)  # standardised and back: about ten operations


def test_what_is_no_picture_is_not_drawn():
    with pytest.raises(UserError, match="no picture"):
        reconstruct(
            MAE(SPEC, MAEOptions(**SMALL, target="hog")),
            torch.zeros(1, 3, 32, 16, dtype=torch.uint8),
            0.75,
            torch.rand(1, 8),
        )


def test_decoder_heads_come_from_the_user_the_file_or_the_references_size(tmp_path, toys):
    """The reference gives 16 heads to a decoder of 512 channels and 8 blocks; MAE-Lite gives 3 and 6."""
    full = fill(decoder_shapes(192, 512, 8, 32, 8)) | toys["encoder"]
    torch.save({"model": full}, tmp_path / "x.pth")
    model, _, report = load_mae(tmp_path / "x.pth")
    assert model.options.decoder_num_heads == 16
    assert any(line.startswith("decoder_num_heads 16: the only number") for line in report.assumptions)
    args = argparse.Namespace(decoder_num_heads=8)
    torch.save({"model": full, "args": args}, tmp_path / "stated.pth")
    assert load_mae(tmp_path / "stated.pth")[0].options.decoder_num_heads == 8
    assert load_mae(tmp_path / "stated.pth", decoder_num_heads=4)[0].options.decoder_num_heads == 4


def test_the_question_for_the_decoders_heads_repeats_what_was_given(files):
    with pytest.raises(MissingHeads) as error:
        load_mae(files["full"][0], overrides={"num_heads": 3})
    assert f"mae-bench inspect {files['full'][0]} num_heads=3 --images FOLDER" in error.value.fix
