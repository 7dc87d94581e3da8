"""create_mae: the reference's names and sizes, timm's ViTs, and errors for impossible names and sizes."""

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch

import mae_bench
from mae_bench.config import build, load_yaml
from mae_bench.errors import UserError
from mae_bench.models.create import ENCODERS, create_mae
from mae_bench.pretrain.config import ModelConfig

# parameters of encoder and of the whole, of facebookresearch/mae (models_mae.py, by arithmetic)
PUBLISHED = {
    "mae_vit_base_patch16": (85_798_656, 111_907_840, 254),
    "mae_vit_large_patch16": (303_301_632, 329_541_888, 398),
    "mae_vit_huge_patch14": (630_764_800, 657_074_508, 494),
}
TINY: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", ["", "_dec512d8b"])
def test_the_references_names_have_its_sizes(name, suffix):
    with torch.device("meta"):
        model = create_mae(name + suffix)
    assert (count(model.encoder), count(model), len(model.state_dict())) == PUBLISHED[name]
    assert model.spec.num_patches == (256 if "huge" in name else 196)
    assert not model.options.norm_pix_loss


def test_the_name_says_the_decoder():
    with torch.device("meta"):
        model = create_mae("mae_vit_tiny_patch16_dec128d2b", norm_pix_loss=True)
        assert create_mae("mae_vit_tiny_patch16_dec128d2b", decoder_depth=3).options.decoder_depth == 3
    assert (model.options.decoder_embed_dim, model.options.decoder_depth) == (128, 2)
    assert model.target.norm


@pytest.mark.parametrize("name", ENCODERS)
def test_configs_of_the_same_name_are_the_same_model(name):
    config = build(ModelConfig, load_yaml(f"models/{name.removeprefix('mae_')}.yaml"), name)
    with torch.device("meta"):
        spec = create_mae(name).spec
    assert config.spec(pretrain_method=spec.pretrain_method, pretrain_data=spec.pretrain_data) == spec


@pytest.mark.parametrize(
    ("name", "like"),
    [("mae_vit_tiny_patch16", "vit_tiny_patch16_224"), ("mae_vit_small_patch16", "vit_small_patch16_224")],
)
def test_the_smaller_sizes_are_timms(name: str, like: str) -> None:
    ours: Any
    theirs: Any
    with torch.device("meta"):
        ours, theirs = create_mae(name).encoder, timm.create_model(like, num_classes=0)
    assert {k: t.shape for k, t in ours.state_dict().items()} == {
        k: t.shape for k, t in theirs.state_dict().items()
    }
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_384",
        "vit_base_patch8_224",
        "vit_large_patch32_224",
        "deit_small_patch16_224",
        "test_vit",
        "timm:vit_small_patch16_224.augreg_in1k",
    ],
)
def test_a_plain_vit_of_timm_is_an_encoder(name: str) -> None:
    theirs: Any
    arch = name.removeprefix("timm:").split(".")[0]
    with torch.device("meta"):
        model, theirs = create_mae(name, **TINY), timm.create_model(arch, num_classes=0)
    assert {k: t.shape for k, t in model.encoder.state_dict().items()} == {
        k: t.shape for k, t in theirs.state_dict().items()
    }
    assert model.spec.img_size == theirs.patch_embed.img_size
    assert model.spec.norm_eps == theirs.norm.eps


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224",  # no class token
        "vit_small_patch14_reg4_dinov2",  # registers
        "vit_base_patch16_clip_224",  # a norm before the blocks
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch14_dinov2",  # layer scale
        "vit_base_patch16_224_miil",  # no qkv bias
        "vit_small_patch16_18x2_224",  # parallel blocks
        "deit_tiny_distilled_patch16_224",
        "flexivit_small",  # no position for the class token
        "resnet18",
        "beit_base_patch16_224",
    ],
)
def test_another_architecture_is_refused_with_its_reason(name):
    with pytest.raises(UserError, match="is not a ViT that MAE pretrains: it"):
        create_mae(name)


def test_an_unknown_name_brings_the_nearest():
    with pytest.raises(UserError, match="did you mean .*mae_vit_base_patch16"):
        create_mae("mae_vit_bse_patch16")
    with pytest.raises(UserError, match="vit_tiny_patch16_224"):
        create_mae("vit_tny_patch16_224")


def test_sizes_and_channels_are_free():
    model = create_mae(
        "mae_vit_tiny_patch16", img_size=(32, 48), patch_size=(16, 8), in_chans=5, target="hog", **TINY
    )
    assert model.spec.grid_size == (2, 6)
    assert model.spec.mean == (0.5,) * 5
    loss, pred, mask = model.eval()(torch.randn(2, 5, 32, 48))
    assert (pred.shape, mask.shape) == ((2, 12, 2 * 5 * 9), (2, 12))
    assert loss.isfinite()
    assert create_mae("mae_vit_tiny_patch16", img_size=32, **TINY).spec.mean == (0.485, 0.456, 0.406)
    grey = create_mae("mae_vit_tiny_patch16", img_size=32, in_chans=1, mean=(0.1,), std=(0.3,), **TINY)
    assert (grey.spec.mean, grey.spec.std) == ((0.1,), (0.3,))


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": 8},
        {"img_size": (32, 40)},
        {"img_size": 0},
        {"img_size": (1, 2, 3)},
        {"patch_size": -4},
        {"in_chans": 3, "mean": (0.5,)},
        {"decoder_num_heads": 3},
        {"decoder_embed_dim": 30},
    ],
)
def test_sizes_that_cannot_be_are_refused(change):
    with pytest.raises(UserError):
        create_mae("mae_vit_tiny_patch16", **{**TINY, **change})


def test_the_package_offers_it_and_imports_nothing():
    assert mae_bench.create_mae is create_mae
    with pytest.raises(AttributeError, match="no attribute 'create_mea'"):
        mae_bench.create_mea  # noqa: B018
    code = "import mae_bench, sys; assert not {'torch', 'timm', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
