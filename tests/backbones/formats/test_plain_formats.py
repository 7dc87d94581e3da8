"""Families whose ViT has timm's names: every kind of file gives the published features and preprocessing."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backbones.convert import convert
from backbones.load import load_backbone
from backbones.reading.safe import read_file
from backbones.reading.unwrap import SeveralSets
from backbones.translating.grids import MissingGrid
from backbones.translating.translation import has_moco_pos_embed
from mae_bench.errors import UserError
from mae_bench.models.cost import backbone_gmacs
from tests.backbones.formats import (
    toys_crossmae,
    toys_deit,
    toys_deit3,
    toys_dino,
    toys_ibot,
    toys_ijepa,
    toys_lightly,
    toys_maskfeat,
    toys_moco_v3,
    toys_official_mae,
    toys_solo_learn,
)
from tests.backbones.formats.plain_vit import REAL, encoder_shapes, linear, published_vit, sincos
from tests.backbones.formats.reference import Shapes, check_real_size, fill, prefixed
from tests.parity import assert_parity, assert_within_rounding, weights_in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")

Weights = dict[str, torch.Tensor]
SCALES = ("gamma_1", "gamma_2")
FAMILIES = (
    "crossmae",
    "dino",
    "ibot",
    "moco_v3",
    "deit",
    "deit3",
    "ijepa",
    "maskfeat",
    "lightly",
    "solo_learn",
    "official_mae",
)


def maskfeat(name: str) -> Weights:
    """Rename to the equations' names: the head's norm is the final one, a norm after pooling is left out."""
    weights = toys_maskfeat.weights(name)
    if name == "fine":
        return {key: tensor for key, tensor in weights.items() if not key.startswith("norm.")}
    return {key.replace("pred_head.transforms.0.0", "norm"): tensor for key, tensor in weights.items()}


def scaled() -> Weights:
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
        for name, t in toys_lightly.weights(scales=True).items()
    }


def of(name: str) -> Callable[[], Weights]:
    return lambda: toys_official_mae.models()[name]


# format, toy, the ViT's weights by the names of the equations, heads, pretrain_method, global_pool
CASES: list[tuple[str, str, Callable[[], Weights], int, str, str]] = [
    ("dino", "teacher", lambda: toys_dino.weights(0), 3, "dino", "token"),
    ("dino", "student", lambda: toys_dino.weights(1), 3, "dino", "token"),
    ("dino", "only-teacher", lambda: toys_dino.weights(0), 3, "dino", "token"),
    ("dino", "published", lambda: toys_dino.weights(0), 3, "dino", "token"),
    ("ibot", "teacher", lambda: toys_ibot.weights(0), 3, "ibot", "token"),
    ("ibot", "student", lambda: toys_ibot.weights(1), 3, "ibot", "token"),
    ("ibot", "extracted-teacher", lambda: toys_ibot.weights(0), 3, "ibot", "token"),
    ("ibot", "extracted-student", lambda: toys_ibot.weights(1), 3, "ibot", "token"),
    ("ibot", "layer-scale", lambda: fill(encoder_shapes(scales=SCALES)), 3, "ibot", "token"),
    ("crossmae", "checkpoint-7", toys_crossmae.weights, 3, "crossmae", "token"),
    ("crossmae", "released", toys_crossmae.weights, 3, "crossmae", "token"),
    ("moco_v3", "base", lambda: toys_moco_v3.weights(0), 12, "moco_v3", "token"),
    ("moco_v3", "momentum", lambda: toys_moco_v3.weights(1), 12, "moco_v3", "token"),
    ("moco_v3", "probe", lambda: toys_moco_v3.weights(0), 12, "moco_v3", "token"),
    ("moco_v3", "for-deit", lambda: toys_moco_v3.weights(0), 12, "moco_v3", "token"),
    ("deit", "published", lambda: toys_deit.weights(0), 3, "supervised", "token"),
    ("deit", "distilled", lambda: toys_deit.weights(distilled=True), 3, "supervised, distilled", "token"),
    ("deit", "training", lambda: toys_deit.weights(1), 3, "supervised", "token"),
    ("deit", "ema", lambda: toys_deit.weights(0), 3, "supervised", "token"),
    (
        "deit3",
        "published",
        lambda: fill(toys_deit3.shapes() | linear("head", 192, 10)),
        3,
        "supervised",
        "token",
    ),
    (
        "deit3",
        "unscaled",
        lambda: fill(toys_deit3.shapes(scales=False) | linear("head", 192, 10)),
        3,
        "supervised",
        "token",
    ),
    ("ijepa", "target", lambda: toys_ijepa.weights(0), 3, "ijepa", "avg"),
    ("ijepa", "context", lambda: toys_ijepa.weights(1), 3, "ijepa", "avg"),
    ("ijepa", "only-target", lambda: toys_ijepa.weights(0), 3, "ijepa", "avg"),
    ("maskfeat", "pretrained", lambda: maskfeat("pretrained"), 3, "maskfeat", "avg"),
    ("maskfeat", "fine", lambda: maskfeat("fine"), 3, "maskfeat, fine-tuned", "avg"),
    ("maskfeat", "class-token", lambda: maskfeat("class-token"), 3, "maskfeat, fine-tuned", "token"),
    (
        "lightly",
        "mae",
        lambda: {k.removeprefix("backbone.vit."): t for k, t in toys_lightly.mae().items()},
        3,
        "mae",
        "token",
    ),
    ("lightly", "teacher", lambda: toys_lightly.weights(0), 3, "dino", "token"),
    ("lightly", "student", lambda: toys_lightly.weights(1), 3, "dino", "token"),
    ("lightly", "layer-scale", scaled, 3, "unknown", "token"),
    ("lightly", "train", lambda: toys_lightly.weights(0), 3, "dino", "token"),
    ("lightly", "embedding-model", lambda: toys_lightly.weights(0), 3, "unknown", "token"),
    ("solo_learn", "mae", lambda: toys_solo_learn.weights("mae"), 12, "mae", "token"),
    ("solo_learn", "mocov3", lambda: toys_solo_learn.weights("mocov3"), 12, "moco_v3", "token"),
    ("solo_learn", "dino", lambda: toys_solo_learn.weights("dino", 1), 3, "dino", "token"),
    ("solo_learn", "first-version", lambda: toys_solo_learn.weights("simclr"), 3, "unknown", "token"),
    ("official_mae", "encoder", of("encoder"), 3, "mae", "token"),
    ("official_mae", "full", of("full"), 3, "mae", "token"),
    ("official_mae", "fine", of("fine"), 3, "mae, fine-tuned", "avg"),
    ("official_mae", "fine-cls", of("fine-cls"), 3, "mae, fine-tuned", "token"),
    ("official_mae", "probe", of("probe"), 3, "mae", "token"),
    ("official_mae", "checkpoint-7", of("full"), 3, "mae", "token"),
    ("official_mae", "checkpoint-cls", of("fine-cls"), 3, "mae, fine-tuned", "token"),
    ("official_mae", "ddp", of("full"), 3, "mae", "token"),
    ("official_mae", "ema", of("fine"), 3, "mae, fine-tuned", "avg"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, dict[str, Any]]:
    modules = {name: import_module(f"tests.backbones.formats.toys_{name}") for name in FAMILIES}
    return {name: module.write(tmp_path_factory.mktemp(name)) for name, module in modules.items()}


@pytest.fixture
def imgs() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)).double()


def test_every_toy_has_a_case(written):
    assert {(format, name) for format, files in written.items() for name in files} == {
        case[:2] for case in CASES
    }


@pytest.mark.parametrize(("format", "name", "weights", "heads", "method", "pool"), CASES)
@torch.no_grad()
def test_features_are_those_of_the_published_equations(
    written, imgs, format, name, weights, heads, method, pool
):
    path, options = written[format][name]
    model, spec, report = load_backbone(path, **options)
    expected = published_vit(weights(), imgs, heads)
    assert_parity(model.double().eval().forward_features(imgs), expected)
    assert (report.format, spec.num_heads, spec.pretrain_method, spec.global_pool) == (
        format,
        heads,
        method,
        pool,
    )
    assert (spec.arch, spec.norm_eps, spec.img_size, spec.patch_size) == ("vit", 1e-6, (32, 32), (8, 8))
    assert backbone_gmacs(spec) > 0


@pytest.mark.parametrize(
    ("format", "name", "interpolation", "pos_resample"),
    [
        ("dino", "teacher", "bicubic", "bicubic_offset"),
        ("ibot", "teacher", "bicubic", "bicubic_offset"),
        ("crossmae", "released", "bicubic", "bicubic"),
        ("moco_v3", "base", "bilinear", "bicubic"),
        ("deit", "distilled", "bicubic", "bicubic"),
        ("deit3", "published", "bicubic", "bicubic"),
        ("ijepa", "target", "bilinear", "bicubic"),
        ("maskfeat", "pretrained", "bicubic", "bilinear"),
        ("lightly", "mae", "bilinear", "bicubic_antialias"),
        ("solo_learn", "mae", "bilinear", "bicubic"),
        ("official_mae", "full", "bicubic", "bicubic"),
    ],
)
def test_images_are_fed_as_the_authors_feed_them(written, format, name, interpolation, pos_resample):
    path, options = written[format][name]
    _, spec, _ = load_backbone(path, **options)
    assert (spec.interpolation, spec.pos_resample) == (interpolation, pos_resample)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def sized(size: str, **kinds: Any) -> Shapes:
    width, depth, _, patch = REAL[size]
    return encoder_shapes(width, depth, 224, patch, **kinds)


LAST = {"head.last_layer.weight_g": (65536, 1), "head.last_layer.weight_v": (65536, 256)}


@pytest.mark.parametrize(
    ("format", "content", "facts"),
    [
        *(
            (f, {**prefixed("backbone.", sized(s)), **last}, {"num_heads": h})
            for s, h in (("S", 6), ("B", 12))
            for f, last in (("dino", LAST), ("ibot", LAST | {"head.last_layer2.weight_v": (8192, 256)}))
        ),
        ("ibot", {"state_dict": sized("L") | {"masked_embed": (1, 1024)}}, {"num_heads": 16, "depth": 24}),
        *(
            ("moco_v3", {"state_dict": prefixed("module.base_encoder.", sized(s))}, {"num_heads": h})
            for s, h in (("S", 12), ("B", 12), ("L", 16), ("H", 16))
        ),
        *(
            (
                "deit",
                {"model": sized(s, tokens=("cls_token", "dist_token"))},
                {"num_heads": h, "num_prefix_tokens": 2},
            )
            for s, h in (("S", 6), ("B", 12))
        ),
        *(
            (
                "deit3",
                {"model": sized(s, rows=0, scales=("gamma_1", "gamma_2"))},
                {"num_heads": h, "img_size": (224, 224)},
            )
            for s, h in (("S", 6), ("B", 12), ("L", 16), ("H", 16))
        ),
        ("deit3", {"model": toys_deit3.shapes(512, 12, 224, 16)}, {"num_heads": 8, "num_prefix_tokens": 1}),
        (
            "ijepa",
            {"target_encoder": prefixed("module.", sized("H", tokens=())), "predictor": {}},
            {"num_heads": 16},
        ),
        (
            "ijepa",
            {"target_encoder": encoder_shapes(1408, 40, 224, 16, tokens=(), hidden=6144), "predictor": {}},
            {"num_heads": 16, "depth": 40, "num_prefix_tokens": 0},
        ),
        (
            "maskfeat",
            {"model_state": toys_maskfeat.pretrained_shapes(768, 12, 224, 16)},
            {"num_heads": 12, "global_pool": "avg"},
        ),
        (
            "maskfeat",
            {"model_state": toys_maskfeat.pretrained_shapes(1024, 24, 224, 16)},
            {"num_heads": 16, "depth": 24},
        ),
        *(
            ("lightly", {"state_dict": prefixed("backbone.vit.", sized(s))}, {"num_heads": h})
            for s, h in (("S", 6), ("B", 12), ("L", 16))
        ),
        *(
            (
                "solo_learn",
                {"state_dict": {**prefixed("backbone.", sized(s)), "classifier.weight": (1000, 768)}},
                {"num_heads": h},
            )
            for s, h in (("S", 6), ("B", 12), ("L", 16))
        ),
    ],
)
def test_published_sizes_find_their_places(format, content, facts):
    spec = check_real_size(format, content)
    assert {name: getattr(spec, name) for name in facts} == facts
    assert spec.img_size == (224, 224)


@pytest.mark.parametrize(("size", "heads"), [("S", 6), ("B", 12)])
def test_deits_published_sizes_when_the_user_says_that_they_are_deits(size, heads):
    spec = check_real_size("deit", {"model": sized(size) | linear("head", REAL[size][0], 1000)}, said=True)
    assert (spec.num_heads, spec.img_size, spec.num_prefix_tokens) == (heads, (224, 224), 1)


@pytest.mark.parametrize(
    ("format", "name", "labels"),
    [
        ("dino", "teacher", {"student.module.backbone", "teacher.backbone"}),
        ("moco_v3", "base", {"state_dict.module.base_encoder", "state_dict.module.momentum_encoder"}),
        ("ijepa", "target", {"encoder.module", "target_encoder.module"}),
        ("deit", "ema", {"model", "model_ema"}),
        ("lightly", "teacher", {"state_dict.backbone.vit", "state_dict.student_backbone.vit"}),
        ("solo_learn", "dino", {"state_dict.backbone", "state_dict.momentum_backbone"}),
    ],
)
def test_which_of_several_sets_is_asked(written, format, name, labels):
    path, _ = written[format][name]
    with pytest.raises(SeveralSets, match="--weights") as error:
        load_backbone(path)
    assert set(error.value.labels) == labels


def test_deits_published_file_and_a_fine_tuned_mae_are_told_apart_by_the_user(written):
    for path in (written["deit"]["published"][0], written["official_mae"]["fine-cls"][0]):
        with pytest.raises(UserError, match="official_mae and deit"):
            load_backbone(path)


def test_published_files_without_a_mark_are_read_as_timms_own_layout(written):
    for path in (written["dino"]["published"][0], written["ibot"]["extracted-teacher"][0]):
        _, spec, report = load_backbone(path)
        assert (report.format, spec.pretrain_method) == ("timm", "unknown")


@torch.no_grad()
def test_maskfeats_last_norm_is_behind_the_pooling_once_it_is_fine_tuned(written, imgs):
    model, _, _ = load_backbone(written["maskfeat"]["fine"][0])
    tokens = published_vit(maskfeat("fine"), imgs, 3)[:, 1:].mean(dim=1)
    weights = weights_in_float64(toys_maskfeat.weights("fine"))
    expected = F.layer_norm(tokens, (192,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    pooled = model.double().eval().forward_head(model.forward_features(imgs), pre_logits=True)
    assert_parity(pooled, expected)


def test_lightly_train_says_how_images_were_normalised(written):
    path, options = written["lightly"]["train"]
    _, spec, _ = load_backbone(path, **options)
    assert (spec.mean, spec.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


@torch.no_grad()
def test_a_square_table_of_deit3_may_be_an_oblong_one_with_a_row_for_the_class_token(tmp_path, imgs):
    """25 rows: the grid is asked for, the report states how they are read, and the user may override."""
    weights = fill(encoder_shapes(rows=0, scales=("gamma_1", "gamma_2")) | {"pos_embed": (1, 25, 192)})
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(MissingGrid, match="5 x 5, 1 x 25, 25 x 1"):
        load_backbone(tmp_path / "x.pth")
    _, _, report = load_backbone(tmp_path / "x.pth", overrides={"img_size": 40})
    assert "its 25 positions are read as those of patches alone" in report.notes
    with pytest.raises(
        UserError, match=r"\(32, 48\) where the shapes say \(40, 40\) or(.|\n)*options.no_embed_class=false"
    ):
        load_backbone(tmp_path / "x.pth", overrides={"img_size": (32, 48)})
    told = {"img_size": (32, 48), "options": {"no_embed_class": False}}
    model, _, _ = load_backbone(tmp_path / "x.pth", overrides=told)
    oblong = torch.cat([imgs, imgs[..., :16]], dim=3)
    assert_parity(model.double().eval().forward_features(oblong), published_vit(weights, oblong, 3))


@pytest.mark.parametrize("to", ["timm.safetensors", "official_mae.pth"])
def test_what_was_converted_says_where_it_came_from(tmp_path, written, to):
    """A fixed table marks MoCo v3's own files, not those that we write: their spec says more."""
    source = written["moco_v3"]["for-deit"][0]
    convert(source, tmp_path / to, to.split(".")[0])
    _, spec, report = load_backbone(tmp_path / to)
    assert (report.format, spec) == (to.split(".")[0], load_backbone(source)[1])


def test_maskfeats_table_is_resized_as_that_of_a_film_of_one_frame(written):
    model, _, _ = load_backbone(written["maskfeat"]["pretrained"][0], img_size=(48, 32))
    table = toys_maskfeat.weights("pretrained")["pos_embed"]
    film = table[:, 1:].double().reshape(1, 1, 4, 4, 192).permute(0, 4, 1, 2, 3)
    expected = F.interpolate(film, size=(1, 6, 4), mode="trilinear").flatten(2).transpose(1, 2)
    found = model.state_dict()["pos_embed"]
    assert_within_rounding(
        found, torch.cat([table[:, :1], expected], dim=1), roundings=8
    )  # two neighbours an axis


def test_moco_v3s_table_is_no_other():
    table = toys_moco_v3.weights()["pos_embed"]
    assert has_moco_pos_embed({"pos_embed": table})
    assert has_moco_pos_embed({"pos_embed": table.half()})
    assert not has_moco_pos_embed({"pos_embed": sincos(192, 4, down_first=False, class_row=True)})
    assert not has_moco_pos_embed({"pos_embed": torch.randn(1, 17, 192)})
    assert not has_moco_pos_embed({"pos_embed": sincos(192, 4, down_first=True, class_row=False)})
    assert not has_moco_pos_embed({})


@pytest.mark.parametrize("format", FAMILIES)
def test_a_missing_or_surplus_tensor_is_refused(tmp_path, format):
    weights = fill(
        encoder_shapes(
            tokens=() if format == "ijepa" else ("cls_token",), rows=0 if format == "deit3" else None
        )
    )
    lost = {name: tensor for name, tensor in weights.items() if name != "blocks.1.mlp.fc1.bias"}
    for name, content, told in (
        ("lost", lost, "missing: blocks.1.mlp.fc1.bias"),
        ("more", {**weights, "blocks.0.mystery": torch.zeros(3)}, "unexpected"),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=told):
            load_backbone(tmp_path / f"{name}.pth", format=format)
    torch.save(weights, tmp_path / "whole.pth")
    assert load_backbone(tmp_path / "whole.pth", format=format)[2].format == format


@pytest.mark.parametrize("format", FAMILIES)
@pytest.mark.parametrize("shape", [(), (1, 0, 192), (17, 192)])
def test_absurd_tensors_are_refused_with_a_sentence(tmp_path, written, format, shape):
    path, options = next(iter(written[format].values()))
    content = read_file(path).content
    for key in ("pos_embed", "patch_embed.proj.weight"):
        broken = spoil(content, key, torch.zeros(shape))
        torch.save(broken, tmp_path / "x.pth")
        with pytest.raises(UserError):
            load_backbone(tmp_path / "x.pth", **{**options, "format": format})
    with pytest.raises(UserError):
        load_backbone(tmp_path / "x.pth", weights=options.get("weights"))


def spoil(content: Any, key: str, tensor: torch.Tensor) -> Any:
    """A copy in which every tensor of that name, whatever its prefix, is another."""
    if not isinstance(content, dict):
        return content
    return {
        name: tensor if str(name).endswith(key) else spoil(value, key, tensor)
        for name, value in content.items()
    }
