"""dinov3: features are those of transformers' DINOv3ViTModel with the same weights, at any image size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backbones.adapters.features import FeatureMaps
from backbones.load import load_backbone
from mae_bench.errors import UserError
from mae_bench.models.cost import backbone_gmacs, num_params
from mae_bench.models.vit import build_vit
from tasks.imagenet.classify import Classifier
from tests.backbones.formats import toys_dinov3
from tests.backbones.formats.reference import check_real_size
from tests.backbones.formats.test_dinov2 import auto_model
from tests.backbones.formats.toys_dinov2 import number
from tests.backbones.formats.toys_dinov3 import filled, periods, shapes, toys
from tests.parity import FLOAT32_TABLES, assert_parity, in_float64

HUB = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
}
PLAIN = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
GATED = {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}
HUB_BLOCK = (
    {
        "norm1": "norm1",
        "attn.proj": "attention.o_proj",
        "ls1": "layer_scale1",
        "norm2": "norm2",
        "ls2": "layer_scale2",
    }
    | PLAIN
    | GATED
)
SIZES = [(64, 64), (48, 80), (160, 32)]


def for_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of transformers' files; a masked bias of the key is left out."""
    width = weights["cls_token"].shape[-1]
    result = {
        "embeddings.mask_token": weights["mask_token"][None],
        "embeddings.register_tokens": torch.zeros(1, 0, width),
    }
    result |= {HUB[name]: tensor for name, tensor in weights.items() if name in HUB}
    masked = any(name.endswith("bias_mask") for name in weights)
    for name, tensor in weights.items():
        if not name.startswith("blocks.") or name.endswith("bias_mask"):
            continue
        inside, _, kind = name.split(".", 2)[2].rpartition(".")
        place = f"layer.{number(name)}."
        if inside == "attn.qkv":
            parts = dict(zip("qkv", tensor.chunk(3), strict=True))
            if masked and kind == "bias":
                del parts["k"]
            result |= {
                f"{place}attention.{part}_proj.{kind}": value.contiguous() for part, value in parts.items()
            }
        else:
            result[f"{place}{HUB_BLOCK[inside]}.{'lambda1' if kind == 'gamma' else kind}"] = tensor
    return result


def transformers_model(weights: dict[str, torch.Tensor], folder: Path, heads: int) -> Any:
    """transformers' model of them."""
    theirs = for_transformers(weights)
    gated = "layer.0.mlp.gate_proj.weight" in theirs
    config = {
        "model_type": "dinov3_vit",
        "hidden_size": weights["cls_token"].shape[-1],
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": theirs["layer.0.mlp.up_proj.bias"].shape[0],
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        **{
            f"{name}_bias": f"layer.0.attention.{name[0]}_proj.bias" in theirs
            for name in ("query", "key", "value")
        },
        "num_register_tokens": theirs["embeddings.register_tokens"].shape[1],
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    return auto_model(folder)


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5)).double()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_dinov3.write(tmp_path_factory.mktemp("dinov3"))


@pytest.mark.parametrize("name", [*toys(), "teacher"])
def test_features_are_transformers_at_every_size(files, tmp_path, name):
    path, options = files[name]
    model, spec, report = load_backbone(path, dynamic_img_size=True, **options)
    heads = 2 if name == "7b" else 3
    theirs = transformers_model(toys()["own" if name == "teacher" else name], tmp_path / "hf", heads)
    with torch.no_grad():
        for size in SIZES:
            expected = in_float64(theirs)(pixel_values=images(*size)).last_hidden_state
            assert_parity(
                model.double().eval().forward_features(images(*size)), expected, rtol=FLOAT32_TABLES
            )
    assert (report.format, spec.arch, spec.num_heads, spec.pos_embed) == ("dinov3", "eva", heads, "rope")
    assert (spec.norm_eps, spec.global_pool, spec.pretrain_method, spec.interpolation) == (
        1e-5,
        "token",
        "dinov3",
        "bicubic",
    )
    assert spec.img_size == ((64, 64) if options else (224, 224))


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_features_at_the_one_size_of_a_fixed_model(files, tmp_path, size):
    model, spec, _ = load_backbone(files["plus"][0], overrides={"img_size": list(size)})
    theirs = transformers_model(toys()["plus"], tmp_path / "hf", 3)
    with torch.no_grad():
        expected = in_float64(theirs)(pixel_values=images(*size)).last_hidden_state
        assert_parity(model.double().eval().forward_features(images(*size)), expected, rtol=FLOAT32_TABLES)
    assert spec.grid_size == (size[0] // 16, size[1] // 16)


def test_feature_maps_are_transformers_hidden_states(files, tmp_path):
    model, spec, _ = load_backbone(files["small"][0], dynamic_img_size=True)
    theirs = transformers_model(toys()["small"], tmp_path / "hf", 3)
    with torch.no_grad():
        found = FeatureMaps(in_float64(model), spec, [0, 1])(images(48, 80))
        expected = in_float64(theirs)(pixel_values=images(48, 80), output_hidden_states=True).hidden_states[
            1:3
        ]
    for ours, hidden in zip(found, expected, strict=True):
        assert_parity(ours, hidden[:, 5:].mT.unflatten(2, (3, 5)), rtol=FLOAT32_TABLES)


def test_a_masked_bias_of_the_key_does_nothing_and_an_unmasked_one_does(files, tmp_path):
    def tokens(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.save(weights, tmp_path / "x.pth")
        with torch.no_grad():
            return (
                load_backbone(tmp_path / "x.pth", overrides={"img_size": [64, 64]})[0]
                .eval()
                .forward_features(images(64, 64).float())
            )

    for name, same in (("small", True), ("own", False)):
        weights = toys()[name]
        before = tokens(weights)
        weights["blocks.0.attn.qkv.bias"][192:384] += 3
        assert torch.equal(before, tokens(weights)) == same, name


def test_the_account(files):
    _, spec, report = load_backbone(files["satellite"][0])
    assert report.renamed["blocks.1.attn.qkv.bias"] == "blocks.1.attn.q_bias"
    assert set(report.new) == {"blocks.0.attn.v_bias", "blocks.1.attn.v_bias"}
    assert "local crops" in report.dropped["local_cls_norm.weight"]
    assert any("0.430 0.411 0.296" in note for note in report.notes)
    assert not any("rounded" in note for note in report.notes)
    assert spec.options["qkv_bias"] is True
    assert "attn_type" not in spec.options
    teacher = load_backbone(files["teacher"][0], **files["teacher"][1])
    assert "projection head" in teacher[2].dropped["dino_head.mlp.0.bias"]
    assert any("rounded" in note for note in teacher[2].notes)
    assert teacher[1].num_prefix_tokens == 1


@pytest.mark.parametrize(
    ("width", "depth", "hidden", "heads", "gated", "local_norm"),
    [
        (384, 12, 1536, 6, False, False),
        (384, 12, 1536, 6, True, False),
        (768, 12, 3072, 12, False, False),  # S, S+, B
        (1024, 24, 4096, 16, False, True),
        (1280, 32, 5120, 20, True, False),  # L of SAT-493M, H+
        (4096, 40, 8192, 32, True, True),  # 7B
    ],
)
def test_published_sizes(width, depth, hidden, heads, gated, local_norm):
    weights = shapes(width, depth, hidden, gated=gated, qkv_bias=heads < 32, local_norm=local_norm)
    for extra in ({"rope_embed.periods": periods(width // heads)}, {}):
        spec = check_real_size("dinov3", weights | extra)
        assert (spec.embed_dim, spec.depth, spec.num_heads, spec.num_prefix_tokens) == (
            width,
            depth,
            heads,
            5,
        )
        assert (spec.img_size, spec.patch_size, spec.mlp_ratio) == ((224, 224), (16, 16), hidden / width)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blocks.0.mystery": torch.zeros(3)}, "unexpected: blocks.0.mystery"),
        ({"blocks.1.ls2.gamma": None}, "missing: blocks.1.gamma_2"),
        ({"blocks.1.attn.qkv.bias": None}, "missing: blocks.1.attn.q_bias"),
        (
            {"cls_norm.weight": torch.ones(192), "cls_norm.bias": torch.zeros(192)},
            "untie_cls_and_patch_norms",
        ),
        ({"rope_embed.periods": 10000.0 ** (torch.arange(16) / 16)}, "those of base 100"),
        ({"rope_embed.periods": periods(64)[:15]}, "divisor of"),
        ({"rope_embed.periods": torch.zeros(0)}, "divisor of"),
        ({"rope_embed.periods": torch.tensor(1.0)}, "divisor of"),
        ({"rope_embed.periods": torch.full((16,), float("nan"))}, "those of base 100"),
        ({"blocks.0.attn.qkv.bias_mask": torch.ones(576)}, "leaves a bias of the key"),
        ({"blocks.0.attn.qkv.bias_mask": torch.full((576,), float("nan"))}, "leaves a bias of the key"),
        ({"blocks.0.attn.qkv.bias_mask": torch.tensor(1.0)}, "with a mask"),
        ({"storage_tokens": torch.tensor(1.0)}, "cannot be read"),
        ({"patch_embed.proj.weight": torch.tensor(1.0)}, "patch embedding|divisor"),
    ],
)
def test_whatever_does_not_fit_is_refused(tmp_path, change, told):
    weights = {name: tensor for name, tensor in (toys()["small"] | change).items() if tensor is not None}
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pth")


def test_cost_and_classifier(files):
    path, options = files["plus"]
    model, spec, _ = load_backbone(path, **options)
    weights = {
        name: tensor
        for name, tensor in toys()["plus"].items()
        if "mask" not in name and "periods" not in name
    }
    assert (
        num_params(model) == sum(tensor.numel() for tensor in weights.values()) - 2 * 192
    )  # of which the key's biases are not
    for img_size, patches in ((None, 16), ((48, 80), 15)):
        tokens = patches + 5
        block = tokens * (4 * 192 * 192 + 3 * 192 * 488) + 2 * tokens * tokens * 192
        assert backbone_gmacs(spec, img_size) == pytest.approx(
            (patches * 16 * 16 * 3 * 192 + 2 * block) / 1e9
        )
    with torch.device("meta"):
        assert build_vit(spec)(torch.empty(1, 3, 64, 64)).shape == (1, 192)
    assert Classifier(model, spec, 7, spec.global_pool, fc_norm=False)(torch.zeros(2, 3, 64, 64)).shape == (
        2,
        7,
    )


def test_odd_widths_keep_their_hidden_layer(tmp_path):
    """488 / 224 * 224 is a little less than 488 in floating point, and timm cuts it off."""
    torch.save(filled(56, width=224, hidden=488), tmp_path / "x.pth")
    model, spec, _ = load_backbone(tmp_path / "x.pth")
    block: Any = model.blocks[0]
    assert (block.mlp.fc1.out_features, spec.num_heads) == (488, 4)
