"""load_backbone: every toy file gives the published features, and anything unexplained is refused."""

import json
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from backbones.load import load_backbone
from mae_bench.errors import UserError
from mae_bench.export import write_export
from mae_bench.files import file_digest
from mae_bench.models.mae import MAE
from mae_bench.models.options import MAEOptions
from mae_bench.pretrain.reconstruct import save_mae
from mae_bench.spec import BackboneSpec
from tests.backbones.formats.plain_vit import published_vit
from tests.parity import assert_parity, in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")

NAMES = ["encoder", "full", "fine", "probe", "checkpoint-7", "timm.safetensors", "timm.bin", "timm.pth", "hf"]


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)).double()


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_published_features(files, toys, imgs, name):
    path, format = files[name]
    model, spec, report = load_backbone(path)
    expected = published_vit(toys["fine" if name == "fine" else "encoder"], imgs, 3, spec.norm_eps)
    with torch.no_grad():
        assert_parity(model.double().eval().forward_features(imgs), expected)
    assert report.format == format
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.patch_size, spec.img_size) == (
        192,
        2,
        3,
        (8, 8),
        (32, 32),
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["encoder", "fine", "hf"])
def test_the_model_is_in_eval_mode(files, name):
    model, _, _ = load_backbone(files[name][0], drop_path_rate=0.5)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_the_report_explains_every_key(files, name):
    path, _ = files[name]
    model, _, report = load_backbone(path)
    stored = set(report.renamed) | set(report.dropped)
    filled = set(report.renamed.values()) | set(report.new)
    assert filled == set(model.state_dict())
    assert not set(report.renamed) & set(report.dropped)
    weight_file = path / "model.safetensors" if path.is_dir() else path
    content = (
        timm.models.load_state_dict(str(weight_file), use_ema=False) if name.startswith("timm") else None
    )
    assert content is None or stored == set(content)
    assert report.digest == file_digest(weight_file)
    assert all(report.dropped.values())


def test_facts_that_differ_by_layout(files):
    specs = {name: load_backbone(files[name][0])[1] for name in NAMES}
    assert [specs[name].pos_embed for name in ("encoder", "fine", "hf")] == ["sincos", "learned", "sincos"]
    assert [specs[name].global_pool for name in ("encoder", "fine")] == ["token", "avg"]
    assert specs["hf"].norm_eps == 1e-12
    assert specs["encoder"].norm_eps == 1e-6
    methods = {name: spec.pretrain_method for name, spec in specs.items()}
    assert methods["full"] == methods["probe"] == methods["hf"] == "mae"
    assert methods["fine"] == "mae, fine-tuned"
    assert (
        methods["timm.pth"] == "unknown"
    )  # it has a classifier: trained with labels, by whom the file does not say


def test_an_export_and_a_run_folder_are_one(tmp_path, files, imgs):
    model, spec, _ = load_backbone(files["encoder"][0])
    digest = write_export(tmp_path / "cell/export", model.state_dict(), spec, {})
    cell = tmp_path / "cell"
    for source in (cell, cell / "export", f"run:{cell}", cell / "export/backbone.safetensors"):
        again, same_spec, report = load_backbone(source)
        assert same_spec == spec
        assert (report.format, report.digest) == ("mae_bench", digest)
        assert torch.equal(again.forward_features(imgs.float()), model.forward_features(imgs.float()))
    save_file(
        {name: tensor * 2 for name, tensor in model.state_dict().items()},
        tmp_path / "cell/export/backbone.safetensors",
    )
    with pytest.raises(UserError, match="not the ones described"):
        load_backbone(tmp_path / "cell/export")


def test_our_pretraining_file_with_its_decoder_is_one_of_the_official_layout(tmp_path, imgs):
    spec = BackboneSpec(
        "vit", (32, 32), (8, 8), 3, 48, 2, 4, mean=(0.5,) * 3, pos_embed="sincos", pretrain_method="mae"
    )
    mae = MAE(spec, MAEOptions(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)).eval()
    save_mae(mae, tmp_path)
    model, same_spec, report = load_backbone(tmp_path / "mae.safetensors")
    assert (report.format, same_spec) == ("official_mae", spec)
    assert torch.equal(
        model.eval().forward_features(imgs.float()), mae.encoder.forward_features(imgs.float())
    )


def test_a_folder_of_timms_hub_says_how_to_feed_it(tmp_path):
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.4, 0.4, 0.4], "interpolation": "bilinear"}
    save_file(timm.create_model("test_vit2", num_classes=7).state_dict(), tmp_path / "model.safetensors")

    def describe(**config):
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": "test_vit2", "pretrained_cfg": cfg} | config)
        )
        return load_backbone(tmp_path)[1]

    spec = describe()
    assert (spec.arch, spec.mean, spec.std, spec.interpolation) == ("vit", (0.5,) * 3, (0.4,) * 3, "bilinear")
    for wrong in ({"architecture": "no_such"}, {"architecture": "resnet18"}, {"pretrained_cfg": {"mean": 5}}):
        with pytest.raises(UserError):
            describe(**wrong)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "stated", [{"depth": 9}, {"nonsense": 1}, {"img_size": "big"}, {"mean": 3}, {"patch_size": [8]}]
)
def test_a_spec_that_contradicts_its_weights_is_refused(tmp_path, encoder, stated):
    torch.save({"model": encoder, "spec": stated}, tmp_path / "x.pth")
    with pytest.raises(UserError):
        load_backbone(tmp_path / "x.pth")


def test_average_pooling_moves_the_norm(files, encoder, imgs):
    model, _, report = load_backbone(files["encoder"][0], global_pool="avg")
    pooled = model.double().eval().forward_head(model.forward_features(imgs), pre_logits=True)
    without = {name: tensor for name, tensor in encoder.items() if not name.startswith("norm.")}
    tokens = published_vit(without, imgs, 3)[:, 1:].mean(dim=1)
    assert_parity(pooled, F.layer_norm(tokens, (192,), eps=1e-6))
    assert set(report.new) == {"fc_norm.weight", "fc_norm.bias"}
    assert {"norm.weight", "norm.bias"} <= set(report.dropped)
    with pytest.raises(UserError, match="fc_norm"):
        load_backbone(files["fine"][0], global_pool="token")


def test_a_class_token_that_is_not_there_pools_nothing(tmp_path, encoder):
    weights = {name: tensor for name, tensor in encoder.items() if name != "cls_token"}
    weights["pos_embed"] = weights["pos_embed"][:, 1:].clone()
    save_file(weights, tmp_path / "x.safetensors")
    told = {"options": {"act_layer": "gelu"}}
    with pytest.raises(UserError, match="without a class token\nExpected: global_pool avg"):
        load_backbone(tmp_path / "x.safetensors", global_pool="token", overrides=told)
    assert (
        load_backbone(tmp_path / "x.safetensors", global_pool="avg", overrides=told)[0].global_pool == "avg"
    )


def test_drop_path_and_dynamic_size_reach_the_model(files):
    model, _, _ = load_backbone(files["encoder"][0], drop_path_rate=0.2, dynamic_img_size=True)
    last_block: Any = model.blocks[1]
    assert last_block.drop_path1.drop_prob == pytest.approx(0.2)
    assert model.forward_features(torch.zeros(1, 3, 48, 24)).shape == (1, 1 + 6 * 3, 192)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.update({"blocks.0.mystery": torch.zeros(3)}), "unexpected: blocks.0.mystery"),
        (lambda w: w.pop("blocks.1.norm2.bias"), "missing: blocks.1.norm2.bias"),
        (lambda w: w.update({"norm.bias": torch.zeros(3)}), "wrong shape: norm.bias"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 16, 192)}), "img_size cannot be inferred"),
        (lambda w: w.update({"norm.bias": torch.full((192,), float("nan"))}), "NaN"),
        (lambda w: w.update({"norm.bias": torch.full((192,), float("inf"))}), "infinity"),
        (lambda w: w.update({"norm.bias": torch.zeros(192, dtype=torch.int8)}), "int8"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.zeros(192, 3)}), "patch_embed"),
    ],
)
def test_whatever_is_unexplained_is_refused(tmp_path, encoder, change, told):
    change(encoder)
    save_file(encoder, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("mine", "other"), [("a.", "b."), ("module.backbone.", "module.")])
def test_half_of_the_blocks_under_another_prefix_is_no_shorter_model(tmp_path, encoder, mine, other):
    moved = {
        (other if name.startswith("blocks.1.") else mine) + name: tensor for name, tensor in encoder.items()
    }
    save_file(moved, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"ends with block 0, and {other}blocks continues it"):
        load_backbone(tmp_path / "x.safetensors")


def test_another_models_blocks_beside_the_vit_are_no_part_of_it(tmp_path, encoder):
    others = {f"text.blocks.{i}.attn.qkv.bias": torch.zeros(6) for i in range(4)}
    save_file(
        {f"image.{name}": tensor for name, tensor in encoder.items()} | others, tmp_path / "x.safetensors"
    )
    _, spec, report = load_backbone(tmp_path / "x.safetensors")
    assert spec.depth == 2
    assert set(others) <= set(report.dropped)


def test_a_description_that_lies_beside_a_file_by_chance_is_told(tmp_path, encoder):
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 32, "patch_size": 8, "depth": 2},
    }
    config["pretrained_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("another.safetensors", "model.safetensors"):
        save_file(encoder, tmp_path / name)
        _, spec, report = load_backbone(tmp_path / name)
        assert spec.mean == (0.5, 0.5, 0.5)
        assert ("config.json in the same folder was used" in report.notes) == (name == "another.safetensors")


def test_an_ambiguous_file_asks_for_its_format(tmp_path, encoder):
    encoder["pos_embed"] = torch.randn(
        1, 17, 192
    )  # wrapped like the reference's and DeiT's files, marked as neither
    torch.save({"model": encoder}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="official_mae and timm") as error:
        load_backbone(tmp_path / "x.pth")
    assert error.value.expected == "one of official_mae, timm"
    assert "--format" in str(error.value)
    assert load_backbone(tmp_path / "x.pth", format="timm")[2].format == "timm"
    assert load_backbone(tmp_path / "x.pth", format="official_mae")[1].pretrain_method == "mae"
    with pytest.raises(UserError, match=r"unknown format(?s:.*)did you mean official_mae\b"):
        load_backbone(tmp_path / "x.pth", format="offical_mae")


def test_a_format_that_the_file_itself_does_not_say_is_noted(files):
    path, _ = files["encoder"]
    told = "the file was detected as official_mae and read as dinov2, as requested"
    assert told in load_backbone(path, format="dinov2")[2].notes
    assert not any("was detected" in note for note in load_backbone(path, format="official_mae")[2].notes)
    assert not any("was detected" in note for note in load_backbone(path)[2].notes)


def test_what_does_not_fill_the_model_says_which_model_and_what_to_do(tmp_path, encoder):
    save_file(encoder | {"blocks.0.surplus": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"does not match the model it describes \(vit, width 192, depth 2\): unexp"
    ) as error:
        load_backbone(tmp_path / "x.safetensors")
    assert (
        "save the state_dict without them; if the file is in another format, name it with --format"
        in error.value.fix
    )
    del encoder["norm.bias"]
    save_file(encoder, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="missing: norm.bias") as error:
        load_backbone(tmp_path / "x.safetensors")
    assert "state_dict" not in error.value.fix


@pytest.mark.parametrize(
    ("options", "told"),
    [({"foo": 1}, "vit has no option foo\n"), ({"a": 1, "b": 2}, "no option a and no option b\n")],
)
def test_unknown_options_are_named(files, options, told):
    with pytest.raises(UserError, match=told):
        load_backbone(files["encoder"][0], overrides={"options": options})


def test_an_unknown_file_lists_what_was_found(tmp_path):
    save_file({"layer1.0.conv.weight": torch.zeros(2, 2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match=r"layer1\.0\.conv\.weight"):
        load_backbone(tmp_path / "resnet.safetensors")


def test_heads_are_never_guessed(tmp_path, layouts):
    shapes = layouts[0](32, 1, 112, 8)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match="give num_heads=N to inspect or convert, backbones.NAME.spec.num_heads=N to evaluate"
    ):
        load_backbone(tmp_path / "x.safetensors")
    model, spec, _ = load_backbone(
        tmp_path / "x.safetensors", overrides={"num_heads": 4, "pretrain_data": "mine"}
    )
    block: Any = model.blocks[0]
    assert (spec.num_heads, block.attn.num_heads, spec.pretrain_data) == (4, 4, "mine")
    with pytest.raises(UserError, match="no depht"):
        load_backbone(tmp_path / "x.safetensors", overrides={"depht": 4})
    with pytest.raises(UserError, match="where the shapes say"):
        load_backbone(tmp_path / "x.safetensors", overrides={"num_heads": 4, "depth": 7})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"mean": 0.5},
            r"mean=0\.5 is given\nExpected: a number for each channel, for example 'mean=\[0\.5,0\.5,0\.5\]'",
        ),
        ({"std": ["a", "b", "c"]}, r"std=.* is given\nExpected: a number for each channel"),
        ({"num_heads": "six"}, "num_heads=six is given\nExpected: a whole number"),
        ({"global_pool": "max"}, "global_pool=max is given\nExpected: one of token, avg"),
        ({"options": 3}, "options=3 is given"),
        (
            {"img_size": "large"},
            r"img_size 'large'\nExpected: a positive number of pixels, or \(height, width\)",
        ),
    ],
)
def test_a_wrong_field_is_the_arguments_fault(files, given, told):
    with pytest.raises(UserError, match=f"^{told}"):
        load_backbone(files["encoder"][0], overrides=given)


def test_one_number_is_height_and_width(files):
    path, _ = files["encoder"]
    assert load_backbone(path, img_size=48)[1].img_size == (48, 48)
    assert load_backbone(path, patch_size=4)[1].patch_size == (4, 4)
    assert load_backbone(path, overrides={"img_size": 32})[1].img_size == (32, 32)
    with pytest.raises(UserError, match="patch_size -4"):
        load_backbone(path, patch_size=-4)


def test_a_table_of_oblong_images_needs_its_size(tmp_path, encoder):
    encoder["pos_embed"] = torch.randn(1, 1 + 8, 192)
    save_file(encoder, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="img_size"):
        load_backbone(tmp_path / "x.safetensors")
    model, spec, _ = load_backbone(tmp_path / "x.safetensors", overrides={"img_size": [16, 32]})
    assert spec.grid_size == (2, 4)
    assert model.forward_features(torch.zeros(1, 3, 16, 32)).shape == (1, 9, 192)


def test_half_precision_is_loaded_in_float32_and_said(tmp_path, encoder):
    save_file({name: tensor.half() for name, tensor in encoder.items()}, tmp_path / "x.safetensors")
    model, spec, report = load_backbone(tmp_path / "x.safetensors")
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.state_dict()["norm.weight"], encoder["norm.weight"].half().float())
    assert spec.pos_embed == "sincos"
    assert any("float16" in note for note in report.notes)


def test_the_source_has_to_exist(tmp_path):
    for source in (tmp_path / "none.pth", f"file:{tmp_path}/none.pth", "ftp:somewhere", f"run:{tmp_path}"):
        with pytest.raises(UserError):
            load_backbone(source)
    with pytest.raises(UserError, match="did you mean"):
        load_backbone("timm:vit_bas_patch16_224")


class TestTimmByName:
    """timm's own download is replaced: there is no network in a test."""

    def create(self, monkeypatch, change=None):
        real = timm.create_model

        def create(name, pretrained=False, **kwargs):
            if pretrained and change:
                raise change
            torch.manual_seed(0)
            return real(name, pretrained=False, **kwargs)

        monkeypatch.setattr(timm, "create_model", create)
        return real

    @pytest.mark.parametrize(
        ("name", "arch"), [("test_vit", "vit"), ("test_vit3", "vit"), ("test_vit4", "test_vit4")]
    )
    def test_features_are_timms(self, monkeypatch, name, arch):
        real = self.create(monkeypatch)
        model, spec, report = load_backbone(f"timm:{name}")
        torch.manual_seed(0)
        theirs = in_float64(real(name, num_classes=0))
        imgs = torch.randn(1, 3, *spec.img_size).double()
        assert_parity(model.double().eval().forward_features(imgs), theirs.forward_features(imgs))
        assert spec.arch == arch
        assert spec.mean == tuple(theirs.pretrained_cfg["mean"])
        assert report.format == "timm"

    def test_without_a_network_the_user_is_told(self, monkeypatch):
        self.create(monkeypatch, OSError("Network is unreachable"))
        with pytest.raises(UserError, match="Network is unreachable"):
            load_backbone("timm:vit_base_patch16_224.mae")
