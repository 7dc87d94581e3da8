"""sam: Segment Anything's encoder against the equations of arXiv 2203.16527 (windows, relative positions)."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backbones.adapters.features import FeatureMaps, get_layer_id
from backbones.load import load_backbone
from mae_bench.errors import UserError
from mae_bench.models.cost import backbone_gmacs, num_params
from tasks.imagenet.classify import Classifier
from tests.backbones.formats import toys_sam
from tests.backbones.formats.reference import apply_linear, apply_norm, check_real_size, fill
from tests.parity import assert_parity, weights_in_float64

CASES = {
    "sam.pth": (toys_sam.SQUARE, (1, 3)),
    "training.pth": (toys_sam.WIDE, (1,)),
    "encoder.safetensors": (toys_sam.ALL_GLOBAL, (0, 2)),
}


def attention(w: dict[str, torch.Tensor], x: torch.Tensor, block: str, heads: int) -> torch.Tensor:
    """Attend among patches x (N, h, w, D), adding for each pair the query times one table row per axis.

    The rows are those of the pair's vertical and horizontal distance.
    """
    n, height, width, dim = x.shape
    qkv = apply_linear(w, x.flatten(1, 2), f"{block}.attn.qkv")
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    y, z = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    down = w[f"{block}.attn.rel_pos_h"][y[:, None] - y[None] + height - 1]
    across = w[f"{block}.attn.rel_pos_w"][z[:, None] - z[None] + width - 1]
    bias = (q[:, :, :, None] * (down + across)).sum(-1)
    out = (q @ k.transpose(-2, -1) / math.sqrt(dim // heads) + bias).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2)
    return apply_linear(w, out, f"{block}.attn.proj").view(n, height, width, dim)


def in_windows(
    w: dict[str, torch.Tensor], x: torch.Tensor, block: str, heads: int, side: int
) -> torch.Tensor:
    """Attend within each window; windows over the border are zero-padded after the norm."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    out = torch.zeros_like(padded)
    for top in range(0, padded.shape[1], side):
        for left in range(0, padded.shape[2], side):
            window = padded[:, top : top + side, left : left + side]
            out[:, top : top + side, left : left + side] = attention(w, window, block, heads)
    return out[:, :height, :width]


def forward(
    w: dict[str, torch.Tensor], imgs: torch.Tensor, heads: int, side: int, global_blocks: tuple[int, ...]
) -> Any:
    """Compute the maps (N, D, h, w) after every block and after the neck."""
    w = weights_in_float64(w)
    linear, norm = partial(apply_linear, w), partial(apply_norm, w)
    x = F.conv2d(imgs, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = x.permute(0, 2, 3, 1) + w["pos_embed"]
    maps = []
    for i in range(sum(name.endswith("rel_pos_h") for name in w)):
        block = f"blocks.{i}"
        y = norm(x, f"{block}.norm1")
        x = x + (
            attention(w, y, block, heads) if i in global_blocks else in_windows(w, y, block, heads, side)
        )
        y = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.lin1"))
        x = x + linear(y, f"{block}.mlp.lin2")
        maps.append(x.permute(0, 3, 1, 2))

    def channels(x: torch.Tensor, name: str) -> torch.Tensor:
        return norm(x.permute(0, 2, 3, 1), name).permute(0, 3, 1, 2)

    x = channels(F.conv2d(maps[-1], w["neck.0.weight"]), "neck.1")
    return SimpleNamespace(maps=maps, neck=channels(F.conv2d(x, w["neck.2.weight"], padding=1), "neck.3"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_sam.write(tmp_path_factory.mktemp("sam"))


def images(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_equal_the_equations(files, name):
    shapes, global_blocks = CASES[name]
    model, spec, report = load_backbone(files[name][0])
    imgs = images(spec.img_size)
    want = forward(fill(shapes), imgs, 4, 3, global_blocks)
    assert_parity(model.double().eval().forward_features(imgs), want.neck.flatten(2).transpose(1, 2))
    for found, expected in zip(FeatureMaps(model, spec, range(spec.depth))(imgs), want.maps, strict=True):
        assert_parity(found, expected)
    assert (report.format, spec.arch, spec.num_heads, spec.num_prefix_tokens) == ("sam", "sam", 4, 0)
    assert (spec.global_pool, spec.interpolation, spec.norm_eps) == ("avg", "bilinear", 1e-6)


@torch.no_grad()
def test_the_names_of_timm_are_the_same_model(files):
    model, other = (load_backbone(files[name][0])[0].eval() for name in ("sam.pth", "timm.safetensors"))
    imgs = images((80, 80))
    assert torch.equal(model.forward_features(imgs.float()), other.forward_features(imgs.float()))


@torch.no_grad()
def test_the_head_pools_where_that_is_asked_for(files):
    model, spec, _ = load_backbone(files["sam.pth"][0], global_pool="avg")
    imgs = images(spec.img_size)
    tokens = model.double().eval().forward_features(imgs)
    for pooled in (model.forward_head(tokens, pre_logits=True), model(imgs)):
        assert torch.equal(pooled, tokens.mean(dim=1))
    as_stored = load_backbone(files["sam.pth"][0])[0].eval()
    assert torch.equal(as_stored.forward_head(tokens, pre_logits=True), tokens)


def test_the_rest_of_the_model_is_dropped_with_its_reason(files):
    dropped = load_backbone(files["sam.pth"][0])[2].dropped
    assert {reason.split(":")[0] for reason in dropped.values()} == {"prompt encoder", "mask decoder"}


@torch.no_grad()
def test_another_image_size_takes_new_tables_for_the_blocks_that_see_all(files):
    model, spec, report = load_backbone(files["sam.pth"][0], img_size=(96, 128))
    assert spec.img_size == (96, 128)
    weights = model.state_dict()
    assert weights["pos_embed"].shape == (1, 6, 8, 48)
    assert [tuple(weights[f"blocks.{i}.attn.rel_pos_{axis}"].shape) for i in (0, 1) for axis in "hw"] == [
        (5, 12),
        (5, 12),
        (11, 12),
        (15, 12),
    ]
    assert "blocks.1.attn.rel_pos_h" in report.reshaped
    theirs = {name.replace("mlp.fc", "mlp.lin"): tensor for name, tensor in weights.items()}
    imgs = images((96, 128))
    want = forward(theirs, imgs, 4, 3, (1, 3)).neck.flatten(2).transpose(1, 2)
    assert_parity(model.double().eval().forward_features(imgs), want)


def test_it_is_fine_tuned_and_counted_as_any_backbone(files):
    model, spec, _ = load_backbone(files["sam.pth"][0], drop_path_rate=0.1)
    classifier = Classifier(model, spec, 5, "avg", fc_norm=True)
    classifier(images(spec.img_size).float()).sum().backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
    assert backbone_gmacs(spec) == pytest.approx(expected_gmacs(), rel=1e-6)
    assert num_params(model) == sum(math.prod(shape) for shape in toys_sam.SQUARE.values())
    layers = {name: get_layer_id(name, spec.depth) for name, _ in model.named_parameters()}
    assert (layers["pos_embed"], layers["blocks.2.attn.rel_pos_h"], layers["neck.0.weight"]) == (0, 3, 5)


def expected_gmacs() -> float:
    """By hand: 25 patches in 4 windows of 9 (two blocks) or all together (two), width 48."""
    width, linear = 48, 25 * 3 * 16 * 16 * 48
    for pairs, tokens, side in ((4 * 81, 36, 3), (625, 25, 5)) * 2:
        linear += tokens * 4 * width**2 + 25 * 8 * width**2 + 2 * pairs * width + 2 * tokens * side * width
    return (linear + 25 * (48 * 16 + 9 * 16 * 16)) / 1e9


@pytest.mark.parametrize(
    ("width", "depth", "heads", "global_blocks", "grid"),
    [
        (768, 12, 12, (2, 5, 8, 11), 64),
        (1024, 24, 16, (5, 11, 17, 23), 64),
        (1280, 32, 16, (7, 15, 23, 31), 64),
        (768, 12, 12, (2, 5, 8, 11), 14),
    ],
)
def test_published_sizes(width, depth, heads, global_blocks, grid):
    """B, L, H of build_sam.py; at 224 pixels, where all tables have one size, the same blocks are global."""
    shapes = toys_sam.encoder(width, depth, heads, (grid, grid), 14, global_blocks, neck=256)
    spec = check_real_size("sam", {f"image_encoder.{name}": shape for name, shape in shapes.items()})
    assert (spec.img_size, spec.num_heads, spec.depth) == ((16 * grid, 16 * grid), heads, depth)
    assert spec.mean == pytest.approx([value / 255 for value in (123.675, 116.28, 103.53)])
    assert spec.std == pytest.approx([value / 255 for value in (58.395, 57.12, 57.375)])
    assert spec.options == {
        "use_rel_pos": True,
        "window_size": 14,
        "global_attn_indexes": list(global_blocks),
        "neck_chans": 256,
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("neck.3.bias"), "missing: neck.3.bias"),
        (lambda w: w.update({"neck.4.bias": torch.zeros(3)}), "unexpected: neck.4.bias"),
        (lambda w: w.pop("blocks.2.attn.rel_pos_w"), "blocks.2.attn.rel_pos_w"),
        (lambda w: w.update({"blocks.2.attn.rel_pos_w": torch.zeros(7, 12)}), "windows of"),
        (lambda w: w.update({"blocks.2.attn.rel_pos_w": torch.zeros(())}), "position tables"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 26, 48)}), "position tables"),
        (lambda w: w.update({"blocks.0.attn.rel_pos_h": torch.zeros(5, 0)}), "position tables"),
    ],
)
def test_whatever_is_unexplained_is_refused(tmp_path, change, told):
    weights = fill(toys_sam.SQUARE)
    change(weights)
    torch.save({f"image_encoder.{name}": tensor for name, tensor in weights.items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pth")
