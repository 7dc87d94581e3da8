"""inspect_checkpoint: what it says is true, is JSON, and can be shown."""

import json

import pytest
from rich.console import Console

from backbones.inspection import architecture, inspect_checkpoint, render
from mae_bench.digest import file_digest
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec


def spec_of(embed_dim: int, depth: int, patch: int, num_heads: int) -> BackboneSpec:
    return BackboneSpec("vit", (224, 224), (patch, patch), 3, embed_dim, depth, num_heads)


@pytest.mark.parametrize("name", ["encoder", "full", "fine", "probe", "checkpoint-7", "timm.pth", "hf"])
def test_every_layout_is_described_in_json(files, name):
    path, format = files[name]
    told = inspect_checkpoint(path)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["format"] == told["report"]["format"] == format
    assert told["architecture"] == "ViT (width 192, depth 2, 3 heads)/8"
    weight_file = path / "model.safetensors" if path.is_dir() else path
    assert (told["sha256"], told["bytes"]) == (file_digest(weight_file), weight_file.stat().st_size)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(told))
    assert told["sha256"] in console.export_text()


def test_what_is_in_the_file(files, toys):
    parameters = {name: inspect_checkpoint(files[name][0])["parameters"] for name in ("encoder", "full", "fine", "hf")}
    assert set(parameters["encoder"]) == {"backbone"}
    assert parameters["encoder"]["backbone"] == sum(tensor.numel() for tensor in toys["encoder"].values())
    assert set(parameters["full"]) == set(parameters["hf"]) == {"backbone", "decoder"}
    assert parameters["fine"]["head"] == 10 * 192 + 10
    training = inspect_checkpoint(files["checkpoint-7"][0])["extras"]
    assert training["epoch"] == 7
    assert training["args"]["blr"] == 1.5e-4
    assert training["optimizer"] == "dict of 2"


def test_published_sizes_have_their_names():
    assert architecture(spec_of(768, 12, 16, 12)) == "ViT-B/16"
    assert architecture(spec_of(1280, 32, 14, 16)) == "ViT-H/14"


def test_a_refused_file_is_refused_here_too(tmp_path):
    (tmp_path / "x.pth").write_text("nothing")
    with pytest.raises(UserError):
        inspect_checkpoint(tmp_path / "x.pth")
