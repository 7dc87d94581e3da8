"""Toy files of baaivision/EVA's EVA-02/asuka (run_eva02_pretraining.py, run_class_finetuning.py)."""

from pathlib import Path

import torch

from tests.backbones.formats.reference import Files, Shapes, fill, pair, prefixed

BASE = 10000.0


def encoder_shapes(
    width: int = 192, depth: int = 2, side: int = 4, patch: int = 8, *, sub_ln: bool = True
) -> Shapes:
    """Return the shapes of an encoder.

    sub_ln: base and large, with three projections, w1 and w2, and a norm in the MLP; tiny and small have one
    qkv and xFormers' w12.
    """
    hidden = int(width * 4 * 2 / 3)
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, side * side + 1, width)}
    shapes |= pair("patch_embed.proj", width, 3, patch, patch)
    for i in range(depth):
        block = pair("norm1", width) | {"attn.q_bias": (width,), "attn.v_bias": (width,)}
        if sub_ln:
            block |= {f"attn.{name}_proj.weight": (width, width) for name in "qkv"}
            block |= pair("mlp.w1", hidden, width) | pair("mlp.w2", hidden, width)
            block |= pair("mlp.ffn_ln", hidden)
        else:
            block |= {"attn.qkv.weight": (3 * width, width)} | pair("mlp.w12", 2 * hidden, width)
        block |= pair("attn.proj", width, width) | pair("norm2", width) | pair("mlp.w3", width, hidden)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def angles(side: int, head_width: int, seq_len: int = 16) -> torch.Tensor:
    """Return angles (side^2, head_width): half of the channels by row, half by column, in pairs.

    arXiv 2303.11331; rope.py.
    """
    turn = torch.arange(side) / side * seq_len
    frequencies = BASE ** (-torch.arange(0, head_width // 2, 2) / (head_width // 2))
    turns = (turn[:, None] * frequencies).repeat_interleave(2, dim=1)
    by_row, by_column = turns[:, None].expand(-1, side, -1), turns[None].expand(side, -1, -1)
    return torch.cat([by_row, by_column], dim=-1).reshape(side * side, -1)


def rotations(
    depth: int = 2, side: int = 4, head_width: int = 64, seq_len: int = 16
) -> dict[str, torch.Tensor]:
    """Return the buffers of the module, which is registered at the top and in every block."""
    turns = angles(side, head_width, seq_len)
    tables = {"freqs_cos": turns.cos(), "freqs_sin": turns.sin()}
    result = prefixed("rope.", tables)
    for i in range(depth):
        result |= prefixed(f"blocks.{i}.attn.rope.", tables)
    return result


def drawn(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return random weights, with matrices so small that no attention saturates."""
    return {name: tensor / 2 if tensor.ndim > 1 else tensor for name, tensor in fill(shapes).items()}


PRETRAINING = pair("norm", 192) | pair("lm_head", 40, 192) | {"mask_token": (1, 1, 192)}
TUNED = pair("fc_norm", 192) | pair("head", 7, 192)
FILES = {
    "pretrained": drawn(encoder_shapes() | PRETRAINING) | rotations(seq_len=4),
    "fine": drawn(encoder_shapes() | TUNED) | rotations(),
    "tiny": drawn(encoder_shapes(sub_ln=False) | TUNED) | rotations(),
    "without-rotations": drawn(encoder_shapes(sub_ln=False) | PRETRAINING),
}


def write(folder: Path) -> Files:
    torch.save({"module": FILES["pretrained"], "epoch": 149}, folder / "pt.pt")
    torch.save({"model": FILES["fine"]}, folder / "ft.pt")
    half = {name: tensor.half() for name, tensor in FILES["tiny"].items()}
    torch.save({"module": half}, folder / "tiny.pt")
    torch.save(FILES["without-rotations"], folder / "bare.pt")
    return {
        "pretrained": (folder / "pt.pt", {}),
        "fine": (folder / "ft.pt", {}),
        "tiny": (folder / "tiny.pt", {}),
        "without-rotations": (folder / "bare.pt", {}),
    }
