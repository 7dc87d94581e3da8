"""The mmsegmentation backbone, built through mmsegmentation's own registry from a stock-like config."""

import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

from mmengine.registry import init_default_scope
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS

from backbones.adapters.mmseg import MAEBenchViT, build_neck, build_preprocessor
from mae_bench.errors import NotInstalled, UserError
from mae_bench.export import write_export
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec
from tests.backbones.adapters.conftest import DECAY, UNUSED, rate
from tests.parity import assert_within_rounding

pytestmark = pytest.mark.framework


def spec_of(patch: int = 8, **changes) -> BackboneSpec:
    sizes = {"img_size": (4 * patch, 4 * patch), "patch_size": (patch, patch)}
    fields = {
        "in_chans": 3,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 0.25, 0.125),
    }
    return BackboneSpec(arch="vit", pos_embed="sincos", **{**sizes, **fields, **changes})


@pytest.fixture
def source(tmp_path):
    def export(spec: BackboneSpec) -> str:
        torch.manual_seed(0)
        write_export(tmp_path / "export", build_vit(spec).state_dict(), spec, {})
        return str(tmp_path / "export")

    return export


def segmentor(source: str, spec: BackboneSpec, **backbone) -> nn.Module:
    """A stock EncoderDecoder config in which the backbone alone is ours."""
    init_default_scope("mmseg")  # as a stock config says
    norm = {"type": "BN", "requires_grad": True}
    return MODELS.build(
        {
            "type": "EncoderDecoder",
            "data_preprocessor": build_preprocessor(spec, 32),
            "neck": build_neck(spec, norm),
            "backbone": {"type": "MAEBenchViT", "source": source, **backbone},
            "decode_head": {
                "type": "UPerHead",
                "in_channels": [spec.embed_dim] * 4,
                "in_index": [0, 1, 2, 3],
                "pool_scales": (1, 2),
                "channels": 8,
                "num_classes": 3,
                "norm_cfg": norm,
                "loss_decode": {"type": "CrossEntropyLoss"},
            },
            "test_cfg": {"mode": "whole"},
        }
    )


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("size", [(4, 4), (8, 4), (5, 7)])
def test_maps_have_the_grid_of_the_image(source, patch, size):
    backbone = MODELS.build(
        {"type": "MAEBenchViT", "source": source(spec_of(patch)), "out_indices": (0, 1, 3)}
    )
    maps = backbone(torch.randn(2, 3, size[0] * patch, size[1] * patch))
    assert [tuple(m.shape) for m in maps] == [(2, 16, *size)] * 3


@pytest.mark.parametrize("patch", [8, 16])
def test_neck_gives_strides_4_to_32(source, patch):
    spec = spec_of(patch)
    model: Any = segmentor(source(spec), spec).eval()
    pyramid = model.extract_feat(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in pyramid] == [
        (64 // stride, 96 // stride) for stride in (4, 8, 16, 32)
    ]


def test_initialisation_leaves_the_loaded_weights_alone(source):
    spec = spec_of()
    model: Any = segmentor(source(spec), spec)
    loaded = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, loaded[name]) for name, value in model.backbone.state_dict().items())


def test_preprocessor_normalises_rgb_by_the_spec_and_pads(source):
    spec = spec_of()
    processor = MODELS.build(build_preprocessor(spec, 32))
    bgr = torch.tensor([30, 20, 10], dtype=torch.uint8).view(3, 1, 1).expand(3, 30, 27)
    sample = MODELS.build(build_preprocessor(spec, 32))(
        {"inputs": [bgr], "data_samples": []}, training=False
    )["inputs"]
    assert tuple(sample.shape) == (1, 3, 32, 32)  # multiples of the patch
    expected = [
        (value / 255 - mean) / std for value, mean, std in zip((10, 20, 30), spec.mean, spec.std, strict=True)
    ]
    assert_within_rounding(sample[0, :, 0, 0], torch.tensor(expected), roundings=8)
    assert sample[0, :, 31, 31].tolist() == [0, 0, 0]
    assert processor.size == (32, 32)


def test_layer_decay_groups(source):
    spec = spec_of()
    model = segmentor(source(spec), spec)
    wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {
            "type": "MAEBenchLayerDecay",
            "paramwise_cfg": {"layer_decay": 0.5},
            "optim_wrapper_cfg": {"optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05}},
        }
    )(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (g["lr"], g["weight_decay"])
        for g in wrapper.optimizer.param_groups
        for p in g["params"]
    }
    vit = "backbone.features.vit."
    assert set(found) == set(names.values())
    assert found[f"{vit}patch_embed.proj.weight"] == (pytest.approx(0.1 * 0.5**5), 0.05)
    assert found[f"{vit}pos_embed"] == found[f"{vit}cls_token"] == (pytest.approx(0.1 * 0.5**5), 0)
    assert found[f"{vit}blocks.0.attn.qkv.weight"] == (pytest.approx(0.1 * 0.5**4), 0.05)
    assert found[f"{vit}blocks.3.mlp.fc1.weight"] == (pytest.approx(0.1 * 0.5), 0.05)
    assert found[f"{vit}blocks.3.mlp.fc1.bias"] == (pytest.approx(0.1 * 0.5), 0)
    assert found[f"{vit}norm.weight"] == (0.1, 0)
    assert found["decode_head.conv_seg.weight"] == found["neck.upsample_2x.0.weight"] == (0.1, 0.05)
    assert found["decode_head.conv_seg.bias"] == (0.1, 0)


def test_every_kind_of_vit_gives_maps_gradients_and_layers(exported):
    source, spec = exported
    model: Any = segmentor(str(source), spec, out_indices=(spec.depth - 1, 0, spec.depth - 1, 0))
    patch = spec.patch_size[0]
    imgs = torch.randn(2, 3, 4 * patch, 6 * patch)
    maps = model.backbone(imgs)
    assert [tuple(m.shape) for m in maps] == [(2, spec.embed_dim, 4, 6)] * 4
    scales = (4, 2, 1, 0.5) if patch > 8 else (2, 1, 0.5, 0.25)
    assert [tuple(m.shape[2:]) for m in model.extract_feat(imgs)] == [
        (int(4 * s), int(6 * s)) for s in scales
    ]
    assert torch.equal(maps[0], maps[2])
    assert not torch.equal(maps[0], maps[1])
    maps[0].square().sum().backward()
    wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {
            "type": "MAEBenchLayerDecay",
            "paramwise_cfg": {"layer_decay": DECAY},
            "optim_wrapper_cfg": {"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05}},
        }
    )(model)
    lrs = {
        id(parameter): group["lr"]
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.backbone.features.vit.named_parameters():
        assert name.startswith(UNUSED) or (parameter.grad is not None and parameter.grad.any()), name
        assert lrs[id(parameter)] == rate(name, spec.depth), name


def test_bfloat16_wrapper_computes_in_bfloat16_and_keeps_float32_weights():
    model = nn.Linear(4, 4)
    wrapper = OPTIM_WRAPPERS.build(
        {"type": "BFloat16OptimWrapper", "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    )
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.ones(1, 4))
    wrapper.update_params(out.float().sum())
    assert out.dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)


def test_patches_that_are_not_square_are_refused():
    with pytest.raises(UserError, match="square patches"):
        build_neck(spec_of(img_size=(16, 16), patch_size=(8, 4)), {"type": "BN"})


def test_missing_mmseg_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmseg", None)
    monkeypatch.delitem(sys.modules, "backbones.adapters.mmseg")
    with pytest.raises(NotInstalled, match="make setup") as error:
        import_module("backbones.adapters.mmseg")
    assert 'pip install "mae_bench[ade20k]"' in str(error.value)
    assert MAEBenchViT is MODELS.get("MAEBenchViT")
