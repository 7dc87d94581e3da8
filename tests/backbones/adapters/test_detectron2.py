"""The detectron2 backbone: declared against actual maps, a stock config, lr scales, the missing framework."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

detectron2 = pytest.importorskip("detectron2", reason="detectron2 is optional: make setup")

from detectron2.config import LazyCall as L  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, get_vit_lr_decay_rate  # noqa: E402
from detectron2.structures import Boxes, Instances, PolygonMasks  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

from backbones.adapters.detectron2 import (  # noqa: E402
    TopLevelMaxPool,
    ViTBackbone,
    build_lr_scale,
    load_vit_backbone,
)
from backbones.adapters.pyramid import get_pyramid_scales  # noqa: E402
from backbones.translating.report import ConversionReport  # noqa: E402
from mae_bench.errors import NotInstalled, UserError  # noqa: E402
from mae_bench.export import write_export  # noqa: E402
from mae_bench.models.vit import build_vit  # noqa: E402
from mae_bench.spec import BackboneSpec  # noqa: E402
from tests.backbones.adapters.conftest import DECAY, UNUSED, rate  # noqa: E402
from tests.parity import assert_parity  # noqa: E402

pytestmark = pytest.mark.framework


def make_spec(patch: int = 8, depth: int = 2) -> BackboneSpec:
    return BackboneSpec(
        arch="vit",
        img_size=(4 * patch, 4 * patch),
        patch_size=(patch, patch),
        in_chans=3,
        embed_dim=24,
        depth=depth,
        num_heads=2,
    )


def make_backbone(spec: BackboneSpec, out_indices: list[int] | None = None) -> ViTBackbone:
    return ViTBackbone(
        build_vit(spec, dynamic_img_size=True), spec, ConversionReport("", "", ""), out_indices
    )


@pytest.fixture
def export(tmp_path: Path) -> Path:
    spec = make_spec()
    write_export(tmp_path / "export", build_vit(spec).state_dict(), spec, {})
    return tmp_path / "export"


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (7, 5)])
def test_output_shape_is_that_of_the_maps(patch: int, grid: tuple[int, int]) -> None:
    backbone = make_backbone(make_spec(patch, depth=4), out_indices=[1, 3])
    imgs = torch.randn(2, 3, patch * grid[0], patch * grid[1])
    maps, shapes = backbone(imgs), backbone.output_shape()
    assert list(maps) == list(shapes) == ["block1", "block3"]
    for name, shape in shapes.items():
        assert maps[name].shape == (
            2,
            shape.channels,
            imgs.shape[2] // shape.stride,
            imgs.shape[3] // shape.stride,
        )
    assert backbone.size_divisibility == patch == backbone.padding_constraints["size_divisibility"]


def test_every_kind_of_vit_gives_maps_gradients_and_layers(exported: tuple[Path, BackboneSpec]) -> None:
    source, spec = exported
    patch, last = spec.patch_size[0], spec.depth - 1
    backbone = load_vit_backbone(source, out_indices=[0, last])
    maps = backbone(torch.randn(2, 3, 4 * patch, 6 * patch))
    assert {name: tuple(m.shape) for name, m in maps.items()} == dict.fromkeys(
        ["block0", f"block{last}"], (2, spec.embed_dim, 4, 6)
    )
    assert [(s.channels, s.stride) for s in backbone.output_shape().values()] == [(spec.embed_dim, patch)] * 2
    maps[f"block{last}"].square().sum().backward()
    scale = build_lr_scale(spec, DECAY)
    for name, parameter in backbone.named_parameters():
        inside = name.removeprefix("features.vit.")
        assert inside.startswith(UNUSED) or (parameter.grad is not None and parameter.grad.any()), name
        assert scale(f"backbone.net.{name}") == rate(inside, spec.depth), name


def test_the_default_tap_is_the_last_block_before_the_norm() -> None:
    spec = make_spec()
    backbone = make_backbone(spec).double().eval()
    imgs = torch.randn(1, 3, 32, 32).double()
    tokens = backbone.features.vit.forward_features(imgs)[:, spec.num_prefix_tokens :]  # after the final norm
    (last,) = backbone(imgs).values()
    assert_parity(backbone.features.vit.norm(last.flatten(2).mT), tokens)


@pytest.mark.parametrize(
    ("patch", "strides", "scales"),
    [(16, (4, 8, 16, 32), [4, 2, 1, 0.5]), (8, (4, 8, 16), [2, 1, 0.5]), (4, (4,), [1])],
)
def test_pyramid_levels_have_the_strides_asked_for(
    patch: int, strides: tuple[int, ...], scales: list[float]
) -> None:
    spec = make_spec(patch)
    assert get_pyramid_scales(spec, strides) == scales
    top = f"p{strides[-1].bit_length() - 1}"
    pyramid = SimpleFeaturePyramid(
        make_backbone(spec),
        "block1",
        16,
        get_pyramid_scales(spec, strides),
        TopLevelMaxPool(top),
        square_pad=64,
    )
    maps = pyramid(torch.randn(1, 3, 64, 64))
    assert [shape.stride for shape in pyramid.output_shape().values()] == [*strides, 2 * strides[-1]]
    assert {name: 64 // m.shape[-1] for name, m in maps.items()} == {
        name: s.stride for name, s in pyramid.output_shape().items()
    }


def test_strides_and_patches_out_of_reach_are_refused() -> None:
    with pytest.raises(UserError, match=r"pyramid strides \[32\] over a map of stride 8") as error:
        get_pyramid_scales(make_spec(8), (8, 16, 32))
    assert "[2, 4, 8, 16]" in error.value.expected
    spec = BackboneSpec(
        arch="vit", img_size=(32, 32), patch_size=(16, 8), in_chans=3, embed_dim=24, depth=1, num_heads=2
    )
    with pytest.raises(UserError, match="16 x 8"):
        make_backbone(spec)


def test_in_a_stock_vitdet_config(export: Path) -> None:
    """detectron2's own mask_rcnn_vitdet trains and detects with only backbone, tap and sizes changed."""
    stock = (
        Path(detectron2.__file__).parent
        / "model_zoo"
        / "configs"
        / "common"
        / "models"
        / "mask_rcnn_vitdet.py"
    )
    model = LazyConfig.load(str(stock)).model
    model.backbone.update(
        net=L(load_vit_backbone)(source=str(export)),
        in_feature="block1",
        scale_factors=[2.0, 1.0, 0.5],
        square_pad=64,
    )
    model.backbone.top_block = L(TopLevelMaxPool)(in_feature="p4")
    model.proposal_generator.in_features = ["p2", "p3", "p4", "p5"]
    model.proposal_generator.anchor_generator.update(sizes=[[8], [16], [32], [64]], strides=[4, 8, 16, 32])
    model.roi_heads.update(box_in_features=["p2", "p3", "p4"], mask_in_features=["p2", "p3", "p4"])
    model.roi_heads.box_pooler.scales = model.roi_heads.mask_pooler.scales = [1 / 4, 1 / 8, 1 / 16]
    model.proposal_generator.update(pre_nms_topk=[50, 50], post_nms_topk=[20, 20])
    model.roi_heads.batch_size_per_image = 8
    detector = instantiate(model)
    target = Instances(
        (64, 48), gt_boxes=Boxes(torch.tensor([[4.0, 4, 30, 30]])), gt_classes=torch.tensor([1])
    )
    target.gt_masks = PolygonMasks([[torch.tensor([4.0, 4, 30, 4, 30, 30]).double().numpy()]])
    image = torch.randint(0, 255, (3, 64, 48), dtype=torch.uint8)
    with EventStorage():
        losses = detector([{"image": image, "instances": target}])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    sum(losses.values()).backward()
    assert all(
        p.grad is not None for name, p in detector.named_parameters() if "net.features.vit.blocks" in name
    )
    (found,) = detector.eval()([{"image": image, "height": 128, "width": 96}])
    assert found["instances"].image_size == (128, 96)


def test_loading_tells_what_was_loaded(export: Path) -> None:
    backbone = load_vit_backbone(export)
    assert backbone.spec == make_spec()
    assert len(backbone.report.digest) == 64


def test_lr_scales_known_answers() -> None:
    scale = build_lr_scale(make_spec(depth=12), 0.7)
    prefix = "backbone.net.features.vit."
    assert (
        scale(prefix + "pos_embed")
        == scale(prefix + "cls_token")
        == scale(prefix + "patch_embed.proj.weight")
        == pytest.approx(0.7**13)
    )
    assert scale(prefix + "blocks.0.attn.qkv.weight") == pytest.approx(0.7**12)
    assert scale(prefix + "blocks.11.norm1.bias") == pytest.approx(0.7)
    assert scale("backbone.simfp_2.0.weight") == scale("roi_heads.box_head.fc1.weight") == 1


def test_lr_scales_are_those_of_detectron2() -> None:
    spec = make_spec(depth=4)
    backbone, scale = make_backbone(spec), build_lr_scale(spec, 0.8)
    for name, _ in backbone.named_parameters():
        if name.split(".")[-1] != "cls_token":  # detectron2's ViT has none
            assert scale(f"backbone.net.{name}") == pytest.approx(
                get_vit_lr_decay_rate(f"backbone.net.{name}", 0.8, spec.depth)
            ), name


@pytest.mark.parametrize("missing", ["detectron2", "pycocotools", "shapely"])
@pytest.mark.parametrize("module", ["backbones.adapters.detectron2", "tasks.coco.maskrcnn"])
def test_missing_packages_are_named_with_the_command(
    missing: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(
        sys.modules
    ):  # as in a fresh process: every module of ours that needs the missing one is imported anew
        if name.startswith(("backbones.adapters.detectron2", "tasks.coco")) or name.split(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(NotInstalled, match=missing) as error:
        importlib.import_module(module)
    assert "make setup" in error.value.fix
    assert "requirements/detectron2.txt" in error.value.fix
