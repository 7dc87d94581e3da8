"""hf_dinov3: transformers' DINOv3ViTModel is read from files and memory, and written for AutoModel."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from backbones.convert import convert
from backbones.load import load_backbone
from mae_bench.errors import UserError
from mae_bench.export import write_export
from tests.backbones.formats import toys_hf_dinov3
from tests.backbones.formats.reference import check_real_size
from tests.backbones.formats.test_dinov2 import auto_model
from tests.backbones.formats.test_dinov3 import SIZES, images, transformers_model
from tests.backbones.formats.toys_dinov3 import toys
from tests.backbones.formats.toys_hf_dinov3 import KINDS, models
from tests.parity import FLOAT32_TABLES, assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_dinov3.write(tmp_path_factory.mktemp("hf_dinov3"))


@pytest.mark.parametrize("name", [*KINDS, "memory"])
def test_features_are_transformers_at_every_size(files, name):
    path, options = files[name]
    model, spec, report = load_backbone(path, dynamic_img_size=True, **options)
    theirs: Any = models()["gated" if name == "memory" else name]
    with torch.no_grad():
        for size in SIZES:
            expected = in_float64(theirs)(pixel_values=images(*size)).last_hidden_state
            assert_parity(
                model.double().eval().forward_features(images(*size)), expected, rtol=FLOAT32_TABLES
            )
    assert (report.format, spec.img_size, spec.num_heads) == (
        "hf_dinov3",
        (64, 64),
        theirs.config.num_attention_heads,
    )
    assert spec.norm_eps == theirs.config.layer_norm_eps
    assert spec.options["rope_temperature"] == theirs.config.rope_theta
    assert spec.num_prefix_tokens == 1 + theirs.config.num_register_tokens


@pytest.mark.parametrize("name", [*KINDS, *(f"dinov3-{name}" for name in toys())])
def test_what_is_written_is_what_automodel_loads(files, tmp_path, name):
    path, options = files.get(name, (tmp_path / "official.pth", {"overrides": {"img_size": [64, 64]}}))
    if name.startswith("dinov3-"):
        torch.save(toys()[name.removeprefix("dinov3-")], path)
    convert(path, tmp_path / "to", "hf_dinov3", **options)
    model, spec, _ = load_backbone(path, **options)
    with torch.no_grad():
        expected = in_float64(auto_model(tmp_path / "to"))(pixel_values=images(64, 64)).last_hidden_state
        assert_parity(model.double().eval().forward_features(images(64, 64)), expected, rtol=FLOAT32_TABLES)
    again, same_spec, _ = load_backbone(tmp_path / "to")
    assert same_spec == spec
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_what_a_config_cannot_say_is_not_written(files, tmp_path):
    model, spec, _ = load_backbone(files["plain"][0])
    for change in ({"rope_grid_offset": 0.5}, {"rope_rotate_half": False}):
        other = replace(spec, options=spec.options | change)
        write_export(tmp_path / "from", model.state_dict(), other, {})
        with pytest.raises(UserError, match="cannot be written as hf_dinov3"):
            convert(tmp_path / "from", tmp_path / "to", "hf_dinov3")


def test_the_repository_and_transformers_give_one_backbone(tmp_path):
    weights = toys()["small"]
    torch.save(weights, tmp_path / "official.pth")
    transformers_model(weights, tmp_path / "hf", 3)
    official, spec, _ = load_backbone(tmp_path / "official.pth")
    model, same_spec, _ = load_backbone(tmp_path / "hf", overrides={"options": {"init_values": 1e-5}})
    assert same_spec == spec
    assert all(
        torch.equal(tensor, official.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_the_satellite_models_say_how_they_are_fed(files, tmp_path):
    folder = files["plain"][0]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    processor = {"image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    _, spec, report = load_backbone(tmp_path)
    assert (spec.mean, spec.std, spec.interpolation) == (
        (0.430, 0.411, 0.296),
        (0.213, 0.156, 0.143),
        "bilinear",
    )
    assert not any("SAT-493M" in note for note in report.notes)
    assert any("SAT-493M" in note for note in load_backbone(folder)[2].notes)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_act": "silu"},
        {"hidden_act": ["gelu"]},
        {"rope_theta": "x"},
        {"layerscale_value": None},
        {"num_attention_heads": 5},
        {"image_size": 60},
        {"image_size": 64.0},
        {"image_size": 16 * 10**6},
        {"rope_theta": 10**400},
        {"rope_theta": math.inf},
        {"model_type": "dinov3_convnext"},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(files, tmp_path, config):
    folder = files["plain"][0]
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | config)
    )
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UserError):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model.layer.0.mystery": torch.zeros(3)}, "unexpected: blocks.0.mystery"),
        ({"model.layer.1.norm2.bias": None}, "missing: blocks.1.norm2.bias"),
        ({"model.layer.1.attention.k_proj.weight": None}, "query, key and value"),
        ({"model.layer.1.attention.v_proj.bias": None}, "missing: blocks.1.attn.v_bias"),
        (
            {"model.layer.1.mlp.up_proj.weight": torch.zeros(400, 192)},
            "wrong shape: blocks.1.mlp.fc1_x.weight",
        ),
    ],
)
def test_whatever_does_not_fit_is_refused(files, tmp_path, change, told):
    weights = torch.load(files["memory"][0]) | change
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("width", "depth", "hidden", "heads", "gated"),
    [
        (384, 12, 1536, 6, True),
        (768, 12, 3072, 12, False),
        (1024, 24, 4096, 16, False),  # S+, B, L
        (1280, 32, 5120, 20, True),
        (4096, 40, 8192, 32, True),  # H+ and 7B
    ],
)
@pytest.mark.parametrize("described", [True, False])
def test_published_sizes(width, depth, hidden, heads, gated, described):
    bias, act = heads < 32, "silu" if gated else "gelu"
    config = DINOv3ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        intermediate_size=hidden,
        num_attention_heads=heads,
        use_gated_mlp=gated,
        hidden_act=act,
        num_register_tokens=4,
        query_bias=bias,
        value_bias=bias,
    )
    with torch.device("meta"):
        theirs = DINOv3ViTModel(config)
    beside = {"config.json": json.loads(config.to_json_string(use_diff=False))} if described else {}
    spec = check_real_size("hf_dinov3", theirs.state_dict(), beside)
    assert (spec.num_heads, spec.img_size, spec.num_prefix_tokens, spec.norm_eps) == (
        heads,
        (224, 224),
        5,
        1e-5,
    )
