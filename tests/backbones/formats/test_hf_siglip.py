"""hf_siglip: features equal those of transformers' SigLIP and SigLIP 2, NaFlex at any size too."""

import json
from typing import Any

import pytest
import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel

from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_hf_siglip
from tests.backbones.formats.reference import check_real_size
from tests.backbones.formats.toys_hf_siglip import NAFLEX
from tests.parity import FLOAT32_TABLES, assert_parity, in_float64

PATCH = 8
NAMES = ["vision", "headless", "both", "classifier", *NAFLEX]
FILES = [*NAMES, *(f"{name}_memory" for name in NAMES), "vision_bare", "naflex_bare"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_siglip.write(tmp_path_factory.mktemp("hf_siglip"))


@pytest.fixture(scope="module")
def theirs():
    return toys_hf_siglip.models()


def draw(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def expected_tokens(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    """Return the tokens (N, L, D) after the final norm; NaFlex takes patches, channels last in each."""
    tower = in_float64(getattr(model, "vision_model", model))
    if isinstance(tower, SiglipVisionModel):
        return tower(imgs, interpolate_pos_encoding=True).last_hidden_state
    n, _, height, width = imgs.shape
    grid = height // PATCH, width // PATCH
    patches = imgs.reshape(n, 3, grid[0], PATCH, grid[1], PATCH).permute(0, 2, 4, 3, 5, 1)
    shapes, mask = torch.tensor([grid] * n), torch.ones(n, grid[0] * grid[1], dtype=torch.long)
    return tower(patches.reshape(n, grid[0] * grid[1], -1), mask, shapes).last_hidden_state


@pytest.mark.parametrize("file", FILES)
@torch.no_grad()
def test_features_equal_theirs(files, theirs, file):
    name = file.partition("_")[0]
    path, options = files[file]
    model, spec, report = load_backbone(path, **options)
    imgs = draw(32, 32)
    assert_parity(model.double().forward_features(imgs), expected_tokens(theirs[name], imgs))
    assert report.format == "hf_siglip"
    gelu_and_eps = spec.options.get("act_layer"), spec.norm_eps
    assert gelu_and_eps == (("gelu", 1e-5) if name == "headless" else ("gelu_tanh", 1e-6))
    assert spec.num_heads == (12 if name == "both" else 4)
    assert (spec.img_size, spec.num_prefix_tokens, spec.global_pool) == ((32, 32), 0, "avg")
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.5,) * 3)
    assert any("attention pooling" in reason for reason in report.dropped.values()) == (name != "headless")


@pytest.mark.parametrize("size", [(16, 24), (48, 40)])
@pytest.mark.parametrize("name", ["vision", "naflex"])
@torch.no_grad()
def test_another_image_size_resamples_the_table_as_theirs(files, theirs, name, size):
    imgs = draw(*size)
    expected = expected_tokens(theirs[name], imgs)
    for options in ({"img_size": size}, {"dynamic_img_size": True}):
        model = load_backbone(files[name][0], **options)[0].double()
        assert_parity(model.forward_features(imgs), expected, rtol=FLOAT32_TABLES)


@torch.no_grad()
def test_the_average_of_the_tokens_is_what_their_classifier_sees(files, theirs):
    model, spec, report = load_backbone(files["classifier"][0])
    imgs, judge = draw(36, 36), in_float64(theirs["classifier"])
    pooled = model.double().forward_features(imgs[..., :32, :32]).mean(1)
    assert spec.global_pool == "avg"
    assert_parity(judge.classifier(pooled), judge(imgs).logits)
    assert {"classifier.weight", "classifier.bias"} <= set(report.dropped)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_act": "relu6"},
        {"image_size": 64},
        {"image_size": "large"},
        {"image_size": [36]},
        {"image_size": [36, 36, 36]},
        {"num_attention_heads": "4"},
        {"num_attention_heads": 5},
        {"model_type": "idefics2_vision"},
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(files, tmp_path, config):
    folder = files["vision"][0]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    described = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | config))
    with pytest.raises(UserError):
        load_backbone(tmp_path)


@pytest.mark.parametrize("channels", [0, 5, "3"])
def test_patches_that_are_no_squares_are_refused(files, tmp_path, channels):
    folder = files["naflex"][0]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    described = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"num_channels": channels}))
    with pytest.raises(UserError, match="square patches"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("post_layernorm.bias"), "missing: norm.bias"),
        (lambda w: w.update({"mystery": torch.zeros(3)}), "unexpected: mystery"),
        (lambda w: w.pop("encoder.layers.0.self_attn.k_proj.bias"), "query"),
    ],
)
def test_whatever_is_unexplained_is_refused(files, theirs, tmp_path, change, told):
    weights = dict(theirs["vision"].state_dict())
    change(weights)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((files["vision"][0] / "config.json").read_text())
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path)


PUBLISHED = {
    "base-patch16-224": (768, 12, 12, 3072, 16, 224),
    "large-patch16-384": (1024, 24, 16, 4096, 16, 384),
    "so400m-patch14-384": (1152, 27, 16, 4304, 14, 384),
    "giant-opt-patch16-256": (1536, 40, 16, 6144, 16, 256),
}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, described):
    width, depth, heads, hidden, patch, size = PUBLISHED[name]
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "patch_size": patch,
    }
    config = SiglipVisionConfig(**sizes, image_size=size)
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in SiglipVisionModel(config).state_dict().items()}
    spec = check_real_size("hf_siglip", shapes, {"config.json": config.to_dict()} if described else None)
    whole = size // patch * patch
    assert (spec.num_heads, spec.depth, spec.img_size) == (heads, depth, (whole, whole))
    assert (spec.options["act_layer"], spec.norm_eps) == ("gelu_tanh", 1e-6)


@pytest.mark.parametrize("described", [True, False])
def test_published_size_of_naflex(described):
    config = Siglip2VisionConfig()
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in Siglip2VisionModel(config).state_dict().items()}
    spec = check_real_size("hf_siglip", shapes, {"config.json": config.to_dict()} if described else None)
    assert (spec.num_heads, spec.img_size, spec.patch_size) == (12, (256, 256), (16, 16))
    assert (spec.interpolation, spec.pos_resample) == ("bilinear", "bilinear_antialias")
