"""hf_sam: transformers' own SAM is the judge."""

import json
from typing import Any

import pytest
import torch

from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_hf_sam
from tests.backbones.formats.reference import check_real_size
from tests.parity import assert_parity, in_float64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_sam.write(tmp_path_factory.mktemp("hf_sam"))


@pytest.mark.parametrize("name", ["vision", "both", "memory"])
@torch.no_grad()
def test_features_equal_theirs(files, name):
    model, spec, report = load_backbone(files[name][0])
    theirs: Any = toys_hf_sam.models()["both" if name == "memory" else name]
    imgs = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(1)).double()
    want = in_float64(theirs.vision_encoder)(imgs).last_hidden_state.flatten(2).transpose(1, 2)
    assert_parity(model.double().eval().forward_features(imgs), want)
    assert (report.format, spec.arch, spec.num_heads, spec.mlp_ratio) == ("hf_sam", "sam", 4, 2.0)
    assert (spec.options["window_size"], spec.options["global_attn_indexes"]) == (3, [1, 3])
    assert (spec.norm_eps, spec.options.get("act_layer")) == (
        (1e-5, "quick_gelu") if name == "vision" else (1e-6, None)
    )
    assert all("prompt encoder and mask decoder" in reason for reason in report.dropped.values())
    assert bool(report.dropped) is (name != "vision")


@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16), (1280, 32, 16)])
def test_published_sizes(width, depth, heads):
    """B, L and H, made hollow by transformers' own class."""
    global_blocks = [depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4)]
    config = toys_hf_sam.SamVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        global_attn_indexes=global_blocks,
        mlp_dim=4 * width,
    )
    with torch.device("meta"):
        model = toys_hf_sam.SamVisionModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spec = check_real_size("hf_sam", shapes, {"config.json": config.to_dict()})
    assert (spec.num_heads, spec.depth, spec.img_size, spec.options["global_attn_indexes"]) == (
        heads,
        depth,
        (1024, 1024),
        global_blocks,
    )
    assert check_real_size("hf_sam", shapes).options == spec.options


@pytest.mark.parametrize(
    "config",
    [
        {"window_size": 4},
        {"window_size": "3"},
        {"global_attn_indexes": [0]},
        {"global_attn_indexes": 5},
        {"hidden_act": 3},
        {"num_attention_heads": 2},
        {"image_size": 64},
        {"global_attn_indexes": [[1], 3]},
    ],
)
def test_a_config_that_contradicts_its_tables_is_refused(files, tmp_path, config):
    (tmp_path / "model.safetensors").write_bytes((files["vision"][0] / "model.safetensors").read_bytes())
    kept = json.loads((files["vision"][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(kept | config))
    with pytest.raises(UserError):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("vision_encoder.neck.layer_norm2.bias"), "missing: neck.3.bias"),
        (
            lambda w: w.update({"vision_encoder.neck.conv3.weight": torch.zeros(3)}),
            "unexpected: neck.conv3.weight",
        ),
        (lambda w: w.pop("vision_encoder.layers.1.attn.rel_pos_h"), "rel_pos_h"),
    ],
)
def test_whatever_is_unexplained_is_refused(tmp_path, change, told):
    weights = dict(toys_hf_sam.models()["vision"].state_dict())
    change(weights)
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pth")
