"""detectron2: its own ViT and its own checkpointer are the judges of what is read and of what is written."""

import pickle
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from backbones.convert import convert
from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_detectron2 as toys
from tests.backbones.formats.reference import check_real_size, fill

pytest.importorskip("detectron2", reason="detectron2 is optional: make setup")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT  # noqa: E402

from tests.parity import FLOAT32_TABLES, assert_parity, in_float64

pytestmark = [pytest.mark.framework, pytest.mark.usefixtures("toy_heads")]

TIMM: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 0,
}
SIZES: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 2,
    "num_heads": 3,
    "norm_layer": lambda width: nn.LayerNorm(width, eps=1e-6),
}
TABLES: dict[str, Any] = {"use_rel_pos": True, "window_size": toys.WINDOW}
BUILT: dict[str, dict[str, Any]] = {
    "windows": {**TABLES, "img_size": 48, "pretrain_img_size": 32, "window_block_indexes": [0]},
    "global": {"use_rel_pos": True, "img_size": 48, "pretrain_img_size": 32},
    "square_table": {
        **TABLES,
        "img_size": 48,
        "pretrain_img_size": 48,
        "pretrain_use_cls_token": False,
        "window_block_indexes": [0],
    },
    "no_relative_tables": {
        "img_size": 32,
        "pretrain_img_size": 32,
        "window_size": toys.WINDOW,
        "window_block_indexes": [0],
    },
}


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(9)).double()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys.write(tmp_path_factory.mktemp("detectron2"))


def check_map(theirs: Any, ours: Any, imgs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = in_float64(theirs)(imgs)["last_feat"]
        tokens = ours.double().eval().forward_features(imgs)
    assert_parity(tokens.transpose(1, 2).reshape(expected.shape), expected, rtol=FLOAT32_TABLES)


@pytest.mark.parametrize("name", BUILT)
def test_the_toys_are_theirs_and_features_equal(files, name):
    theirs = ViT(**SIZES, **BUILT[name])
    theirs.load_state_dict(toys.VITS[name])
    path, options = files[name]
    ours, spec, report = load_backbone(path, **options)
    assert (report.format, spec.num_heads, spec.img_size) == ("detectron2", 3, (BUILT[name]["img_size"],) * 2)
    check_map(theirs, ours, images(BUILT[name]["img_size"]))
    assert "pyramid" in report.dropped["backbone.simfp_2.0.weight"]
    assert "heads" in report.dropped["roi_heads.box_predictor.cls_score.weight"]


def test_windows_that_nothing_tells_are_asked_for(files):
    with pytest.raises(UserError, match="window_size and global_attn_indexes"):
        load_backbone(files["no_relative_tables"][0])


class Detector(nn.Module):
    """Where a stock config has the ViT: inside a feature pyramid that is the detector's `backbone`."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.backbone = SimpleFeaturePyramid(vit, "last_feat", 16, (1.0,), norm="LN")


def test_their_checkpointer_loads_what_we_write(tmp_path):
    """Each block gives the tokens of a timm ViT with the same weights, without class token and final norm."""
    source = VisionTransformer(**TIMM)
    weights = fill({name: tensor.shape for name, tensor in source.state_dict().items()})
    torch.save(weights, tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "x.pth", "detectron2")
    detector = Detector(ViT(**SIZES, img_size=32, pretrain_img_size=32)).eval()
    found = DetectionCheckpointer(detector)._load_model(torch.load(tmp_path / "x.pth", weights_only=True))
    assert all(name.startswith("backbone.simfp_") for name in found.missing_keys)
    assert (found.unexpected_keys, found.incorrect_shapes) == ([], [])
    DetectionCheckpointer(detector).load(str(tmp_path / "x.pth"))
    ours = VisionTransformer(**TIMM, class_token=False, global_pool="", final_norm=False)
    ours.load_state_dict(
        {
            name: tensor[:, 1:] if name == "pos_embed" else tensor
            for name, tensor in weights.items()
            if name not in ("cls_token", "norm.weight", "norm.bias")
        }
    )
    seen: dict[str, list[torch.Tensor]] = {"theirs": [], "ours": []}
    for name, vit in (("theirs", detector.backbone.net), ("ours", ours)):
        for block in vit.blocks:
            block.register_forward_hook(
                lambda _, __, out, name=name: seen[name].append(out.detach().flatten(1, -2))
            )
        vit.double().eval()(images(32))
    assert len(seen["theirs"]) == 2
    for theirs, own in zip(seen["theirs"], seen["ours"], strict=True):
        assert_parity(own, theirs)


def test_the_plain_vit_comes_back_whole(tmp_path):
    source = VisionTransformer(**TIMM)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "x.pth", "detectron2")
    model, spec, report = load_backbone(tmp_path / "x.pth")
    assert (report.format, spec.arch, set(report.new)) == (
        "detectron2",
        "vit",
        {"cls_token", "norm.weight", "norm.bias"},
    )
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    for wrong in (None, {}, {**content["beside_the_model"], "cls_token": torch.zeros(())}):
        torch.save({**content, "beside_the_model": wrong}, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match="beside_the_model has no"):
            load_backbone(tmp_path / "wrong.pth")


@pytest.mark.parametrize("name", BUILT)
def test_a_detectors_vit_is_written_again(tmp_path, files, name):
    path, options = files[name]
    convert(path, tmp_path / "x.pth", "detectron2", **options)
    (ours, spec, _), (again, same, _) = load_backbone(path, **options), load_backbone(tmp_path / "x.pth")
    assert same == spec
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in ours.state_dict().items())
    grown = {"pretrain_img_size": spec.img_size[0], "pretrain_use_cls_token": False}
    theirs = Detector(ViT(**SIZES, **{**BUILT[name], **grown}))
    DetectionCheckpointer(theirs).load(str(tmp_path / "x.pth"))
    check_map(theirs.backbone.net, ours, images(spec.img_size[0]))


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks.0.attn.rel_pos_w": None},
        {"blocks.0.attn.rel_pos_h": torch.ones(4, 64)},
        {"blocks.0.attn.rel_pos_h": torch.ones(())},
        {"blocks.0.attn.rel_pos_h": torch.ones(3, 65)},
        {"blocks.0.attn.rel_pos_h": torch.ones(5, 64)},
        {"blocks.0.mlp.fc2.bias": None},
        {"blocks.0.residual.conv1.weight": torch.ones(96, 192, 1, 1)},
        {"pos_embed": torch.ones(1, 15, 192)},
        {"pos_embed": torch.ones(())},
        {"patch_embed.proj.weight": torch.ones(192)},
        {"patch_embed.proj.weight": torch.ones(())},
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes):
    tensors = {
        name: tensor for name, tensor in (toys.VITS["windows"] | changes).items() if tensor is not None
    }
    torch.save(
        {"model": {f"backbone.net.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "x.pth"
    )
    with pytest.raises(UserError):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("width", "heads", "everywhere"),
    [(768, 12, [2, 5, 8, 11]), (1024, 16, [5, 11, 17, 23]), (1280, 16, [7, 15, 23, 31])],
)
def test_real_sizes(width, heads, everywhere):
    """ViTDet-B, L, H: windows of 14, four global blocks, images of 1024, tables of 224 with a class row."""
    sides = [64 if i in everywhere else 14 for i in range(everywhere[-1] + 1)]
    state = {
        f"backbone.net.{name}": shape for name, shape in toys.shapes(sides, 197, width, heads, 16).items()
    }
    spec = check_real_size("detectron2", {"model": state, "iteration": 1})
    assert (spec.num_heads, spec.img_size) == (heads, (1024, 1024))
    assert (spec.options["window_size"], spec.options["global_attn_indexes"]) == (14, everywhere)


def test_a_file_of_their_zoo_is_pickled_arrays(tmp_path, files):
    arrays = {f"backbone.net.{name}": tensor.numpy() for name, tensor in toys.VITS["windows"].items()}
    content = {"model": arrays, "__author__": "the authors", "matching_heuristics": True}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content))
    (ours, spec, _), (same, same_spec, _) = (
        load_backbone(tmp_path / "model_final.pkl"),
        load_backbone(files["windows"][0]),
    )
    assert spec == same_spec
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in ours.state_dict().items())
