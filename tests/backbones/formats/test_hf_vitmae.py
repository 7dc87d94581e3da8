"""hf_vitmae: features equal those of transformers' ViTMAE (writing is tested in test_convert.py)."""

import pytest
import torch

from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_hf_vitmae
from tests.backbones.formats.reference import check_real_size
from tests.parity import assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_vitmae.write(tmp_path_factory.mktemp("hf_vitmae"))


@pytest.mark.parametrize("name", ["encoder", "full", "encoder.pth", "full.pth"])
@torch.no_grad()
def test_features_equal_theirs(files, name):
    path, options = files[name]
    eps = {"norm_eps": 1e-6} if name.endswith(".pth") else {}  # without a config: the default of its class
    model, spec, report = load_backbone(path, **options, overrides=eps)
    theirs = toys_hf_vitmae.models()[name.removesuffix(".pth")]
    imgs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    in_order = torch.arange(16.0).repeat(2, 1)  # ascending noise shuffles nothing, and mask_ratio is 0
    want = in_float64(getattr(theirs, "vit", theirs))(imgs, noise=in_order).last_hidden_state
    assert_parity(model.double().eval().forward_features(imgs), want)
    assert (report.format, spec.pretrain_method, spec.num_heads) == ("hf_vitmae", "mae", 3)
    assert all(reason.startswith("decoder") for reason in report.dropped.values())


@pytest.mark.parametrize(
    ("width", "heads", "depth", "patch"), [(768, 12, 12, 16), (1024, 16, 24, 16), (1280, 16, 32, 14)]
)
def test_published_sizes(width, heads, depth, patch):
    config = toys_hf_vitmae.ViTMAEConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        intermediate_size=4 * width,
        patch_size=patch,
    )
    with torch.device("meta"):
        model = toys_hf_vitmae.ViTMAEForPreTraining(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spec = check_real_size("hf_vitmae", shapes, {"config.json": config.to_dict()})
    assert (spec.num_heads, spec.depth, spec.img_size) == (heads, depth, (224, 224))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("vit.layernorm.bias"), "missing: norm.bias"),
        (lambda w: w.update({"vit.layernorm2.bias": torch.zeros(3)}), "unexpected: layernorm2.bias"),
        (lambda w: w.pop("vit.layers.1.attention.k_proj.weight"), "query"),
    ],
)
def test_whatever_is_unexplained_is_refused(tmp_path, change, told):
    weights = dict(toys_hf_vitmae.models()["full"].state_dict())
    change(weights)
    torch.save(weights, tmp_path / "x.bin")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.bin")
