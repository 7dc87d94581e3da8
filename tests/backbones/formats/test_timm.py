"""timm: its ViTs are rebuilt from a name or from tensors, give timm's features, and are written back."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from backbones.convert import convert
from backbones.load import check_fit, load_backbone, translate
from backbones.reading.source import Checkpoint
from backbones.translating.structure import infer_global_pool
from backbones.translating.timm_models import find_differences
from mae_bench.errors import UserError
from mae_bench.models.cost import backbone_gmacs, num_params
from mae_bench.models.vit import build_vit
from tests.backbones.formats import toys_timm
from tests.backbones.formats.plain_vit import REAL, encoder_shapes, linear
from tests.backbones.formats.reference import check_real_size, hollow, randomise
from tests.backbones.formats.toys_timm import BARE, FOLDERS, SMALL, build
from tests.parity import FLOAT32_TABLES, assert_parity

pytestmark = pytest.mark.usefixtures("toy_heads")

# One name of timm's registry for each structure, with what of the options makes it so.
STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_large_patch16_224": ("vit", {}),
    "vit_huge_patch14_224": ("vit", {}),
    "vit_base_patch16_224_miil": ("vit", {"qkv_bias": False}),
    "deit3_huge_patch14_224": ("vit", {"no_embed_class": True, "init_values": 1e-5}),
    "vit_large_patch14_dinov2": ("vit", {"init_values": 1e-5}),
    "vit_giant_patch14_reg4_dinov2": (
        "vit",
        {"mlp_layer": "swiglu_packed", "act_layer": "silu", "no_embed_class": True},
    ),
    "vit_base_patch16_clip_224": ("vit", {"pre_norm": True}),
    "vit_large_patch14_clip_quickgelu_224": ("vit", {"pre_norm": True, "act_layer": "quick_gelu"}),
    "vit_base_patch16_siglip_224": ("vit", {}),
    "vit_so400m_patch14_siglip_384": ("vit", {}),  # 27 patches of 14 in 384 pixels
    "vit_so400m_patch16_siglip_384": ("vit", {"act_layer": "gelu_tanh"}),
    "vit_intern300m_patch14_448": ("vit", {"final_norm": False}),
    "vit_wee_patch16_reg1_gap_256": ("vit", {"class_token": False}),
    "beit_large_patch16_512": ("beit", {"use_rel_pos_bias": True}),
    "beitv2_base_patch16_224": ("beit", {"use_rel_pos_bias": True}),
    "eva_giant_patch14_336": ("eva", {}),
    "eva02_small_patch14_336": (
        "eva",
        {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": [16, 16]},
    ),
    "eva02_large_patch14_448": ("eva", {"qkv_fused": False, "scale_mlp": True}),
    "eva02_large_patch14_clip_336": ("eva", {"scale_attn_inner": True}),
    "eva02_enormous_patch14_clip_224": ("eva", {"use_post_norm": True}),
    "vit_small_patch16_rope_ape_224": (
        "eva",
        {"attn_type": "rope", "rope_temperature": 100.0, "rope_grid_indexing": "xy"},
    ),
    "vit_small_patch16_rope_mixed_224": ("eva", {"rope_type": "mixed"}),
    "vit_medium_patch16_rope_reg1_gap_256": ("eva", {"class_token": False}),
    "vit_huge_plus_patch16_dinov3": (
        "eva",
        {"rope_type": "dinov3", "rope_rotate_half": True, "swiglu_align_to": 1},
    ),
    "samvit_huge_patch16": ("sam", {"window_size": 14, "neck_chans": 256}),
    "vit_base_patch16_rpn_224": ("vit_base_patch16_rpn_224", {}),
    "vit_pe_spatial_tiny_patch16_512": ("vit_pe_spatial_tiny_patch16_512", {}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_timm.write(tmp_path_factory.mktemp("timm"))


def tokens_of(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    """timm's forward_features, SAM's map as tokens."""
    with torch.no_grad():
        features = model.to(imgs.dtype).eval().forward_features(imgs)
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


@pytest.mark.parametrize("name", [*FOLDERS, *BARE])
def test_features_are_timms(files, name):
    path, _ = files[name]
    model, spec, report = load_backbone(path)
    imgs = torch.randn(2, 3, *spec.img_size, generator=torch.Generator().manual_seed(4)).double()
    tolerance = FLOAT32_TABLES if "dinov3" in name else 1e-9
    assert_parity(tokens_of(model, imgs), tokens_of(build(name), imgs), rtol=tolerance)
    assert report.format == "timm"
    assert spec.arch == {"rms-norm": "test_vit4"}.get(name, spec.arch)
    assert spec.arch in ("vit", "beit", "eva", "sam", "test_vit4")
    assert num_params(model) > 0
    assert backbone_gmacs(spec) > 0


def hollow_checkpoint(name: str) -> Checkpoint:
    """One block of the model's own width, or the whole of one that its name alone can rebuild."""
    args: dict[str, Any] = {} if STRUCTURES[name][0] == name else {"depth": 1}
    with torch.device("meta"):
        weights = timm.create_model(name, **args).state_dict()
    config = {"architecture": name, "model_args": args}
    return Checkpoint(f"timm:{name}", "0" * 64, hollow(weights), beside={"config.json": config})


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_name_of_the_registry_tells_how_to_rebuild_the_model(name):
    checkpoint = hollow_checkpoint(name)
    format, translation, spec = translate(checkpoint)
    arch, options = STRUCTURES[name]
    assert (format, spec.arch) == ("timm", arch)
    assert {key: spec.options.get(key) for key in options} == options
    with torch.device("meta"):
        model = build_vit(spec, global_pool=infer_global_pool(translation.weights))
    check_fit(model, translation.weights, name, format)


@pytest.mark.parametrize("size", ["B", "L", "H"])
def test_published_sizes_without_a_description(size):
    width, depth, heads, patch = REAL[size]
    spec = check_real_size("timm", encoder_shapes(width, depth, 224, patch) | linear("head", width, 1000))
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.img_size) == (width, depth, heads, (224, 224))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_224", {"act_layer": "quick_gelu"}),
        ("vit_base_patch16_224", {"norm_layer": torch.nn.LayerNorm}),  # eps 1e-5
        ("eva02_tiny_patch14_224", {"ref_feat_shape": (8, 8)}),
        ("eva02_tiny_patch14_224", {"rope_temperature": 100.0}),
        ("eva_giant_patch14_224", {"use_post_norm": True}),
        ("vit_base_patch16_224", {"num_heads": 6}),
    ],
)
def test_models_that_compute_something_else_differ(name, options):
    with torch.device("meta"):
        sizes: dict[str, Any] = {"depth": 1}
        assert not find_differences(timm.create_model(name, **sizes), timm.create_model(name, **sizes))
        assert find_differences(timm.create_model(name, **sizes), timm.create_model(name, **sizes | options))


@pytest.mark.parametrize(
    "name", ["dinov2", "dinov3", "siglip", "beit", "eva02", "eva02-tiny", "sam", "rms-norm", "plain"]
)
def test_what_is_written_is_loaded_by_timm(files, tmp_path, name):
    out = tmp_path / "out.safetensors"
    convert(files[name][0], out, "timm")
    model, spec, report = load_backbone(out)  # by its own description, without config.json
    architecture, options = FOLDERS[name] if name in FOLDERS else BARE[name]
    pool = {} if name == "sam" else {"global_pool": infer_global_pool(model.state_dict())}
    theirs = timm.create_model(
        architecture,
        checkpoint_path=str(out),
        num_classes=0,
        **(options if name in FOLDERS else SMALL) | pool,
    )
    imgs = torch.randn(2, 3, *spec.img_size, generator=torch.Generator().manual_seed(4))
    assert torch.equal(tokens_of(model, imgs), tokens_of(theirs, imgs))
    assert (report.format, spec) == ("timm", load_backbone(files[name][0])[1])


@pytest.mark.parametrize(
    ("architecture", "asked"),
    [
        ("clip", "act_layer"),
        ("siglip", "act_layer"),
        ("siglip-gap", "act_layer"),
        ("eva02", "use_rot_pos_emb"),
    ],
)
def test_what_tensors_do_not_show_is_asked_for(tmp_path, architecture, asked):
    weights = build(architecture).state_dict()
    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=f"options.{asked}") as error:
        load_backbone(tmp_path / "bare.safetensors")
    assert asked == "act_layer" or "options.ref_feat_shape" in str(
        error.value
    )  # in which rotations count, at 448 pixels too
    told = (
        {"act_layer": "quick_gelu"}
        if asked == "act_layer"
        else {"use_rot_pos_emb": True, "ref_feat_shape": [16, 16]}
    )
    model, spec, _ = load_backbone(tmp_path / "bare.safetensors", overrides={"options": told})
    assert spec.options[asked] == told[asked]
    if not architecture.startswith("siglip"):
        imgs = torch.randn(1, 3, 32, 32).double()
        assert_parity(tokens_of(model, imgs), tokens_of(build(architecture), imgs))


def bare(folder: Path, architecture: str, **options: Any) -> tuple[Any, Path]:
    """A small model of that name, and its state_dict without a config."""
    options = SMALL | options
    model = randomise(timm.create_model(architecture, num_classes=0, **options))
    save_file(model.state_dict(), folder / "bare.safetensors")
    return model, folder / "bare.safetensors"


@pytest.mark.parametrize(
    "architecture",
    [
        "vit_small_patch16_dinov3",
        "vit_small_patch16_dinov3_qkvb",
        "vit_small_plus_patch16_dinov3",
        "vit_small_patch16_rope_224",
        "vit_small_patch16_rope_mixed_224",
        "vit_medium_patch16_rope_reg1_gap_256",
        "vit_pe_core_tiny_patch16_384",
    ],
)
def test_rotations_that_nothing_tells_are_not_left_out(tmp_path, architecture):
    model, path = bare(tmp_path, architecture)
    with pytest.raises(UserError, match=r"rotary(.|\n)*config.json(.|\n)*--format dinov3"):
        load_backbone(path)
    if "dinov3" in architecture:
        read, spec, _ = load_backbone(path, format="dinov3")
        imgs = torch.randn(1, 3, *spec.img_size).double()
        assert_parity(tokens_of(read, imgs), tokens_of(model, imgs), rtol=FLOAT32_TABLES)


def test_a_rotary_vit_with_the_names_of_deit3_is_a_question(tmp_path):
    _, path = bare(tmp_path, "vit_small_patch16_rope_ape_224")
    with pytest.raises(UserError, match="fits timm and deit3"):
        load_backbone(path)


def test_norms_that_may_stand_behind_are_asked_for(tmp_path):
    """A ResPostBlock has the names of a Block."""
    _, path = bare(tmp_path, "vit_base_patch16_rpn_224")
    with pytest.raises(UserError, match=r"arch cannot be inferred from the file\n.*config.json(.|\n)*arch="):
        load_backbone(path)
    model, path = bare(tmp_path, "vit_base_patch16_224", class_token=False, qkv_bias=False, global_pool="avg")
    read, _, _ = load_backbone(path, overrides={"arch": "vit"})
    imgs = torch.randn(1, 3, 32, 32).double()
    assert_parity(tokens_of(read, imgs), tokens_of(model, imgs))


def test_a_spec_in_the_file_tells_by_what_it_leaves_out(tmp_path):
    """An EVA without rotations: its options do not name them."""
    model, path = bare(tmp_path, "eva_giant_patch14_224")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "eva_giant_patch14_224", "model_args": SMALL})
    )
    (tmp_path / "alone").mkdir()
    convert(path, tmp_path / "alone" / "out.safetensors", "timm")
    read, _, _ = load_backbone(tmp_path / "alone" / "out.safetensors")
    imgs = torch.randn(1, 3, 32, 32).double()
    assert_parity(tokens_of(read, imgs), tokens_of(model, imgs))


def test_the_norm_of_an_average_has_a_bias_only_where_the_last_norm_has_one(tmp_path):
    """An RMSNorm has none."""
    weights = randomise(timm.create_model("test_vit4", num_classes=0, global_pool="")).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit4"}))
    model, _, report = load_backbone(tmp_path, global_pool="avg")
    assert set(report.new) == {"fc_norm.weight"}
    assert report.dropped["norm.weight"]
    assert torch.equal(model.state_dict()["fc_norm.weight"], torch.ones(96))


@pytest.mark.parametrize(
    ("name", "arch"), [("eva02_tiny_patch14_224", "eva"), ("beit_base_patch16_224", "beit")]
)
def test_a_source_by_name_is_read_as_timm_publishes_it(monkeypatch, name, arch):
    """timm's own download is replaced: there is no network in a test."""
    published = randomise(timm.create_model(name, num_classes=0))
    real = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **args: published if pretrained else real(name, **args),
    )
    model, spec, report = load_backbone(f"timm:{name}")
    imgs = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(4))
    assert torch.equal(tokens_of(model, imgs), tokens_of(published, imgs))
    assert (spec.arch, spec.global_pool, report.format) == (arch, "avg", "timm")


def described(folder: Path, config: dict[str, Any], change: Any = None) -> Path:
    weights = dict(build("beit").state_dict())
    if change:
        change(weights)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": 5},
        {"architecture": "resnet18"},
        {"architecture": "deit_tiny_distilled_patch16_224"},
        {"architecture": "beit_base_patch16_224", "model_args": [1]},
        {"architecture": "beit_base_patch16_224", "model_args": {"checkpoint_path": "/etc/passwd"}},
        {"architecture": "beit_base_patch16_224", "model_args": {"pretrained": True}},
        {"architecture": "beit_base_patch16_224", "model_args": SMALL | {"depth": 10**9}},
        {"architecture": "beit_base_patch16_224", "model_args": SMALL | {"num_heads": "three"}},
        {"architecture": "beit_base_patch16_224", "model_args": SMALL | {"patch_size": [8]}},
        {"architecture": "beit_base_patch16_224", "pretrained_cfg": 3},
        {"architecture": "beit_base_patch16_224", "pretrained_cfg": {"mean": "grey"}, "model_args": SMALL},
        {"architecture": "samvit_base_patch16_224"},
    ],
)
def test_a_description_that_cannot_be_followed_is_refused(tmp_path, config):
    with pytest.raises(UserError):
        load_backbone(described(tmp_path, config))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("blocks.1.gamma_2"), "missing: blocks.1.gamma_2"),
        (lambda w: w.pop("blocks.0.attn.q_bias"), "missing: blocks.0.attn.q_bias"),
        (lambda w: w.update({"blocks.0.mystery": torch.zeros(3)}), "unexpected: blocks.0.mystery"),
        (lambda w: w.update({"blocks.0.attn.relative_position_bias_table": torch.zeros(7, 3)}), "no grid"),
    ],
)
def test_a_missing_and_a_surplus_key_are_refused(tmp_path, change, told):
    config = {"architecture": "beit_base_patch16_224", "model_args": SMALL}
    assert load_backbone(described(tmp_path, config))[1].arch == "beit"
    with pytest.raises(UserError, match=told):
        load_backbone(described(tmp_path, config, change))


@pytest.mark.parametrize("change", [torch.zeros(()), torch.zeros(0), torch.zeros(2, 2, 2)])
@pytest.mark.parametrize(
    "name",
    [
        "pos_embed",
        "reg_token",
        "patch_embed.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    ],
)
def test_tensors_of_senseless_shapes_end_in_a_plain_error(tmp_path, name, change):
    save_file(build("deit3").state_dict() | {name: change}, tmp_path / "x.safetensors")
    with pytest.raises(UserError):
        load_backbone(tmp_path / "x.safetensors")
