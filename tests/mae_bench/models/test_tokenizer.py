"""The tokenizer against an independent implementation of DALL-E's encoder, and errors for other files."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mae_bench.errors import UserError
from mae_bench.models.tokenizer import load_tokenizer
from tests.parity import assert_within_rounding, weights_in_float64

WIDTH, TOKENS = 8, 32


def published_names(width=WIDTH, num_tokens=TOKENS):
    """Names and shapes of the published encoder (four groups of two blocks), at another width."""
    shapes = {"blocks.input": (width, 3, 7)}
    before = width
    for group, wide in enumerate((width, 2 * width, 4 * width, 8 * width), 1):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            if before != wide:
                shapes[f"{name}.id_path"] = (wide, before, 1)
            shapes |= {
                f"{name}.res_path.conv_1": (wide // 4, before, 3),
                f"{name}.res_path.conv_2": (wide // 4, wide // 4, 3),
                f"{name}.res_path.conv_3": (wide // 4, wide // 4, 3),
                f"{name}.res_path.conv_4": (wide, wide // 4, 1),
            }
            before = wide
    return shapes | {"blocks.output.conv": (num_tokens, 8 * width, 1)}


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (out, into, kernel) in published_names().items():
        found[f"{name}.w"] = (
            torch.randn(out, into, kernel, kernel, generator=generator) * (2 / (into * kernel**2)) ** 0.5
        )
        found[f"{name}.b"] = torch.randn(out, generator=generator) * 0.1
    return found


def conv(x, weights, name):
    """Convolution by products of shifted maps."""
    w, b = weights[f"{name}.w"], weights[f"{name}.b"]
    side = w.shape[-1]
    x = F.pad(x, (side // 2,) * 4)
    height, width = x.shape[2] - side + 1, x.shape[3] - side + 1
    moved = [
        (w[:, :, i, j], x[:, :, i : i + height, j : j + width]) for i in range(side) for j in range(side)
    ]
    return sum(torch.einsum("oc,nchw->nohw", kernel, part) for kernel, part in moved) + b[:, None, None]


def logits(x, weights):
    x = conv(0.8 * x + 0.1, weights, "blocks.input")
    for group in range(1, 5):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            y = x
            for i in range(1, 5):
                y = conv(y.clamp(min=0), weights, f"{name}.res_path.conv_{i}")
            x = (conv(x, weights, f"{name}.id_path") if f"{name}.id_path.w" in weights else x) + y / 64
        if group < 4:
            x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax(dim=(3, 5))
    return conv(x.clamp(min=0), weights, "blocks.output.conv")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".wrapped.pt"])
def test_gives_the_encoders_tokens(tmp_path, weights, suffix):
    path = tmp_path / f"encoder{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights} if "wrapped" in suffix else weights, path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.num_tokens == TOKENS
    colours = torch.rand(2, 3, 3, 5, generator=torch.Generator().manual_seed(1)).round()
    imgs = F.interpolate(colours, size=(24, 40))
    tokens = tokenizer(imgs, (3, 5))
    want = logits(imgs.double(), weights_in_float64(weights))
    # 32 convolutions in a row, each a sum in blocks
    assert_within_rounding(tokenizer.logits(0.8 * imgs + 0.1), want, roundings=32 * 8)
    best, second = want.topk(2, dim=1).values.unbind(1)
    assert ((best - second) > 1e-3 * want.abs().max()).all(), "no tie that rounding could decide"
    assert torch.equal(tokens, want.argmax(1).flatten(1))
    assert len(tokens.unique()) >= 3
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_the_published_shapes_fit(tmp_path):
    """n_hid 256 and 8192 tokens, without their memory."""
    small = published_names(16, 64)
    assert len(small) == 2 + 8 * 4 + 3
    torch.save(
        {
            f"{n}.{t}": torch.zeros(s[0], s[1], s[2], s[2]) if t == "w" else torch.zeros(s[0])
            for n, s in small.items()
            for t in "wb"
        },
        tmp_path / "e.pt",
    )
    assert load_tokenizer(tmp_path / "e.pt").num_tokens == 64


def test_images_of_any_size_get_one_token_a_patch(tmp_path, weights):
    save_file(weights, tmp_path / "e.safetensors")
    tokenizer = load_tokenizer(tmp_path / "e.safetensors")
    pixels = torch.randint(
        0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    tokens = tokenizer(pixels, (2, 3))
    assert tokens.shape == (2, 6)
    assert tokens.dtype == torch.long
    smaller = F.interpolate(pixels.float(), size=(16, 24), mode="bicubic", antialias=True).clamp(0, 255) / 255
    assert torch.equal(tokens, tokenizer(smaller, (2, 3)))
    with pytest.raises(UserError, match="RGB"):
        tokenizer(torch.rand(1, 1, 16, 16), (2, 2))


def test_mixed_precision_has_the_same_targets(tmp_path, weights):
    save_file(weights, tmp_path / "e.safetensors")
    tokenizer = load_tokenizer(tmp_path / "e.safetensors")
    imgs = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tokenizer(imgs, (8, 8))
    assert torch.equal(mixed, tokenizer(imgs, (8, 8)))


class Planted:
    def __reduce__(self):
        return (np.array, ([1],))


def test_other_files_are_refused(tmp_path, weights):
    def refuse(content, match="not a tokenizer"):
        path = tmp_path / "e.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match=match):
            load_tokenizer(path)

    refuse({"patch_embed.proj.weight": torch.zeros(2)})
    refuse(
        {
            name: tensor
            for name, tensor in weights.items()
            if name != "blocks.group_2.block_1.res_path.conv_2.w"
        }
    )
    refuse(weights | {"blocks.output.conv.w": torch.zeros(5, 3, 1, 1)})
    refuse(weights | {"blocks.extra.w": torch.zeros(5)})
    refuse([1, 2])
    refuse(Planted())
    (tmp_path / "text.pt").write_text("words")
    (tmp_path / "pickle.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name in ("text.pt", "pickle.pkl"):
        with pytest.raises(UserError, match="not a tokenizer"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
