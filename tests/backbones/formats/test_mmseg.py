"""mmseg: mmsegmentation's own backbones are the judge of what is read and of what is written."""

import pytest
import torch

from backbones.convert import convert
from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_mmpretrain, toys_mmseg
from tests.backbones.formats.reference import check_real_size
from tests.parity import assert_parity, in_float64

pytestmark = [pytest.mark.framework, pytest.mark.usefixtures("toy_heads")]

backbones = pytest.importorskip("mmseg.models.backbones", reason="mmsegmentation is optional: make setup")

SIZES = {"img_size": (32, 32), "patch_size": 8, "embed_dims": 192, "num_layers": 2, "num_heads": 3}
NORM = {"norm_cfg": {"type": "LN", "eps": 1e-6}}  # as in mmsegmentation's configs of these backbones
BUILT = {
    "vit": ("VisionTransformer", {"patch_bias": True, "final_norm": True}),
    "vit_as_configured_by_default": ("VisionTransformer", {}),
    "mae": ("MAE", {}),
    "beit": ("BEiT", {}),
}


def build(kind, **options):
    model = getattr(backbones, kind)(**SIZES, **NORM, **options)
    model.eval()  # theirs returns nothing
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_mmseg.write(tmp_path_factory.mktemp("mmseg"))


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)).double()


def check_maps(theirs, ours, spec, imgs):
    """Their last map is our patch tokens."""
    with torch.no_grad():
        patches = ours.double().eval().forward_features(imgs)[:, spec.num_prefix_tokens :]
        expected = in_float64(theirs)(imgs)[-1]
    assert_parity(patches.transpose(1, 2).reshape(expected.shape), expected)


@pytest.mark.parametrize("name", BUILT)
def test_the_toys_are_theirs_and_features_equal(files, imgs, name):
    kind, options = BUILT[name]
    theirs = build(kind, **options)
    theirs.load_state_dict(toys_mmseg.backbones()[name] | toys_mmseg.index_of(theirs))
    ours, spec, report = load_backbone(files[name][0])
    check_maps(theirs, ours, spec, imgs)
    assert report.format == "mmseg"
    assert "segmentation head" in report.dropped["decode_head.conv_seg.weight"]
    assert set(report.new) == {
        "vit_as_configured_by_default": {"patch_embed.proj.bias"},
        "mae": {f"blocks.{i}.attn.v_bias" for i in range(2)},
    }.get(name, set())


@pytest.mark.parametrize("name", ["vit_as_configured_by_default", "beit"])
def test_without_a_last_norm_the_average_is_as_it_is(files, imgs, name):
    model, spec, _ = load_backbone(files[name][0], global_pool="avg")
    with torch.no_grad():
        tokens = model.double().eval().forward_features(imgs)
        pooled = model.forward_head(tokens, pre_logits=True)
    assert_parity(pooled, tokens[:, spec.num_prefix_tokens :].mean(dim=1))


def test_their_beit_and_mmpretrains_are_one(tmp_path, imgs):
    """The reading of mmpretrain's BEiT has mmsegmentation's BEiT as a second judge."""
    tensors = toys_mmpretrain.backbones()["beit"]
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("ln2.")}
    theirs = build("BEiT")
    theirs.load_state_dict(tensors | toys_mmseg.index_of(theirs))
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    ours, spec, _ = load_backbone(tmp_path / "x.pth")
    check_maps(theirs, ours, spec, imgs)


@pytest.mark.parametrize("name", ["vit", "vit_as_configured_by_default"])
def test_they_load_what_we_write(tmp_path, files, imgs, name):
    convert(files[name][0], tmp_path / "x.pth", "mmseg")
    ours, spec, _ = load_backbone(files[name][0])
    written = torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]
    options = {"patch_bias": True, "final_norm": "norm.weight" in ours.state_dict()}
    strictly = build("VisionTransformer", **options)
    strictly.load_state_dict(written)
    by_config = build(
        "VisionTransformer", **options, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "x.pth")}
    )
    by_config.init_weights()
    for theirs in (strictly, by_config):
        check_maps(theirs, ours, spec, imgs)


def test_what_they_have_no_place_for_is_refused(tmp_path, files):
    for name in ("mae", "beit"):
        with pytest.raises(UserError, match="its architecture is beit"):
            convert(files[name][0], tmp_path / "x.pth", "mmseg")
    pooled = toys_mmpretrain.write(tmp_path)["finetuned"][0]
    with pytest.raises(UserError, match="fc_norm"):
        convert(pooled, tmp_path / "x.pth", "mmseg")
    assert not (tmp_path / "x.pth").exists()


def test_a_missing_tensor_is_refused(tmp_path):
    tensors = toys_mmseg.backbones()["vit"]
    for name in ("layers.1.attn.attn.in_proj_bias", "ln1.bias", "layers.0.ffn.layers.1.weight"):
        torch.save({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "x.pth")
        with pytest.raises(UserError):
            load_backbone(tmp_path / "x.pth")


def test_a_class_token_that_the_config_leaves_out_is_refused(tmp_path):
    """Their VisionTransformer has the parameter then, and does not use it."""
    meta = {"cfg": "model = dict(backbone=dict(type='VisionTransformer', with_cls_token=False))"}
    torch.save({"meta": meta, "state_dict": toys_mmseg.backbones()["vit"]}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="class token"):
        load_backbone(tmp_path / "x.pth")


def test_a_training_file_of_mmengine_is_read(tmp_path):
    """Its runner saves the history of losses as objects, beside optimizer and meta."""
    logging = pytest.importorskip("mmengine.logging")
    hub = logging.MessageHub.get_instance("test_mmseg")
    hub.update_scalar("train/loss", 0.5)
    content = {
        "meta": {"epoch": 1},
        "state_dict": toys_mmseg.backbones()["vit"],
        "message_hub": hub.state_dict(),
    }
    torch.save(content, tmp_path / "iter_160000.pth")
    assert load_backbone(tmp_path / "iter_160000.pth")[2].format == "mmseg"


@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16)])
def test_real_sizes(width, depth, heads):
    """MAE-B and MAE-L as UperNet's configs train them, at 512 x 512."""
    attention = toys_mmpretrain.qkv(width) | {"relative_position_bias_table": (63 * 63 + 3, heads)}
    shapes = toys_mmpretrain.shapes(attention, width, depth, 4 * width, 16, 1 + 32 * 32)
    shapes |= {f"layers.{i}.gamma_{j}": (width,) for i in range(depth) for j in (1, 2)}
    state = {f"backbone.{name}": shape for name, shape in shapes.items()}
    spec = check_real_size("mmseg", {"state_dict": state | {"decode_head.conv_seg.weight": (150, 512, 1, 1)}})
    assert (spec.arch, spec.num_heads, spec.depth, spec.img_size) == ("beit", heads, depth, (512, 512))
