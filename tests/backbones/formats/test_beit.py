"""BEiT's layout (beit, beitv2, data2vec, simmim): features equal the published equations and transformers'.

Families are detected by their marks; a file without marks needs a format.
"""

from typing import Any

import pytest
import torch
from transformers import BeitConfig, BeitModel, Data2VecVisionConfig, Data2VecVisionModel

from backbones.load import load_backbone
from backbones.translating.detect import FORMATS
from mae_bench.errors import UserError
from mae_bench.models.cost import backbone_gmacs, num_params
from tasks.imagenet.classify import Classifier
from tests.backbones.formats import toys_beit, toys_beitv2, toys_data2vec, toys_simmim
from tests.backbones.formats.beit_layout import TABLE, encoder_shapes, published_beit, weights
from tests.backbones.formats.reference import check_real_size, pair
from tests.parity import assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")

TOYS: dict[str, Any] = {
    "beit": toys_beit,
    "beitv2": toys_beitv2,
    "data2vec": toys_data2vec,
    "simmim": toys_simmim,
}
CASES = [(family, name) for family, toys in TOYS.items() for name in toys.FILES]
IMAGENET, HALF = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {family: toys.write(tmp_path_factory.mktemp(family)) for family, toys in TOYS.items()}


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)).double()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_features_are_the_published_ones(files, imgs, family, name):
    path, options = files[family][name]
    model, spec, report = load_backbone(path, **options)
    with torch.no_grad():
        tokens = model.double().eval().forward_features(imgs)
        expected = published_beit(TOYS[family].FILES[name], imgs)
        if (
            "fc_norm.weight" in TOYS[family].FILES[name]
        ):  # as they come out of the blocks they are tens of times as large
            tokens, expected = model.fc_norm(tokens), model.fc_norm(expected)
    assert_parity(tokens, expected)
    assert (report.format, spec.arch) == (family, "beit")
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.img_size, spec.patch_size) == (
        192,
        2,
        3,
        (32, 32),
        (8, 8),
    )
    assert (spec.norm_eps, spec.num_prefix_tokens, spec.interpolation) == (1e-6, 1, "bicubic")
    assert spec.pretrain_method == family + (", fine-tuned" if name.startswith("fine") else "")
    assert spec.global_pool == ("token" if name == "fine-cls" else "avg")
    assert all("relative_position_index" not in ours for ours in report.renamed.values())


def test_pixels_are_fed_as_each_family_says(files):
    means = {
        (family, name): load_backbone(path, **options)[1].mean
        for family, toys in files.items()
        for name, (path, options) in toys.items()
    }
    assert (
        means["beit", "pretrained"] == means["beit", "fine"] == HALF
    )  # no arguments in the file: its family's
    assert means["beit", "pretrained-1k"] == IMAGENET  # by the arguments in the file
    assert means["beit", "fine-cls"] == HALF
    assert {mean for (family, _), mean in means.items() if family != "beit"} == {IMAGENET}


def hub_names(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names in memory (5.x) for the official ones: a mapping of the test's own."""
    top = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    top |= {f"rel_pos_bias.{TABLE}": f"shared_position_bias.{TABLE}"}
    top |= {
        f"patch_embed.proj.{kind}": f"embeddings.patch_embeddings.projection.{kind}"
        for kind in ("weight", "bias")
    }
    top |= {f"norm.{kind}": f"layernorm.{kind}" for kind in ("weight", "bias")}
    top |= {f"fc_norm.{kind}": f"pooler.layernorm.{kind}" for kind in ("weight", "bias")}
    inside = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    inside |= {"gamma_1": "lambda_1", "gamma_2": "lambda_2", "attn.q_bias": "attention.q_proj.bias"}
    inside |= {"attn.v_bias": "attention.v_proj.bias", f"attn.{TABLE}": f"relative_position_bias.{TABLE}"}
    result = {theirs: ours[name] for name, theirs in top.items() if name in ours}
    for name, tensor in ours.items():
        if not name.startswith("blocks.") or name.endswith("relative_position_index"):
            continue
        _, number, rest = name.split(".", 2)
        if rest == "attn.qkv.weight":
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                result[f"layers.{number}.attention.{part}_proj.weight"] = value
            continue
        module, _, kind = rest.rpartition(".")
        theirs = inside[rest] if rest in inside else f"{inside.get(module, module)}.{kind}"
        result[f"layers.{number}.{theirs}"] = tensor
    return result


@pytest.mark.parametrize("name", ["pretrained", "pretrained-1k", "fine"])
def test_features_are_those_of_transformers_beit(files, imgs, name):
    ours = toys_beit.FILES[name]
    config = BeitConfig(
        **SIZES,
        layer_norm_eps=1e-6,
        use_mean_pooling="fc_norm.weight" in ours,
        use_absolute_position_embeddings="pos_embed" in ours,
        use_relative_position_bias=name == "fine",
        use_shared_relative_position_bias=name == "pretrained",
        layer_scale_init_value=0.1 if "blocks.0.gamma_1" in ours else 0.0,
    )
    theirs = BeitModel(config).eval()
    theirs.load_state_dict(hub_names(ours))
    path, options = files["beit"][name]
    model = in_float64(load_backbone(path, **options)[0])
    with torch.no_grad():
        expected, tokens = in_float64(theirs)(imgs), model.forward_features(imgs)
        assert_parity(tokens, expected.last_hidden_state)
        if name == "fine":  # the norm behind the pooling
            pooled = model.forward_head(tokens, pre_logits=True)
            assert_parity(pooled, expected.pooler_output)


def test_features_are_those_of_transformers_data2vec(files, imgs):
    theirs = Data2VecVisionModel(
        Data2VecVisionConfig(
            **SIZES, layer_norm_eps=1e-6, use_mean_pooling=False, use_shared_relative_position_bias=True
        )
    ).eval()
    old = {
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    old |= {f"attention.{part[0]}_proj": f"attention.attention.{part}" for part in ("query", "key", "value")}
    renamed = {}
    for name, tensor in hub_names(toys_data2vec.FILES["student"]).items():
        for new, former in old.items():
            name = name.replace(new, former)
        renamed[
            name.replace("layers.", "encoder.layer.").replace(
                "shared_position_bias", "encoder.relative_position_bias"
            )
        ] = tensor
    theirs.load_state_dict(renamed)
    path, options = files["data2vec"]["student"]
    with torch.no_grad():
        expected = in_float64(theirs)(imgs).last_hidden_state
        assert_parity(in_float64(load_backbone(path, **options)[0]).forward_features(imgs), expected)


def test_a_shared_table_alone_is_no_mark(tmp_path):
    """BEiT, BEiT v2 and data2vec all pretrain with one; data2vec alone fine-tunes with it."""
    torch.save({"model": weights(pair("norm", 192), positions="shared")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="fits beit and beitv2 and data2vec and simmim"):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["fine", "fine-cls"])
def test_a_fine_tuned_file_without_marks_asks_for_its_family(files, name):
    with pytest.raises(UserError, match="fits beit and beitv2 and simmim") as error:
        load_backbone(files["beit"][name][0])
    assert "--format" in str(error.value)


def test_student_and_teacher_are_never_guessed(files):
    with pytest.raises(UserError, match="model, model_ema"):
        load_backbone(files["data2vec"]["student"][0])


@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16), (544, 24, 16)])
def test_real_sizes(width, depth, heads):
    """B, L and BEiT v2's 24 x 544, whose heads its bias table tells."""
    spec = check_real_size("beit", toys_beit.real_size(width, depth, 14, heads))
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.img_size) == (width, depth, heads, (224, 224))
    assert spec.options["use_shared_rel_pos_bias"]


def published(family: str, width: int, depth: int, heads: int) -> dict[str, Any]:
    """A pretraining's file of that family at 224 pixels and patches of 16."""
    shapes = encoder_shapes(width, depth, 14, 16, heads, positions="shared") | pair("norm", width)
    shapes |= {"mask_token": (1, 1, width)}
    if family == "simmim":
        decoder = {"decoder.0.weight": (768, width, 1, 1), "decoder.0.bias": (768,)}
        return {
            "model": {f"encoder.{name}": shape for name, shape in shapes.items()} | decoder,
            "max_accuracy": 0.0,
        }
    if family == "beitv2":  # two layers for the class token, as deep in the model as the first two
        first = ("blocks.0.", "blocks.1.")
        layers = {
            name.replace("blocks", "cls_pt_layers"): shape
            for name, shape in shapes.items()
            if name.startswith(first)
        }
        return {"model": shapes | layers | pair("lm_head", 8192, width)}
    return {"model": shapes | pair("lm_head", width, width)}


@pytest.mark.parametrize(
    ("family", "width", "depth", "heads"),
    [
        ("data2vec", 768, 12, 12),
        ("data2vec", 1024, 24, 16),
        ("beitv2", 768, 12, 12),
        ("beitv2", 1024, 24, 16),
        ("simmim", 768, 12, 12),
    ],
)
def test_published_sizes_of_its_successors(family, width, depth, heads):
    """SimMIM has published a ViT-B alone."""
    spec = check_real_size(family, published(family, width, depth, heads))
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.img_size) == (width, depth, heads, (224, 224))


@pytest.mark.parametrize("family", ["beitv2", "simmim"])
@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16)])
def test_fine_tuned_sizes_of_its_successors(family, width, depth, heads):
    shapes = encoder_shapes(width, depth, 14, 16, heads) | pair("fc_norm", width) | pair("head", 1000, width)
    spec = check_real_size(family, {"model": shapes}, said=True)
    assert (spec.depth, spec.num_heads, spec.global_pool) == (depth, heads, "avg")


def test_a_huge_model_and_larger_images():
    shapes = encoder_shapes(1280, 32, 27, 14, 16, positions="shared")
    shapes |= pair("norm", 1280) | pair("lm_head", 1280, 1280) | {"mask_token": (1, 1, 1280)}
    spec = check_real_size("data2vec", {"model": shapes}, overrides={"img_size": 378})
    assert (spec.img_size, spec.depth) == ((378, 378), 32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("blocks.1.gamma_1"), "missing: blocks.1.gamma_1"),
        (lambda w: w.pop("blocks.1.attn.v_bias"), "missing: blocks.1.attn.v_bias"),
        (lambda w: w.update({"blocks.0.mystery": torch.zeros(3)}), "unexpected: blocks.0.mystery"),
        (
            lambda w: w.update({f"rel_pos_bias.{TABLE}": torch.zeros(51, 3)}),
            r"no grid .*\(51, 3\)",
        ),
        (lambda w: w.update({f"rel_pos_bias.{TABLE}": torch.zeros(())}), r"bias table of shape \(\)"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(())}), None),
        (lambda w: w.update({"patch_embed.proj.weight": torch.zeros(())}), "patch embedding"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, change, told):
    changed = weights(toys_beit.HEADS, positions="shared")
    change(changed)
    torch.save({"model": changed}, tmp_path / "x.pth")
    if told is None:  # a head is left out whatever it is
        assert load_backbone(tmp_path / "x.pth")[2].format == "beit"
        return
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pth")


@pytest.mark.parametrize("family", TOYS)
def test_another_layout_is_refused_when_the_family_is_said(tmp_path, family):
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="layout"):
        load_backbone(tmp_path / "x.pth", format=family)
    assert family in FORMATS


def test_simmims_swin_is_refused(tmp_path):
    swin = {
        "encoder.patch_embed.proj.weight": (96, 3, 4, 4),
        "encoder.layers.0.blocks.0.attn.qkv.weight": (288, 96),
    }
    torch.save({"model": {name: torch.zeros(shape) for name, shape in swin.items()}}, tmp_path / "swin.pth")
    with pytest.raises(UserError, match="Swin"):
        load_backbone(tmp_path / "swin.pth")


@pytest.mark.parametrize("name", ["pretrained", "fine"])
def test_it_goes_on_to_a_classifier(files, imgs, name):
    path, options = files["beit"][name]
    model, spec, _ = load_backbone(path, **options)
    classifier = Classifier(model, spec, 5, "avg", fc_norm=True).eval()
    assert classifier(imgs.float()).shape == (2, 5)
    assert num_params(model) == sum(parameter.numel() for parameter in model.parameters())
    assert backbone_gmacs(spec) > 0
