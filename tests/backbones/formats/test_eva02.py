"""eva02: features equal the equations of arXiv 2303.11331 (axial rotations, SwiGLU, sub-LN)."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backbones.load import load_backbone
from mae_bench.errors import UserError
from mae_bench.models.cost import backbone_gmacs
from tasks.imagenet.classify import Classifier
from tests.backbones.formats import toys_eva02
from tests.backbones.formats.reference import apply_linear, apply_norm, check_real_size, fill, pair
from tests.backbones.formats.toys_eva02 import FILES, TUNED, angles, encoder_shapes, rotations
from tests.parity import FLOAT32_TABLES, assert_parity, weights_in_float64

pytestmark = pytest.mark.usefixtures("toy_heads")


def turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels of the patches, not of the class token; x (N, heads, 1 + L, d)."""
    pairs = torch.view_as_complex(x[:, :, 1:].reshape(*x.shape[:2], -1, x.shape[3] // 2, 2).contiguous())
    rotated = torch.view_as_real(pairs * torch.polar(torch.ones(()), turns[:, ::2])).flatten(3)
    return torch.cat([x[:, :, :1], rotated], dim=2)


def published_eva02(
    w: dict[str, torch.Tensor], imgs: torch.Tensor, seq_len: int, heads: int = 3
) -> torch.Tensor:
    """Compute the tokens (N, 1 + L, D), after `norm` if there is one; imgs (N, C, H, W)."""
    w = weights_in_float64(w)
    n, (width, _, patch, _) = len(imgs), w["patch_embed.proj.weight"].shape
    linear, norm = partial(apply_linear, w), partial(apply_norm, w)
    patches = F.unfold(imgs, patch, stride=patch).transpose(1, 2)
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(n, -1, -1), x], dim=1) + w["pos_embed"]
    turns = angles(imgs.shape[2] // patch, width // heads, seq_len)
    for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        b = f"blocks.{i}"
        z = norm(x, f"{b}.norm1")
        if f"{b}.attn.qkv.weight" in w:
            q, k, v = linear(z, f"{b}.attn.qkv").chunk(3, dim=-1)
        else:
            q, k, v = (linear(z, f"{b}.attn.{part}_proj") for part in "qkv")
        q, v = q + w[f"{b}.attn.q_bias"], v + w[f"{b}.attn.v_bias"]
        q, k, v = (part.reshape(n, -1, heads, width // heads).transpose(1, 2) for part in (q, k, v))
        q, k = turned(q, turns), turned(k, turns)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).reshape(n, -1, width), f"{b}.attn.proj")
        z = norm(x, f"{b}.norm2")
        if f"{b}.mlp.w12.weight" in w:  # xFormers: the first half goes through SiLU
            gate, value = linear(z, f"{b}.mlp.w12").chunk(2, dim=-1)
        else:
            gate, value = linear(z, f"{b}.mlp.w1"), linear(z, f"{b}.mlp.w2")
        hidden = gate * torch.sigmoid(gate) * value
        hidden = norm(hidden, f"{b}.mlp.ffn_ln") if f"{b}.mlp.ffn_ln.weight" in w else hidden
        x = x + linear(hidden, f"{b}.mlp.w3")
    return norm(x, "norm") if "norm.weight" in w else x


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys_eva02.write(tmp_path_factory.mktemp("eva02"))


@pytest.mark.parametrize(
    ("name", "seq_len"), [("pretrained", 4), ("fine", 16), ("tiny", 16), ("without-rotations", 16)]
)
def test_features_are_the_published_ones(files, name, seq_len):
    path, options = files[name]
    model, spec, report = load_backbone(path, **options)
    stored = {key: tensor.half().float() if name == "tiny" else tensor for key, tensor in FILES[name].items()}
    imgs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)).double()
    with torch.no_grad():
        tokens, expected = (
            model.double().eval().forward_features(imgs),
            published_eva02(stored, imgs, seq_len),
        )
        if "fc_norm.weight" in stored:  # as they come out of the blocks they are tens of times as large
            tokens, expected = model.fc_norm(tokens), model.fc_norm(expected)
    assert_parity(tokens, expected, rtol=FLOAT32_TABLES)
    assert (report.format, spec.arch, spec.pos_embed, spec.norm_eps) == ("eva02", "eva", "rope", 1e-6)
    assert spec.options["ref_feat_shape"] == [seq_len, seq_len]
    assert spec.pretrain_method == "eva02" + (", fine-tuned" if name in ("fine", "tiny") else "")
    assert (spec.num_heads, spec.global_pool, spec.mean[0]) == (3, "avg", 0.48145466)
    assert Classifier(model, spec, 5, "avg", fc_norm=True).float().eval()(imgs.float()).shape == (2, 5)
    assert backbone_gmacs(spec) > 0


@pytest.mark.parametrize(
    ("width", "depth", "heads", "side", "patch"),
    [(192, 12, 3, 24, 14), (384, 12, 6, 24, 14), (768, 12, 12, 14, 16), (1024, 24, 16, 32, 14)],
)
def test_real_sizes(width, depth, heads, side, patch):
    shapes = (
        encoder_shapes(width, depth, side, patch, sub_ln=width > 384)
        | pair("fc_norm", width)
        | pair("head", 1000, width)
    )
    spec = check_real_size("eva02", {"module": shapes})
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.img_size) == (
        width,
        depth,
        heads,
        (side * patch, side * patch),
    )


def change_of(name: str, tensor: torch.Tensor) -> Any:
    return lambda w: w.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("blocks.1.mlp.ffn_ln.bias"), "missing: blocks.1.mlp.norm.bias"),
        (lambda w: w.pop("blocks.1.attn.q_bias"), "missing: blocks.1.attn.q_proj.bias"),
        (change_of("blocks.0.mystery", torch.zeros(3)), "unexpected: blocks.0.mystery"),
        (change_of("rope.freqs_cos", torch.rand(16, 64)), "rotations are not"),
        (change_of("rope.freqs_cos", torch.zeros(15, 64)), "square grid"),
        (change_of("rope.freqs_cos", torch.zeros(())), "square grid"),
        (change_of("rope.freqs_sin", torch.zeros(16, 2)), "square grid"),
        (change_of("pos_embed", torch.zeros(())), r"no grid of patches: pos_embed \(\)"),
        (change_of("blocks.0.mlp.w1.weight", torch.zeros(())), r"first layer of its MLP \(fc1\) is \(\)"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, change, told):
    weights = fill(encoder_shapes() | TUNED) | rotations()
    change(weights)
    torch.save({"model": weights}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=told):
        load_backbone(tmp_path / "x.pt")
