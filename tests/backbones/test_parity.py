"""Parity: equal models, changed weights that show from their block on, and models that cannot be compared."""

import json
import sys
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from backbones.parity import Parity, build_reference_model, compare, draw_images, render, verdict, verify
from mae_bench.errors import UserError
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec
from tests.backbones.formats.reference import randomise

SPEC = BackboneSpec("vit", (32, 32), (8, 8), 3, 48, 3, 4)
NAMES = ["embedding", "block 0", "block 1", "block 2", "final tokens"]
PASSED_ON = {  # how other code hands tokens on -> what stands around each block
    "tuples": lambda tokens: (tokens, None),
    "dictionaries": lambda tokens: {"hidden": tokens},
    "maps": lambda tokens: tokens.reshape(2, 1, 17, 48),
    "images in the second place": lambda tokens: tokens.transpose(0, 1),
}


@pytest.fixture
def imgs():
    return draw_images(SPEC, None, 2, 0)


def vit(spec: BackboneSpec = SPEC) -> Any:
    return randomise(build_vit(spec))


class Block(nn.Module):
    """A block that hands its tokens on in another form."""

    def __init__(self, block: nn.Module, form):
        super().__init__()
        self.block, self.form = block, form

    def forward(self, x):
        tokens = x["hidden"] if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x
        if tokens.shape != (2, 17, 48):
            tokens = tokens.transpose(0, 1) if tokens.ndim == 3 else tokens.flatten(1, 2)
        return self.form(self.block(tokens))


class Other(nn.Module):
    """Another implementation: its blocks have another name, decoys before them, and another output form."""

    def __init__(self, vit, form=lambda tokens: tokens, output=lambda tokens: tokens):
        super().__init__()
        self.decoys = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.stem = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
        self.vit, self.form, self.output = [vit], form, output
        self.layers = nn.ModuleList(Block(block, form) for block in vit.blocks)

    def forward(self, imgs):
        (model,) = self.vit
        self.stem(imgs)
        x = self.form(model._pos_embed(model.patch_embed(imgs)))
        for layer in self.layers:
            x = layer(x)
        return self.output(model.norm(Block(nn.Identity(), lambda tokens: tokens)(x)))


def dinov2_output(x):
    """The names of facebookresearch/dinov2; what stands before the norm has the shape of all tokens."""
    return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 1:], "x_prenorm": x * 9}


def test_equal_models_are_equal(imgs):
    found = compare(vit(), vit(), imgs)
    assert [layer.layer for layer in found.layers] == NAMES
    assert [layer.absolute for layer in found.layers] == [0.0] * 5
    assert all(layer.scale > 0.1 for layer in found.layers)
    assert found.equal
    assert found.first is None
    assert "equal within 1e-05" in verdict(found)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_changed_weight_shows_from_its_block_on(imgs, block):
    theirs = vit()
    with torch.no_grad():
        theirs.blocks[block].mlp.fc2.weight[7, 5] += 0.5
    found = compare(vit(), theirs, imgs)
    changed = [layer.absolute > 0 for layer in found.layers]
    assert changed == [False] * (block + 1) + [True] * (4 - block)
    assert found.first == found.layers[block + 1]
    assert not found.equal
    assert f"differ from block {block} on" in verdict(found)


def test_the_difference_is_the_known_one(imgs):
    theirs = vit()
    with torch.no_grad():
        theirs.patch_embed.proj.bias[3] += 0.25
    embedding = compare(vit(), theirs, imgs).layers[0]
    assert embedding.absolute == pytest.approx(0.25, rel=1e-4)
    assert embedding.relative == pytest.approx(0.25 / embedding.scale, rel=1e-4)


def test_the_tolerance_decides(imgs):
    theirs = vit()
    with torch.no_grad():
        theirs.norm.bias += 1e-3
    assert not compare(vit(), theirs, imgs).equal
    assert compare(vit(), theirs, imgs, tolerance=1e-2).equal


def test_a_value_that_is_not_finite_is_no_parity(imgs):
    theirs = vit()
    with torch.no_grad():
        theirs.norm.bias[0] = float("nan")
    found = compare(vit(), theirs, imgs)
    assert not found.equal
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"][-1]["relative"] is None


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("beit", {"use_rel_pos_bias": True}),
        ("eva", {"use_rot_pos_emb": True}),
        ("sam", {"window_size": 2, "global_attn_indexes": [2], "neck_chans": 16}),
    ],
)
def test_every_architecture_is_compared(imgs, arch, options):
    spec = BackboneSpec(
        arch, (32, 32), (8, 8), 3, 48, 3, 4, options=options, num_prefix_tokens=int(arch != "sam")
    )
    theirs = vit(spec)
    assert compare(vit(spec), theirs, imgs).equal
    with torch.no_grad():
        theirs.blocks[1].mlp.fc2.bias[0] += 1
    assert [layer.absolute > 0 for layer in compare(vit(spec), theirs, imgs).layers] == [
        False,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("form", PASSED_ON.values(), ids=PASSED_ON.keys())
def test_blocks_are_found_in_other_code(imgs, form):
    found = compare(vit(), Other(vit(), form), imgs)
    assert [layer.layer for layer in found.layers] == NAMES
    assert found.worst.relative < 1e-6


@pytest.mark.parametrize(
    ("output", "compared"),
    [
        (dinov2_output, ["final patch tokens", "final class token"]),
        (lambda x: x[:, 0], ["final class token"]),
        (lambda x: x[:, 1:].transpose(1, 2).reshape(2, 48, 4, 4), ["final patch tokens"]),
        (lambda x: (x * 9, [x]), ["final tokens"]),
        (lambda x: x.sum(), []),
    ],
)
def test_final_tokens_as_far_as_they_are_given(imgs, output, compared):
    found = compare(vit(), Other(vit(), output=output), imgs)
    assert [layer.layer for layer in found.layers[4:]] == compared
    assert found.worst.relative < 1e-6
    assert bool(found.notes) == (not compared)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (
            lambda: vit(BackboneSpec("vit", (32, 32), (8, 8), 3, 48, 4, 4)),
            "no ModuleList or Sequential of 3 blocks; it has .*of 4",
        ),
        (lambda: vit(BackboneSpec("vit", (32, 32), (8, 8), 3, 96, 3, 4)), r"other shapes.*\(2, 17, 96\)"),
        (
            lambda: vit(BackboneSpec("vit", (16, 16), (8, 8), 3, 48, 3, 4)),
            "the reference's forward fails.*AssertionError",
        ),
        (lambda: nn.Conv2d(3, 3, 1), "it has none"),
    ],
)
def test_what_cannot_be_compared_says_why(imgs, theirs, told):
    with pytest.raises(UserError, match=told):
        compare(vit(), theirs(), imgs)


def test_transformers_is_the_other_side(tmp_path):
    """ViTMAEModel without masking: ascending noise keeps the order of the patches."""
    config = transformers.ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        mask_ratio=0.0,
    )
    model: Any = randomise(transformers.ViTMAEModel(config))
    model.save_pretrained(tmp_path / "mae")
    (tmp_path / "theirs_mae.py").write_text(
        "import torch, transformers\n"
        "class Whole(torch.nn.Module):\n"
        "    def __init__(self, path):\n"
        "        super().__init__()\n"
        "        self.mae = transformers.ViTMAEModel.from_pretrained(path)\n"
        "    def forward(self, imgs):\n"
        "        return self.mae(imgs, noise=torch.arange(16.0).expand(len(imgs), -1))\n"
        "def changed(path):\n"
        "    whole = Whole(path)\n"
        "    name = [name for name, _ in whole.named_parameters() if '.1.' in name][-1]\n"
        "    whole.get_parameter(name).data += 0.1\n"
        "    return whole\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        found = verify(tmp_path / "mae", "theirs_mae:Whole")
        changed = verify(tmp_path / "mae", "theirs_mae:changed")
    assert [layer.layer for layer in found.layers] == ["embedding", "block 0", "block 1", "final tokens"]
    assert found.equal, found
    assert changed.first == changed.layers[2]


def test_the_callable_is_found_and_called(tmp_path, monkeypatch):
    weights = vit().state_dict()
    save_file(weights, tmp_path / "ours.safetensors")
    (tmp_path / "their_code.py").write_text(
        "import torch\n"
        "def bare(): return torch.nn.Linear(2, 2).double().train()\n"
        "def of(path, size=3): return torch.nn.Linear(2, len(path))\n"
        "class A:\n"
        "    make = staticmethod(bare)\n"
        "def wrong(): return 3\n"
        "def breaks(): return {}['key']\n"
        "value = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    bare = build_reference_model("their_code:bare", "x")
    assert (bare.weight.dtype, bare.training) == (torch.float32, False)
    assert build_reference_model("their_code:of", "file:abc").out_features == 3
    assert isinstance(build_reference_model("their_code:A.make", "x"), nn.Linear)
    for against, told in {
        "their_code": "MODULE:CALLABLE",
        "their_code:nothing": "has no nothing",
        "their_code:value": "is of type int",
        "their_code:wrong": "returns an object of type int",
        "their_code:breaks": r"breaks fails: KeyError: 'key' \(their_code.py:7\)$",
        "no_module:f": "no module no_module\nExpected: no_module.py in this folder, or an installed module$",
        "thier_code:bare": r"did you mean their_code\?",
        "their_code:bear": "did you mean bare or",
        "torch.nothing:f": "torch.nothing cannot be imported: ModuleNotFoundError",
    }.items():
        with pytest.raises(UserError, match=told):
            build_reference_model(against, "x")
    assert str(tmp_path) not in sys.path


def test_images_of_a_folder_are_normalised(tmp_path):
    for number in range(3):
        Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / f"{number}.png")
    imgs = draw_images(SPEC, tmp_path, 2, 0)
    assert imgs.shape == (2, 3, 32, 32)
    assert imgs[0, :, 5, 5].tolist() == pytest.approx(
        [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-4
    )
    assert torch.equal(draw_images(SPEC, None, 2, 3), draw_images(SPEC, None, 2, 3))
    assert not torch.equal(draw_images(SPEC, None, 2, 3), draw_images(SPEC, None, 2, 4))


def test_the_table_has_a_row_a_layer(imgs):
    found = compare(vit(), vit(), imgs)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(found))
    text = console.export_text()
    assert all(name in text for name in NAMES)
    assert isinstance(found, Parity)
