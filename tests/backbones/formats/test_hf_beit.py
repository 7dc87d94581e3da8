"""hf_beit: features equal those of transformers' BEiT and data2vec, from folders and states in memory."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BeitConfig, BeitForImageClassification, BeitModel

from backbones.convert import convert
from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_hf_beit
from tests.backbones.formats.reference import check_real_size, randomise
from tests.backbones.formats.toys_hf_beit import MODELS, build
from tests.parity import assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_hf_beit.write(tmp_path_factory.mktemp("hf_beit"))


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)).double()


def expected_tokens(name: str, imgs: torch.Tensor) -> torch.Tensor:
    """Return the tokens after the final norm, which precedes the head for masked images and mean pooling."""
    model = in_float64(build(name))
    base = model.base_model
    with torch.no_grad():
        tokens = base(imgs).last_hidden_state
        return model.layernorm(tokens) if name == "masked" else tokens


@pytest.mark.parametrize("name", MODELS)
def test_features_are_transformers(files, imgs, name):
    for file in (name, f"{name}-memory"):
        overrides = {"norm_eps": 1e-6} if file != name else None  # a bare state_dict does not say it
        model, spec, report = load_backbone(files[file][0], overrides=overrides)
        with torch.no_grad():
            assert_parity(model.double().eval().forward_features(imgs), expected_tokens(name, imgs))
        says_token = file == name and not build(name).config.use_mean_pooling
        assert (report.format, spec.arch, spec.num_heads) == ("hf_beit", "beit", 3)
        assert spec.global_pool == ("token" if says_token else "avg")
        is_data2vec = name.startswith("data2vec") and not (file != name and name != "data2vec-classifier")
        assert spec.pretrain_method == ("data2vec" if is_data2vec else "beit")
        assert spec.mean == ((0.485, 0.456, 0.406) if is_data2vec else (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["classifier", "data2vec-classifier"])
def test_the_norm_behind_the_pooling_is_kept(files, imgs, name):
    model, _, report = load_backbone(files[name][0])
    with torch.no_grad():
        pooled = model.double().eval().forward_head(model.forward_features(imgs), pre_logits=True)
        assert_parity(pooled, in_float64(build(name)).base_model(imgs).pooler_output)
    assert {"classifier.weight", "classifier.bias"} <= set(report.dropped)


def test_the_norm_outside_of_the_model_is_accounted_for(files):
    report = load_backbone(files["masked"][0])[2]
    assert report.renamed["layernorm.weight"] == "norm.weight"
    twice = load_backbone(files["masked-token"][0])[2]
    assert twice.renamed["beit.layernorm.weight"] == "norm.weight"
    assert "second norm" in twice.dropped["layernorm.weight"]


def test_a_model_without_its_pooler_has_no_final_norm(files, tmp_path, imgs):
    model, spec, report = load_backbone(files["no-pooler"][0])
    assert spec.options["final_norm"] is False
    assert any("without a pooler" in note for note in report.notes)
    with pytest.raises(UserError, match="final norm"):
        convert(files["no-pooler"][0], tmp_path / "out", "hf_beit")


def test_a_norm_that_the_config_states_is_not_left_out(files, tmp_path):
    """Without mean pooling the last norm is in the model itself."""
    folder = files["token"][0]
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("layernorm.")}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"missing: norm\.bias, norm\.weight"):
        load_backbone(tmp_path)


def test_indices_of_older_files_are_left_out(tmp_path):
    place = "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_index"
    weights = build("model").state_dict() | {
        place.format(i): torch.zeros(17, 17, dtype=torch.int64) for i in range(2)
    }
    torch.save(weights, tmp_path / "x.bin")
    assert "follows from the grid" in load_backbone(tmp_path / "x.bin")[2].dropped[place.format(1)]


@pytest.mark.parametrize("name", ["model", "token", "absolute", "classifier", "data2vec"])
def test_what_is_written_is_loaded_by_transformers(files, tmp_path, imgs, name):
    convert(files[name][0], tmp_path / "out", "hf_beit")
    loaded: Any = BeitModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    theirs, info = loaded
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    with torch.no_grad():
        assert_parity(in_float64(theirs)(imgs).last_hidden_state, expected_tokens(name, imgs))
    assert load_backbone(tmp_path / "out")[1] == load_backbone(files[name][0])[1]


@pytest.mark.parametrize(("width", "heads", "depth"), [(768, 12, 12), (1024, 16, 24)])
def test_published_sizes(width, heads, depth):
    """B and L, made hollow by transformers' own class."""
    config = BeitConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        intermediate_size=4 * width,
        use_relative_position_bias=True,
    )
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in BeitForImageClassification(config).state_dict().items()
        }
    spec = check_real_size("hf_beit", shapes, {"config.json": config.to_dict()})
    assert (spec.num_heads, spec.depth, spec.img_size, spec.global_pool) == (heads, depth, (224, 224), "avg")


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": "big"},
        {"image_size": [32]},
        {"layer_norm_eps": "small"},
        {"num_attention_heads": 5},
        {"hidden_act": "relu"},
        {"model_type": "vit"},
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, change):
    build("model").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("layers.1.attention.k_proj.weight"), "query, key and value"),
        (lambda w: w.pop("layers.1.lambda_2"), "missing: blocks.1.gamma_2"),
        (lambda w: w.update({"layers.1.mystery": torch.zeros(3)}), "unexpected: blocks.1.mystery"),
    ],
)
def test_a_missing_and_a_surplus_key_are_refused(tmp_path, change, told):
    weights = dict(build("token").state_dict())
    change(weights)
    torch.save(weights, tmp_path / "x.bin")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.bin")


@pytest.mark.parametrize("mean", [True, False])
def test_the_config_says_what_the_classifier_pools(tmp_path, imgs, mean):
    sizes: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 384,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 5,
    }
    config = BeitConfig(**sizes, num_hidden_layers=2, num_attention_heads=3, use_mean_pooling=mean)
    theirs: Any = randomise(BeitForImageClassification(config))
    theirs.save_pretrained(tmp_path / "hf")
    model, spec, _ = load_backbone(tmp_path / "hf")
    assert spec.global_pool == ("avg" if mean else "token")
    with torch.no_grad():
        theirs, tokens = theirs.double(), model.double().eval().forward_features(imgs)
        pooled = model.forward_head(tokens, pre_logits=True) if mean else tokens[:, 0]
        assert_parity(theirs.classifier(pooled), theirs(imgs).logits)
