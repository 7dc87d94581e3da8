"""hf_dinov2: transformers' models are read from files and memory, and written for AutoModel."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from backbones.convert import convert
from backbones.load import load_backbone
from mae_bench.errors import UserError
from mae_bench.export import write_export
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec
from tests.backbones.formats import toys_dinov2, toys_hf_dinov2
from tests.backbones.formats.reference import check_real_size
from tests.backbones.formats.test_dinov2 import auto_model
from tests.backbones.formats.toys_hf_dinov2 import models
from tests.parity import FLOAT32_TABLES, assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")

NAMES = sorted(models())


def tokens_of(model: Any) -> torch.Tensor:
    """Of a model of either library, for the same images."""
    imgs = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        if not hasattr(model, "config"):
            return in_float64(model).forward_features(imgs)
        inner = getattr(model, model.base_model_prefix, model)  # of a classifier
        return in_float64(inner)(pixel_values=imgs).last_hidden_state


def same(ours: Any, theirs: Any) -> None:
    assert_parity(tokens_of(ours), tokens_of(theirs), rtol=FLOAT32_TABLES)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_dinov2.write(tmp_path_factory.mktemp("hf_dinov2"))


@pytest.fixture(scope="module")
def theirs():
    return models()


@pytest.mark.parametrize("name", NAMES)
def test_features_are_transformers(files, theirs, name):
    model, spec, report = load_backbone(files[name][0])
    same(model, theirs[name])
    config = theirs[name].config
    assert report.format == "hf_dinov2"
    assert (spec.num_heads, spec.norm_eps, spec.img_size) == (3, config.layer_norm_eps, (56, 56))
    assert spec.options["init_values"] == config.layerscale_value
    assert spec.pos_resample == ("bicubic_antialias" if spec.num_prefix_tokens > 1 else "bicubic_offset")
    assert (spec.pretrain_method, spec.global_pool) == ("dinov2", "token")


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name in ("plain", "gated", "no-bias", "registers-gated")]
)
def test_features_from_memory_without_a_config(files, theirs, name):
    model, spec, report = load_backbone(files[f"{name}-memory"][0])
    same(model, theirs[name])
    assert (report.format, spec.num_heads, spec.norm_eps) == ("hf_dinov2", 3, 1e-6)


def test_the_account_of_a_classifier(files):
    _, _, report = load_backbone(files["registers-classifier"][0])
    assert report.dropped["classifier.weight"] == "classifier: each task trains its own"
    assert "masked patches" in report.dropped["dinov2_with_registers.embeddings.mask_token"]
    assert "row" in report.reshaped["cls_token"]


@pytest.mark.parametrize("name", [*NAMES, "dinov2-base", "dinov2-giant-registers"])
def test_what_is_written_is_what_automodel_loads(files, tmp_path, name):
    official = name.startswith("dinov2-")
    (tmp_path / "from").mkdir()
    source = (
        toys_dinov2.write(tmp_path / "from")[name.removeprefix("dinov2-")][0] if official else files[name][0]
    )
    convert(source, tmp_path / "to", "hf_dinov2")
    model, spec, _ = load_backbone(source)
    same(model, auto_model(tmp_path / "to"))
    again, same_spec, _ = load_backbone(tmp_path / "to")
    assert same_spec == spec
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_the_files_of_transformers_come_back_tensor_for_tensor(files, tmp_path):
    for name in ("plain", "gated"):
        convert(files[name][0], tmp_path / name, "hf_dinov2")
        before, after = (
            load_file(folder / "model.safetensors") for folder in (files[name][0], tmp_path / name)
        )
        before["embeddings.mask_token"] = torch.zeros(1, 192)  # ours have none
        assert set(before) == set(after)
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "cannot be written as hf_dinov2"),
        ({"options": {"init_values": 1.0, "class_token": True}}, "cannot be written"),
        ({"options": {"init_values": 1.0}, "num_prefix_tokens": 3}, "cannot be written"),
        ({"options": {"init_values": 1.0}, "mlp_ratio": 2.5}, "whole ratio"),
        ({"options": {"init_values": 1.0}, "img_size": (56, 28)}, "squares"),
    ],
)
def test_what_a_config_cannot_say_is_not_written(tmp_path, change, told):
    fields: dict[str, Any] = {"img_size": (56, 56), **change}
    spec = BackboneSpec("vit", patch_size=(14, 14), in_chans=3, embed_dim=48, depth=1, num_heads=3, **fields)
    write_export(tmp_path / "from", build_vit(spec).state_dict(), spec, {})
    with pytest.raises(UserError, match=told):
        convert(tmp_path / "from", tmp_path / "to", "hf_dinov2")


@pytest.mark.parametrize(
    "config",
    [
        {"layerscale_value": "x"},
        {"layer_norm_eps": None},
        {"num_attention_heads": "3"},
        {"num_attention_heads": 5},
        {"image_size": []},
        {"image_size": 112},
        {"hidden_act": ["gelu"]},
        {"hidden_act": "relu"},
        {"model_type": ["dinov2"]},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(files, tmp_path, config):
    folder = files["plain"][0]
    stated = json.loads((folder / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(stated))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UserError):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.update({"encoder.layer.0.mystery": torch.zeros(3)}), "unexpected: blocks.0.mystery"),
        (lambda w: w.pop("encoder.layer.1.norm2.bias"), "missing: blocks.1.norm2.bias"),
        (lambda w: w.pop("encoder.layer.1.attention.k_proj.bias"), "query, key and value"),
        (lambda w: w.pop("encoder.layer.1.mlp.up_proj.bias"), "gate_proj and up_proj"),
        (
            lambda w: w.update({"encoder.layer.1.mlp.gate_proj.bias": torch.tensor(1.0)}),
            "gate_proj and up_proj",
        ),
        (
            lambda w: w.update({"encoder.layer.1.attention.attention.query.bias": torch.zeros(192)}),
            "each weight once",
        ),
    ],
)
def test_whatever_does_not_fit_is_refused(files, tmp_path, change, told):
    weights = torch.load(files["gated-memory"][0])
    change(weights)
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("width", "depth", "heads", "registers", "gated"),
    [
        (768, 12, 12, 4, False),
        (1024, 24, 16, 0, False),
        (1536, 4, 24, 4, True),  # B, L; g, of which four of forty blocks
    ],
)
def test_published_sizes(width, depth, heads, registers, gated):
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": 518,
        "patch_size": 14,
        "use_swiglu_ffn": gated,
    }
    with torch.device("meta"):
        theirs = (
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes))
            if registers
            else Dinov2Model(Dinov2Config(**sizes))
        )
    config = json.loads(theirs.config.to_json_string(use_diff=False))
    spec = check_real_size("hf_dinov2", theirs.state_dict(), {"config.json": config})
    assert (spec.num_heads, spec.img_size, spec.num_prefix_tokens) == (heads, (518, 518), 1 + registers)


def test_a_gate_that_is_the_second_half_would_show(files, tmp_path):
    """The halves of weights_in in the other order are other features: the comparisons above see the order."""
    weights = load_file(files["gated"][0] / "model.safetensors")
    for kind in ("weight", "bias"):
        name = f"encoder.layer.0.mlp.weights_in.{kind}"
        weights[name] = torch.cat(weights[name].chunk(2)[::-1])
    save_file(weights, tmp_path / "x.safetensors")
    swapped, right = (load_backbone(path)[0] for path in (tmp_path / "x.safetensors", files["gated"][0]))
    assert (tokens_of(swapped) - tokens_of(right)).abs().max() > 1e-3
