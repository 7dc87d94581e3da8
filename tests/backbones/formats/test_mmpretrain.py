"""mmpretrain: features of every backbone equal its published equations; the file's config is used."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backbones.inspection import inspect_checkpoint
from backbones.load import load_backbone
from mae_bench.errors import UserError
from tests.backbones.formats import toys_mmpretrain as toys
from tests.backbones.formats.plain_vit import sincos
from tests.backbones.formats.reference import apply_linear, apply_norm, check_real_size, fill
from tests.parity import assert_parity, weights_in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")


def reference(tensors, imgs, heads, eps=1e-6, gelu=F.gelu):
    """Compute the tokens of a ViT (arXiv 2010.11929) over mmpretrain's names.

    imgs (N, C, H, W) -> (N, prefix + L, D), with the additions of DeiT (2012.12877), DeiT III (2204.07118),
    BEiT (2106.08254), CLIP (2103.00020) and DINOv2 (2304.07193).
    """
    tensors = weights_in_float64(tensors)
    linear, norm = partial(apply_linear, tensors), partial(apply_norm, tensors, eps=eps)

    def scale(z, *names):
        return z * next((tensors[name] for name in names if name in tensors), 1.0)

    kernel = tensors["patch_embed.projection.weight"]
    bias = tensors.get("patch_embed.projection.bias", torch.zeros(()))
    x = F.unfold(imgs, kernel.shape[-1], stride=kernel.shape[-1]).transpose(1, 2) @ kernel.flatten(1).T + bias
    table = tensors.get("pos_embed", torch.zeros(1, 1, 1))
    tokens = [tensors[name] for name in ("cls_token", "dist_token") if name in tensors]
    prefix = torch.cat(tokens, dim=1).expand(len(x), -1, -1)
    if table.shape[1] == x.shape[1]:
        x = torch.cat([prefix, x + table], 1)
    else:
        x = torch.cat([prefix, x], 1) + table
    x = norm(x, "pre_norm") if "pre_norm.weight" in tensors else x
    for i in range(toys.DEPTH):
        block = f"layers.{i}"
        z = norm(x, f"{block}.ln1") @ tensors[f"{block}.attn.qkv.weight"].T
        if f"{block}.attn.q_bias" in tensors:
            q_bias, v_bias = tensors[f"{block}.attn.q_bias"], tensors[f"{block}.attn.v_bias"]
            z = z + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        else:
            z = z + tensors[f"{block}.attn.qkv.bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in z.chunk(3, dim=-1))
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + relative_bias(tensors, block, x.shape[1] - 1)
        z = linear((logits.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + scale(z, f"{block}.attn.gamma1.weight", f"{block}.gamma_1")
        z = norm(x, f"{block}.ln2")
        if f"{block}.ffn.w12.weight" in tensors:
            gate, value = linear(z, f"{block}.ffn.w12").chunk(2, dim=-1)
            z = linear(F.silu(gate) * value, f"{block}.ffn.w3")
        else:
            z = linear(gelu(linear(z, f"{block}.ffn.layers.0.0")), f"{block}.ffn.layers.1")
        x = x + scale(z, f"{block}.ffn.gamma2.weight", f"{block}.gamma_2")
    return norm(x, "ln1") if "ln1.weight" in tensors else x


def relative_bias(tensors, block, num_patches):
    """Return BEiT's biases (heads, 1 + L, 1 + L): offsets, class to patch, patch to class, class to class."""
    shared = "rel_pos_bias.relative_position_bias_table"
    table = tensors.get(f"{block}.attn.relative_position_bias_table", tensors.get(shared))
    if table is None:
        return 0.0
    side = round(num_patches**0.5)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    difference = place[:, None] - place[None] + side - 1
    index = F.pad(difference[..., 0] * (2 * side - 1) + difference[..., 1], (1, 0, 1, 0))
    index[0, :], index[:, 0] = len(table) - 3, len(table) - 2
    index[0, 0] = len(table) - 1
    return table[index].permute(2, 0, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys.write(tmp_path_factory.mktemp("mmpretrain"))


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)).double()


@pytest.mark.parametrize("name", [*toys.backbones(), "bare"])
def test_every_kind_gives_the_published_features(files, imgs, name):
    path, options = files[name]
    model, spec, report = load_backbone(path, **options)
    tensors = toys.backbones()["vit" if name == "bare" else name]
    if name == "ema":
        tensors = {key: tensor * 0.5 for key, tensor in tensors.items()}
    heads, eps = (6, 1e-5) if name == "config" else (3, 1e-6)
    expected = reference(tensors, imgs, heads, eps)
    with torch.no_grad():
        assert_parity(model.double().eval().forward_features(imgs), expected)
    assert (report.format, spec.num_heads, spec.norm_eps) == ("mmpretrain", heads, eps)
    assert spec.mean == ((0.5,) * 3 if name == "config" else (0.485, 0.456, 0.406))


def test_facts_of_each_kind(files):
    specs = {name: load_backbone(path, **options)[1] for name, (path, options) in files.items()}
    assert (
        specs["mae"].pos_embed == "learned"
    )  # fixed as well, but down before across, which no field of a spec says
    methods = {
        "mae": "mae",
        "maskfeat": "maskfeat",
        "mocov3": "moco_v3",
        "deit3": "supervised",
        "vit": "unknown",
    }
    assert {name: specs[name].pretrain_method for name in methods} == methods
    assert {name for name, spec in specs.items() if spec.global_pool == "avg"} == {
        "finetuned",
        "two_norms",
        "beit",
    }
    assert specs["distilled"].num_prefix_tokens == 2
    assert specs["dinov2_giant"].mlp_ratio == 1024 / 192


def test_the_norm_behind_the_pooling_pools(files, imgs):
    """A ViT without final norm, and ln2 behind the mean of the patches (out_type avg_featmap)."""
    tensors = weights_in_float64(toys.backbones()["finetuned"])
    model, _, _ = load_backbone(files["finetuned"][0])
    mean = reference(tensors, imgs, 3)[:, 1:].mean(dim=1)
    expected = F.layer_norm(mean, (192,), tensors["ln2.weight"], tensors["ln2.bias"], 1e-6)
    with torch.no_grad():
        pooled = model.double().eval().forward_head(model.forward_features(imgs), pre_logits=True)
    assert_parity(pooled, expected)
    dropped = load_backbone(files["two_norms"][0])[2].dropped
    assert "classifier" in dropped["backbone.ln2.weight"]


def test_everything_outside_has_a_reason_of_its_own(files):
    dropped: dict[str, str] = {}
    for path, options in files.values():
        dropped |= load_backbone(path, **options)[2].dropped
    for name, told in {
        "neck.decoder_blocks.0.attn.qkv.weight": "decoder",
        "head.fc.weight": "classifier",
        "head.predictor.fc0.weight": "predictor",
        "target_generator.weight_x": "targets",
        "momentum_encoder.module.0.cls_token": "moving average",
        "backbone.mask_token": "mask token",
        "backbone.layers.0.attn.relative_position_index": "grid",
    }.items():
        assert told in dropped[name]


def test_several_sets_of_weights_are_a_question(files):
    for name in ("mocov3", "ema"):
        with pytest.raises(UserError, match="2 sets"):
            load_backbone(files[name][0])


def change(tmp_path: Path, path: Path, **changes) -> Path:
    """A copy of a file with other tensors of its backbone; None takes one away."""
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        key = "backbone." + name.replace("__", ".")
        content["state_dict"].pop(key, None)
        content["state_dict"] |= {} if value is None else {key: value}
    torch.save(content, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"layers__1__ln2__bias": None}),
        ("vit", {"layers__0__attn__v_norm__weight": torch.ones(192)}),
        ("vit", {"pos_embed": torch.ones(())}),
        ("vit", {"pos_embed": torch.ones(1, 15, 192)}),
        ("beit", {"layers__1__gamma_1": None}),
        ("beit", {"layers__0__attn__relative_position_bias_table": torch.ones(51, 3)}),
        ("beit", {"layers__0__attn__relative_position_bias_table": torch.ones(())}),
        ("beit", {"layers__0__attn__qkv__bias": torch.ones(7)}),
        ("beit", {"patch_embed__projection__weight": torch.ones(192)}),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, files, name, changes):
    with pytest.raises(UserError):
        load_backbone(change(tmp_path, files[name][0], **changes))


NO_CONFIGS = [
    "model = dict(",
    "model = 3",
    "import os",
    "model.x = 1",
    "mean, std = 1, 2",
    "model = dict(backbone=dict(norm_cfg=7))",
    "(" * 9999,
    "model = dict(backbone=open('x'))",
    "data_preprocessor = dict(mean=['a'])",
    "x = {[1]}",
    b"model",
    5,
    f"data_preprocessor = dict(mean=[1{'0' * 400}, 1, 1])",
]


@pytest.mark.parametrize("config", NO_CONFIGS, ids=range(len(NO_CONFIGS)))
def test_a_config_that_is_none_is_passed_over(tmp_path, config):
    state = {f"backbone.{key}": tensor for key, tensor in toys.backbones()["vit"].items()}
    torch.save({"meta": {"cfg": config}, "state_dict": state}, tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth")[1].norm_eps == 1e-6


@pytest.mark.parametrize("format", ["mmpretrain", "mmseg", "detectron2"])
@pytest.mark.parametrize("names", [{}, {"patch_embed.proj": "embeddings.patch_embeddings.projection"}])
def test_a_format_that_the_file_is_not_in_is_refused(tmp_path, format, names):
    """Someone says --format wrongly: a timm file, and one with a bias table under other names."""
    state = {
        "patch_embed.proj.weight": torch.ones(192, 3, 8, 8),
        f"blocks.0.attn.{next(iter(toys.TABLE))}": torch.ones(52, 3),
    }
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError):
        load_backbone(tmp_path / "x.pth", format=format)


@pytest.mark.parametrize(
    ("activation", "gelu"), [("QuickGELU", lambda z: z * torch.sigmoid(1.702 * z)), ("ReLU", None)]
)
def test_the_activation_of_the_config(tmp_path, imgs, activation, gelu):
    tensors = toys.backbones()["clip"]
    config = f"model = dict(backbone=dict(layer_cfgs=dict(act_cfg=dict(type='{activation}'))))"
    torch.save({"meta": {"cfg": config}, "state_dict": tensors}, tmp_path / "x.pth")
    if gelu is None:
        with pytest.raises(UserError, match="ReLU"):
            load_backbone(tmp_path / "x.pth")
        return
    model, _, _ = load_backbone(tmp_path / "x.pth")
    with torch.no_grad():
        expected = reference(tensors, imgs, 3, gelu=gelu)
        assert_parity(model.double().eval().forward_features(imgs), expected)


def test_without_a_config_the_activation_of_a_clip_is_asked_for(files):
    with pytest.raises(UserError, match="options.act_layer"):
        load_backbone(files["clip"][0])


@pytest.mark.parametrize("told", ["predictor", "config", "user", "nothing"])
def test_moco_v3s_small_has_twelve_heads(tmp_path, told):
    """selfsup/mocov3.py (mocov3-small); a MAE of its width has six, and the same fixed table."""
    shapes = toys.shapes(toys.qkv(384), 384, 12, 1536) | toys.pair("ln1", 384)
    tensors = fill(shapes) | {"pos_embed": sincos(384, toys.GRID, down_first=True, class_row=True)}
    state = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    content: dict[str, Any] = {"state_dict": state}
    if told == "predictor":
        state |= fill(toys.pair("head.predictor.fc0", 16, 16))
    if told == "config":
        content["meta"] = {"cfg": "model = dict(backbone=dict(arch='mocov3-small', type='MoCoV3ViT'))"}
    torch.save(content, tmp_path / "x.pth")
    if told == "nothing":
        with pytest.raises(
            UserError, match=r"num_heads cannot be inferred from the file .*\n.*\n?.*give num_heads="
        ):
            load_backbone(tmp_path / "x.pth")
        return
    overrides = {"num_heads": 6} if told == "user" else {}
    if told == "config":
        assert inspect_checkpoint(tmp_path / "x.pth")["origins"]["num_heads"] == "stated by the file"
    assert load_backbone(tmp_path / "x.pth", overrides=overrides)[1].num_heads == (
        6 if told == "user" else 12
    )


def beside(backbone: dict[str, tuple[int, ...]], **others: tuple[int, ...]) -> dict[str, Any]:
    """A file's content: shapes of the backbone, and of what stands beside it (two underscores for a dot)."""
    outside = {name.replace("__", "."): shape for name, shape in others.items()}
    return {"state_dict": {f"backbone.{name}": shape for name, shape in backbone.items()} | outside}


@pytest.mark.parametrize(("width", "depth", "heads"), [(384, 12, 12), (768, 12, 12), (1024, 24, 16)])
def test_real_sizes_of_moco_v3(width, depth, heads):
    shapes = toys.shapes(toys.qkv(width), width, depth, 4 * width, 16, 197) | toys.pair("ln1", width)
    spec = check_real_size("mmpretrain", beside(shapes, head__predictor__fc0__weight=(4096, 256)))
    assert (spec.num_heads, spec.depth, spec.pretrain_method) == (heads, depth, "moco_v3")


@pytest.mark.parametrize("pretraining", [True, False])
@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16)])
def test_real_sizes_of_beit(width, depth, heads, pretraining):
    """Pretrained with one shared bias table, fine-tuned with one a block and the norm behind the pooling."""
    table = (27 * 27 + 3, heads)
    attention = {
        "q_bias": (width,),
        "v_bias": (width,),
        "qkv.weight": (3 * width, width),
        **toys.pair("proj", width, width),
    }
    own = {} if pretraining else {"relative_position_bias_table": table}
    shapes = toys.shapes(attention | own, width, depth, 4 * width, 16)
    del shapes["pos_embed"]
    shapes |= {f"layers.{i}.gamma_{j}": (width,) for i in range(depth) for j in (1, 2)}
    shapes |= toys.pair("ln1" if pretraining else "ln2", width)
    if pretraining:
        shapes |= {"mask_token": (1, 1, width), "rel_pos_bias.relative_position_bias_table": table}
    spec = check_real_size("mmpretrain", beside(shapes, head__cls_head__weight=(8192, width)))
    assert (spec.arch, spec.num_heads, spec.depth, spec.img_size) == ("beit", heads, depth, (224, 224))
    assert spec.options["use_shared_rel_pos_bias"] is pretraining


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch"),
    [(768, 12, 12, 16), (1024, 24, 16, 16), (1280, 32, 16, 14), (768, 8, 8, 16)],
)
def test_real_sizes(width, depth, heads, patch):
    """B, L and H of MAE, and the "small" of this library alone."""
    hidden = width * (3 if depth == 8 else 4)
    content = toys.shapes(toys.qkv(width), width, depth, hidden, patch, 1 + (224 // patch) ** 2) | toys.pair(
        "ln1", width
    )
    spec = check_real_size("mmpretrain", beside(content))
    assert (spec.num_heads, spec.depth, spec.img_size) == (heads, depth, (224, 224))
