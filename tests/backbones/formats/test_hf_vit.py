"""hf_vit: transformers' own ViT and DeiT are the judge, of what is read and of what is written."""

import json
from typing import Any

import pytest
import torch

from backbones.convert import convert
from backbones.load import load_backbone
from backbones.reading.source import open_source
from mae_bench.errors import UserError
from tests.backbones.formats import toys_hf_vit
from tests.backbones.formats.reference import check_real_size
from tests.parity import assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")

NAMES = ["vit", "bare", "classifier", "masked", "deit", "teacher"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_vit.write(tmp_path_factory.mktemp("hf_vit"))


@pytest.fixture(scope="module")
def theirs():
    return toys_hf_vit.models()


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def tokens_of(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return in_float64(getattr(model, "vit", getattr(model, "deit", model)))(imgs).last_hidden_state


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}.pth" for name in NAMES if name != "bare")])
@torch.no_grad()
def test_features_equal_theirs(files, theirs, imgs, name):
    path, options = files[name]
    model, spec, report = load_backbone(path, **options)
    assert_parity(
        model.double().eval().forward_features(imgs), tokens_of(theirs[name.removesuffix(".pth")], imgs)
    )
    is_deit = name.startswith(("deit", "teacher"))
    assert (report.format, spec.num_prefix_tokens, spec.num_heads) == ("hf_vit", 2 if is_deit else 1, 3)
    assert spec.norm_eps == (1e-6 if name == "bare" else 1e-12)
    assert (spec.mean, spec.interpolation) == (
        ((0.485, 0.456, 0.406), "bicubic") if is_deit else ((0.5,) * 3, "bilinear")
    )
    assert spec.pretrain_method == ("supervised" if is_deit else "unknown")


def test_heads_are_dropped_with_their_reasons(files):
    dropped = {name: load_backbone(files[name][0])[2].dropped for name in NAMES}
    assert "in front of a classifier" in dropped["vit"]["pooler.dense.weight"]
    assert dropped["classifier"]["classifier.bias"].startswith("classifier")
    assert dropped["teacher"]["distillation_classifier.bias"].startswith("classifier")
    assert "mask token" in dropped["masked"]["vit.embeddings.mask_token"]
    assert "decoder of" in dropped["masked"]["decoder.0.weight"]
    assert not dropped["bare"]


def test_a_file_that_may_be_vits_or_vitmaes_asks(files, theirs, imgs):
    with pytest.raises(UserError, match="hf_vitmae and hf_vit"):
        load_backbone(files["unmarked.pth"][0])
    assert load_backbone(files["unmarked.pth"][0], format="hf_vit")[1].pretrain_method == "unknown"
    assert load_backbone(files["unmarked.pth"][0], format="hf_vitmae")[1].pretrain_method == "mae"


def test_the_preprocessor_says_how_images_are_fed(tmp_path, theirs):
    theirs["vit"].save_pretrained(tmp_path)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    spec = load_backbone(tmp_path)[1]
    assert (spec.mean, spec.std, spec.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
    for wrong in ({"resample": ["bicubic"]}, {"image_mean": "grey"}, {"image_mean": [0.5]}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | wrong))
        if "resample" in wrong:
            assert load_backbone(tmp_path)[1].interpolation == "bilinear"
        else:
            with pytest.raises(UserError):
                load_backbone(tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("classifier", "ViTModel"), ("teacher", "DeiTModel")])
def test_they_load_what_is_written_and_it_reads_back(tmp_path, files, imgs, name, kind):
    source = files[name][0]
    convert(source, tmp_path / "out", "hf_vit")
    loaded: Any = getattr(toys_hf_vit, kind).from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"] | info["unexpected_keys"]
    ours, spec, _ = load_backbone(source)
    again, same_spec, report = load_backbone(tmp_path / "out")
    assert (report.format, same_spec) == ("hf_vit", spec)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())
    with torch.no_grad():
        want = in_float64(model)(imgs).last_hidden_state
        assert_parity(in_float64(ours).forward_features(imgs), want)
    stored, written = open_source(source), open_source(tmp_path / "out")
    assert all(torch.equal(tensor, stored.tensors[name]) for name, tensor in written.tensors.items())


def test_what_the_class_cannot_express_is_not_written(tmp_path, files):
    with pytest.raises(UserError, match="hf_vit"):
        convert(files["bare"][0], tmp_path / "out", "hf_vit")


@pytest.mark.parametrize(
    ("width", "heads", "depth", "patch"), [(768, 12, 12, 16), (1024, 16, 24, 16), (1280, 16, 32, 14)]
)
@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_published_sizes(kind, width, heads, depth, patch):
    """B, L and H, made hollow by transformers' own class."""
    config = getattr(toys_hf_vit, f"{kind}Config")(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        intermediate_size=4 * width,
        patch_size=patch,
    )
    with torch.device("meta"):
        model = getattr(toys_hf_vit, f"{kind}Model")(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spec = check_real_size("hf_vit", shapes, {"config.json": config.to_dict()})
    assert (spec.num_heads, spec.depth, spec.img_size, spec.patch_size) == (
        heads,
        depth,
        (224, 224),
        (patch, patch),
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("layernorm.bias"), "missing: norm.bias"),
        (lambda w: w.update({"layernorm2.bias": torch.zeros(3)}), "unexpected: layernorm2.bias"),
        (lambda w: w.pop("layers.1.attention.k_proj.weight"), "query"),
        (lambda w: w.update({f"layers.1.attention.{n}_proj.bias": torch.zeros(()) for n in "qkv"}), "query"),
        (lambda w: w.update({"embeddings.position_embeddings": torch.zeros(())}), "no grid of patches"),
    ],
)
def test_whatever_is_unexplained_is_refused(tmp_path, theirs, change, told):
    weights = dict(theirs["vit"].state_dict())
    change(weights)
    torch.save(weights, tmp_path / "x.bin")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.bin")
