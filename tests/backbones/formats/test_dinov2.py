"""dinov2: features equal those of transformers' classes, in every layout that the repository saves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from backbones.load import load_backbone
from mae_bench.errors import UserError
from mae_bench.models.cost import backbone_gmacs, num_params
from tasks.imagenet.classify import Classifier
from tests.backbones.formats import toys_dinov2
from tests.backbones.formats.reference import check_real_size, fill, prefixed
from tests.backbones.formats.toys_dinov2 import backbones, number, shapes
from tests.parity import FLOAT32_TABLES, assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")

TEACHERS = {"teacher": "base", "training": "base"}  # files with the backbone of another
HUB = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HUB_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1": "layer_scale1",
    "norm2": "norm2",
    "ls2": "layer_scale2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def for_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of transformers' files."""
    result = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if not name.startswith("blocks."):
            result[HUB[name] if name in HUB else f"{HUB[module]}.{kind}"] = tensor
            continue
        place, inside = f"encoder.layer.{number(name)}.", module.split(".", 2)[2]
        if inside == "attn.qkv":
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"{place}attention.attention.{part}.{kind}"] = value.contiguous()
        else:
            result[f"{place}{HUB_BLOCK[inside]}.{'lambda1' if kind == 'gamma' else kind}"] = tensor
    return result


def transformers_model(weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """transformers' model of them."""
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    gated = any("w12" in name for name in weights)
    config: dict[str, Any] = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 56,
        "patch_size": 14,
        "mlp_ratio": 4,
        "use_swiglu_ffn": gated,
        "layer_norm_eps": 1e-6,
        **({"num_register_tokens": registers} if registers else {}),
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(for_transformers(weights), folder / "model.safetensors", {"format": "pt"})
    return auto_model(folder)


def auto_model(folder: Path) -> Any:
    """transformers' model of a folder, loaded by itself; nothing may be missing, nothing left over."""
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def same_tokens(vit: Any, theirs: Any, *size: int) -> None:
    imgs = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        expected = in_float64(theirs)(pixel_values=imgs).last_hidden_state
        assert_parity(vit.double().eval().forward_features(imgs), expected, rtol=FLOAT32_TABLES)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_dinov2.write(tmp_path_factory.mktemp("dinov2"))


@pytest.mark.parametrize("name", ["base", "registers", "giant", "giant-registers", "teacher", "training"])
def test_features_are_transformers(files, tmp_path, name):
    path, options = files[name]
    model, spec, report = load_backbone(path, **options)
    same_tokens(model, transformers_model(backbones()[TEACHERS.get(name, name)], tmp_path / "hf"), 56, 56)
    assert report.format == "dinov2"
    assert (spec.num_heads, spec.norm_eps, spec.global_pool, spec.pretrain_method) == (
        3,
        1e-6,
        "token",
        "dinov2",
    )
    assert (spec.mean, spec.interpolation) == ((0.485, 0.456, 0.406), "bicubic")


def test_with_registers_the_table_goes_to_another_size_with_antialiasing(files, tmp_path):
    model, spec, _ = load_backbone(files["registers"][0], dynamic_img_size=True)
    same_tokens(model, transformers_model(backbones()["registers"], tmp_path / "hf"), 84, 42)
    assert (spec.pos_resample, spec.num_prefix_tokens) == ("bicubic_antialias", 5)
    assert load_backbone(files["base"][0])[1].pos_resample == "bicubic_offset"


@pytest.mark.parametrize(
    ("name", "width", "depth", "hidden", "heads", "registers"),
    [
        ("S", 384, 12, 1536, 6, 0),
        ("B", 768, 12, 3072, 12, 4),
        ("L", 1024, 24, 4096, 16, 0),
        ("g", 1536, 40, 4096, 24, 4),
    ],
)
def test_published_sizes(name, width, depth, hidden, heads, registers):
    spec = check_real_size("dinov2", shapes(width, depth, hidden, 14, 37, registers, gated=name == "g"))
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.img_size, spec.patch_size) == (
        width,
        depth,
        heads,
        (518, 518),
        (14, 14),
    )
    assert spec.num_prefix_tokens == 1 + registers
    assert spec.options.get("mlp_layer") == ("swiglu_packed" if name == "g" else None)


def test_a_training_is_asked_which_model_is_meant(files):
    path, _ = files["training"]
    with pytest.raises(UserError, match=r"model\.student\.backbone, model\.teacher\.backbone"):
        load_backbone(path)
    student, teacher = (load_backbone(path, weights=which) for which in ("student", "teacher"))
    assert not torch.equal(student[0].state_dict()["cls_token"], teacher[0].state_dict()["cls_token"])
    dropped = teacher[2].dropped
    assert "projection head" in dropped["teacher.dino_head.last_layer.weight_v"]
    assert "masked patches" in dropped["teacher.backbone.mask_token"]
    assert teacher[2].renamed["teacher.backbone.blocks.1.1.norm1.bias"] == "blocks.1.norm1.bias"


def test_a_backbone_under_model_is_no_mae(tmp_path):
    torch.save({"model": prefixed("module.", backbones()["base"])}, tmp_path / "x.pth")
    report = load_backbone(tmp_path / "x.pth")[2]
    assert (report.format, report.renamed["module.norm.bias"]) == ("dinov2", "norm.bias")


def test_half_precision_does_not_round_the_class_token_with_its_row(tmp_path):
    half = {name: tensor.half() for name, tensor in backbones()["registers"].items()}
    torch.save(half, tmp_path / "x.pth")
    found = load_backbone(tmp_path / "x.pth")[0].state_dict()["cls_token"]
    assert torch.equal(found, half["cls_token"].float() + half["pos_embed"][:, :1].float())


def test_without_qkv_bias_and_layer_scale(tmp_path):
    weights = {
        name: tensor
        for name, tensor in backbones()["base"].items()
        if "qkv.bias" not in name and "gamma" not in name
    }
    torch.save(weights, tmp_path / "x.pth")
    model, spec, _ = load_backbone(tmp_path / "x.pth")
    assert spec.options == {"qkv_bias": False}
    weights |= {
        f"blocks.{i}.ls{j}.gamma": torch.ones(192) for i in (0, 1) for j in (1, 2)
    }  # what is not there does nothing
    weights |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(576) for i in (0, 1)}
    same_tokens(model, transformers_model(weights, tmp_path / "hf"), 56, 56)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.update({"blocks.0.mystery": torch.zeros(3)}), "unexpected: blocks.0.mystery"),
        (lambda w: w.pop("blocks.1.ls2.gamma"), r"missing: blocks.1.ls2.gamma"),
        (lambda w: w.update({"blocks.0.1.norm1.bias": torch.zeros(192)}), "are one weight"),
        (lambda w: w.pop("cls_token"), "has registers"),
        (lambda w: w.update({"pos_embed": torch.zeros(17, 192)}), "has registers"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 1, 192)}), "no grid of patches"),
        (lambda w: w.update({"register_tokens": torch.tensor(1.0)}), "has registers"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.tensor(1.0)}), "patch embedding"),
        (
            lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}),
            "cannot be read|fc1|patch_embed",
        ),
    ],
)
def test_whatever_does_not_fit_is_refused(tmp_path, change, told):
    weights = backbones()["registers"]
    change(weights)
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pth")


def test_other_file_forced_into_the_format_is_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(3, 3)}, tmp_path / "x.pth")
    with pytest.raises(UserError):
        load_backbone(tmp_path / "x.pth", format="dinov2")


def test_cost_and_classifier(files):
    model, spec, _ = load_backbone(files["giant-registers"][0])
    weights = backbones()["giant-registers"]
    assert (
        num_params(model) == sum(t.numel() for t in weights.values()) - 2 * 192
    )  # the mask token, the class token's row
    tokens, gated = 16 + 5, 192 * 1024 + 512 * 192
    macs = 16 * 14 * 14 * 3 * 192 + 2 * (tokens * (4 * 192 * 192 + gated) + 2 * tokens * tokens * 192)
    assert backbone_gmacs(spec) == pytest.approx(macs / 1e9)
    logits = Classifier(model, spec, 7, spec.global_pool, fc_norm=False)(torch.zeros(2, 3, 56, 56))
    assert logits.shape == (2, 7)


def test_registers_are_a_mark_without_a_mask_token(tmp_path):
    weights = {name: tensor for name, tensor in fill(shapes(registers=4)).items() if name != "mask_token"}
    torch.save(weights, tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth")[2].format == "dinov2"
