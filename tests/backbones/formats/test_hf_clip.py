"""hf_clip: transformers' own CLIP is the judge."""

import json

import pytest
import torch

from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_hf_clip
from tests.backbones.formats.reference import check_real_size
from tests.parity import assert_parity, in_float64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_clip.write(tmp_path_factory.mktemp("hf_clip"))


@pytest.fixture(scope="module")
def theirs():
    return toys_hf_clip.models()


@pytest.mark.parametrize(
    "name", ["vision", "gelu", "both", "vision_memory", "gelu_memory", "both_memory", "older"]
)
@torch.no_grad()
def test_features_equal_theirs(files, theirs, name):
    path, options = files[name]
    model, spec, report = load_backbone(path, **options)
    judge = theirs[name.removesuffix("_memory").replace("older", "vision")]
    judge = in_float64(getattr(judge, "vision_model", judge))
    imgs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    found = model.double().eval().forward_features(imgs)
    theirs_out = judge(imgs)
    assert_parity(found, judge.post_layernorm(theirs_out.last_hidden_state))
    assert_parity(found[:, 0], theirs_out.pooler_output)
    assert report.format == "hf_clip"
    assert (spec.options["act_layer"], spec.norm_eps) == (
        ("gelu", 1e-6) if "gelu" in name else ("quick_gelu", 1e-5)
    )
    assert spec.num_heads == (12 if "both" in name else 4)
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073)


def test_without_a_config_the_activation_is_asked_for(files):
    with pytest.raises(UserError, match="act_layer"):
        load_backbone(files["older"][0], overrides={"num_heads": 4})


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_act": ["gelu"]},
        {"hidden_act": "relu6"},
        {"image_size": "large"},
        {"vision_config": 3},
        {"num_attention_heads": "4"},
        {"layer_norm_eps": None},
        {"model_type": "bert"},
    ],
)
def test_a_damaged_config_is_refused(files, config):
    path = files["gelu_memory"][0] / "config.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | config))
    with pytest.raises(UserError):
        load_backbone(path.parent)
    path.write_text(kept)


@pytest.mark.parametrize(
    ("width", "heads", "depth", "hidden"), [(768, 12, 12, 3072), (1024, 16, 24, 4096), (1280, 16, 32, 5120)]
)
def test_published_sizes(width, heads, depth, hidden):
    """B, L and H, made hollow by transformers' own class."""
    config = toys_hf_clip.CLIPVisionConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        intermediate_size=hidden,
        patch_size=14,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model = toys_hf_clip.CLIPVisionModel(config)
    spec = check_real_size(
        "hf_clip",
        {name: tuple(t.shape) for name, t in model.state_dict().items()},
        {"config.json": config.to_dict()},
    )
    assert (spec.num_heads, spec.depth, spec.img_size, spec.options["act_layer"]) == (
        heads,
        depth,
        (224, 224),
        "gelu",
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("post_layernorm.bias"), "missing: norm.bias"),
        (lambda w: w.update({"post_layernorm2.bias": torch.zeros(3)}), "unexpected: post_layernorm2.bias"),
        (lambda w: w.pop("encoder.layers.0.self_attn.k_proj.bias"), "query"),
    ],
)
def test_whatever_is_unexplained_is_refused(tmp_path, theirs, change, told):
    weights = dict(theirs["vision"].state_dict())
    change(weights)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(theirs["vision"].config.to_dict()))
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path)
