"""hf_ijepa: transformers' own I-JEPA is the judge."""

import pytest
import torch

from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_hf_ijepa
from tests.backbones.formats.reference import check_real_size
from tests.parity import assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_ijepa.write(tmp_path_factory.mktemp("hf_ijepa"))


@pytest.mark.parametrize("name", ["ijepa", "classifier", "ijepa.pth", "classifier.pth"])
@torch.no_grad()
def test_features_equal_theirs(files, name):
    path, options = files[name]
    eps = {"norm_eps": 1e-6} if name.endswith(".pth") else {}  # without a config: the default of its class
    overrides = options.get("overrides", {}) | eps
    assert load_backbone(path, **options)[1].norm_eps == (1e-12 if name.endswith(".pth") else 1e-6)
    model, spec, report = load_backbone(path, overrides=overrides)
    theirs = toys_hf_ijepa.models()[name.removesuffix(".pth")]
    theirs = in_float64(getattr(theirs, "ijepa", theirs))
    imgs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    assert_parity(model.double().eval().forward_features(imgs), theirs(imgs).last_hidden_state)
    assert (report.format, spec.num_prefix_tokens, spec.global_pool, spec.pretrain_method) == (
        "hf_ijepa",
        0,
        "avg",
        "ijepa",
    )
    assert spec.num_heads == toys_hf_ijepa.HEADS
    assert all(reason.startswith(("classifier", "pooler")) for reason in report.dropped.values())


@pytest.mark.parametrize(
    ("width", "heads", "depth", "patch", "size"), [(1280, 16, 32, 14, 224), (1280, 16, 32, 16, 448)]
)
def test_published_sizes(width, heads, depth, patch, size):
    """H/14 and H/16 at 448, made hollow by transformers' own class."""
    config = toys_hf_ijepa.IJepaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        intermediate_size=4 * width,
        patch_size=patch,
        image_size=size,
    )
    with torch.device("meta"):
        model = toys_hf_ijepa.IJepaModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spec = check_real_size("hf_ijepa", shapes, {"config.json": config.to_dict()})
    assert (spec.num_heads, spec.img_size, spec.patch_size) == (heads, (size, size), (patch, patch))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("layernorm.bias"), "missing: norm.bias"),
        (lambda w: w.update({"layernorm2.bias": torch.zeros(3)}), "unexpected: layernorm2.bias"),
        (lambda w: w.pop("layers.1.attention.k_proj.weight"), "query"),
    ],
)
def test_whatever_is_unexplained_is_refused(tmp_path, change, told):
    weights = dict(toys_hf_ijepa.models()["ijepa"].state_dict())
    change(weights)
    torch.save(weights, tmp_path / "x.bin")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.bin")
