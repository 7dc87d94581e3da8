"""inspect_checkpoint: what it says is true, is JSON, and can be shown."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from backbones.families import published_in
from backbones.inspection import (
    describe_architecture,
    identify_part,
    inspect_checkpoint,
    render,
    render_published,
)
from mae_bench.errors import UserError
from mae_bench.files import file_digest
from mae_bench.spec import BackboneSpec

pytestmark = pytest.mark.usefixtures("toy_heads")


def spec_of(embed_dim: int, depth: int, patch: int, num_heads: int, arch: str = "vit") -> BackboneSpec:
    return BackboneSpec(arch, (224, 224), (patch, patch), 3, embed_dim, depth, num_heads)


def shown(*rendered) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in rendered:
        console.print(part)
    return console.export_text()


@pytest.mark.parametrize("name", ["encoder", "full", "fine", "probe", "checkpoint-7", "timm.pth", "hf"])
def test_every_layout_is_described_in_json(files, name):
    path, format = files[name]
    told = inspect_checkpoint(path)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["format"] == told["report"]["format"] == format
    assert told["architecture"] == "ViT (width 192, depth 2, 3 heads)/8"
    weight_file = path / "model.safetensors" if path.is_dir() else path
    assert (told["sha256"], told["bytes"]) == (file_digest(weight_file), weight_file.stat().st_size)
    assert told["sha256"] in shown(render(told))
    assert set(told["origins"]) == set(told["spec"])


def test_what_is_in_the_file(files, toys):
    parameters = {
        name: inspect_checkpoint(files[name][0])["parameters"] for name in ("encoder", "full", "fine", "hf")
    }
    assert set(parameters["encoder"]) == {"backbone"}
    assert parameters["encoder"]["backbone"] == sum(tensor.numel() for tensor in toys["encoder"].values())
    assert set(parameters["full"]) == {"backbone", "decoder", "mask token"}
    assert parameters["full"]["mask token"] == toys["full"]["mask_token"].numel()
    assert set(parameters["hf"]) == {"backbone", "decoder"}
    assert parameters["fine"]["head"] == 10 * 192 + 10
    training = inspect_checkpoint(files["checkpoint-7"][0])
    assert training["training_state"] == ["optimizer", "scaler"]
    assert training["extras"]["epoch"] == 7
    assert training["extras"]["args"]["blr"] == 1.5e-4
    assert training["extras"]["optimizer"] == "dict of length 2"


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        (
            "decoder",
            [
                "decoder_blocks.0.norm1.weight",
                "decoder.decoder_norm.bias",
                "mask_decoder.transformer.layers.0.mlp.lin1.weight",
            ],
        ),
        ("mask token", ["mask_token", "teacher.backbone.mask_token"]),
        (
            "head",
            [
                "head.weight",
                "teacher.head.mlp.0.bias",
                "cls_classifier.bias",
                "lm_head.weight",
                "module.fc.weight",
            ],
        ),
        (
            "text tower",
            ["transformer.resblocks.0.ln_1.weight", "text_model.final_layer_norm.bias", "text_projection"],
        ),
        ("other", ["logit_scale", "pooler.dense.weight"]),
    ],
)
def test_what_is_left_out_is_called_by_its_name(part, keys):
    assert {identify_part(key) for key in keys} == {part}


def test_every_file_has_its_digest(files):
    folder, _ = files["hf"]
    told = inspect_checkpoint(folder)
    assert told["files"] == {
        name: file_digest(folder / name) for name in ("model.safetensors", "config.json")
    }
    assert told["report"]["files"] == told["files"]
    text = shown(render(told))
    assert all(digest in text for digest in told["files"].values())


def test_each_field_has_its_origin(files, tmp_path, encoder):
    path, _ = files["encoder"]
    told = inspect_checkpoint(path, overrides={"interpolation": "bilinear"})["origins"]
    assert told["interpolation"] == "given"
    assert told["embed_dim"] == told["depth"] == told["img_size"] == "inferred from the tensors"
    assert told["num_heads"] == (
        "the only number that official_mae builds for width 192, depth 2, MLP width 768"
    )
    assert told["mean"] == told["pretrain_method"] == f"family official_mae: {published_in('official_mae')}"
    of_hf = inspect_checkpoint(files["hf"][0])["origins"]
    assert of_hf["num_heads"] == of_hf["norm_eps"] == "stated by the file"
    save_file(encoder | {"pos_embed": encoder["pos_embed"] + 1}, tmp_path / "x.safetensors")
    unknown = inspect_checkpoint(tmp_path / "x.safetensors")
    assert unknown["origins"]["mean"] == "assumed: the default"
    assert unknown["origins"]["norm_eps"] == "assumed for timm"
    assert unknown["published"] == {}
    assert "assumed: the default" in shown(render(unknown))


def test_the_place_of_published_fields_is_told_once(files):
    told = inspect_checkpoint(files["encoder"][0])
    place = published_in("official_mae")
    assert sum(place in origin for origin in told["origins"].values()) > 1
    text = shown(render(told))
    assert (text.count(place), text.count(f"[1] {place}")) == (1, 1)
    assert text.count("family official_mae [1]") == sum(
        place in origin for origin in told["origins"].values()
    )


def test_published_values_name_their_place(files):
    told = inspect_checkpoint(files["encoder"][0])["published"]
    assert (told["family"], told["mean"], told["global_pool"]) == (
        "official_mae",
        [0.485, 0.456, 0.406],
        "token",
    )
    assert "published for official_mae: facebookresearch/mae" in shown(render_published(told))
    assert "No published preprocessing" in shown(render_published({}))


def test_several_sets_are_listed_with_what_reads_each(tmp_path, encoder):
    other = encoder | {"norm.bias": encoder["norm.bias"] + 1}
    broken = encoder | {"pos_embed": torch.zeros(1, 16, 192)}
    torch.save({"model": encoder, "model_ema": other, "third": broken}, tmp_path / "x.pth")
    told = inspect_checkpoint(tmp_path / "x.pth")
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert [row["weights"] for row in told["sets"]] == ["model", "model_ema", "third"]
    assert told["sha256"] == file_digest(tmp_path / "x.pth")
    first, second, third = told["sets"]
    assert (first["format"], first["architecture"]) == ("official_mae", "ViT (width 192, depth 2, 3 heads)/8")
    assert second["parameters"]["backbone"] == sum(tensor.numel() for tensor in encoder.values())
    assert "img_size cannot be inferred" in third["error"]
    text = shown(render(told))
    assert "holds 3 sets" in text
    assert "--weights model_ema" in text
    for row in (first, second):
        assert inspect_checkpoint(tmp_path / "x.pth", weights=row["weights"])["weights"] == row["weights"]
    with pytest.raises(UserError, match="'teacher' selects none"):
        inspect_checkpoint(tmp_path / "x.pth", weights="teacher")


def test_what_a_file_says_cannot_steer_the_terminal_or_flood_it(tmp_path, encoder):
    texts = {"note": "\x1b[2J[bold]x[/]", "long": "a" * 10_000, "number": 10**300}
    torch.save({"model": encoder, **texts}, tmp_path / "x.pth")
    told = inspect_checkpoint(tmp_path / "x.pth")
    json.dumps(told)
    assert (len(told["extras"]["long"]) < 1100, told["extras"]["number"]) == (True, "int")
    text = shown(render(told))
    assert "\x1b[2J" not in text
    assert "[bold]x[/]" in text


def test_published_sizes_have_their_names():
    assert describe_architecture(spec_of(768, 12, 16, 12)) == "ViT-B/16"
    assert describe_architecture(spec_of(1280, 32, 14, 16)) == "ViT-H/14"
    assert describe_architecture(spec_of(1024, 24, 14, 16, "eva")) == "ViT-L/14 as eva"
    assert describe_architecture(spec_of(768, 12, 16, 12, "vit_base_patch16_224")) == "vit_base_patch16_224"


def test_a_refused_file_is_refused_here_too(tmp_path, encoder):
    (tmp_path / "x.pth").write_text("nothing")
    with pytest.raises(UserError):
        inspect_checkpoint(tmp_path / "x.pth")
    del encoder["blocks.1.norm2.bias"]
    save_file(encoder, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="missing: blocks.1.norm2.bias"):
        inspect_checkpoint(tmp_path / "x.safetensors")
