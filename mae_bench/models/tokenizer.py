"""Discrete tokens of image patches: the encoder of DALL-E's dVAE, read from a checkpoint that the user gives.

The layout of names and the architecture are those of openai/DALL-E (dall_e/encoder.py).
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mae_bench.errors import UserError

PIXEL_MARGIN = 0.1  # pixels of [0, 1] are mapped to [0.1, 0.9] (dall_e/utils.py map_pixels)
WRAPPERS = ("model", "state_dict")


class Tokenizer(nn.Module):
    """Groups of residual blocks, their width doubled and the map halved from one to the next; a token is the largest logit."""

    def __init__(self, width: int, num_groups: int, num_blocks: int, num_tokens: int):
        super().__init__()
        self.num_groups, self.num_blocks, self.num_tokens = num_groups, num_blocks, num_tokens
        gain = 1 / (num_groups * num_blocks) ** 2
        blocks: dict[str, nn.Module] = {"input": Conv(3, width, 7)}
        for g in range(num_groups):
            widths = [max(1, 2 ** (g - 1)) * width] + [2**g * width] * num_blocks
            blocks[f"group_{g + 1}"] = nn.ModuleDict(
                {f"block_{b + 1}": ResidualBlock(widths[b], widths[b + 1], gain) for b in range(num_blocks)}
            )
        blocks["output"] = nn.ModuleDict({"conv": Conv(2 ** (num_groups - 1) * width, num_tokens, 1)})
        self.blocks: Any = nn.ModuleDict(blocks)

    @torch.no_grad()
    def forward(self, imgs: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """imgs (N, 3, H, W), RGB of uint8 or in [0, 1] -> ids (N, h w), of images resampled so that a patch has one token.

        For a grid of 14 x 14 these are 112 pixels, as in BEiT (arXiv 2106.08254) and MAE's Table 1d.
        """
        with torch.autocast(
            imgs.device.type, enabled=False
        ):  # the targets of mixed precision are those of full precision
            return self._ids(imgs, grid_size)

    def _ids(self, imgs: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        if imgs.shape[1] != 3:
            raise UserError(f"images of {imgs.shape[1]} channels for a tokenizer", expected="RGB images")
        stride = 2 ** (self.num_groups - 1)
        x = imgs.float() / 255 if imgs.dtype == torch.uint8 else imgs.float()
        size = (grid_size[0] * stride, grid_size[1] * stride)
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.logits((1 - 2 * PIXEL_MARGIN) * x + PIXEL_MARGIN).argmax(dim=1).flatten(1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Mapped pixels (N, 3, H, W) -> (N, num_tokens, H / stride, W / stride)."""
        x = self.blocks["input"](x)
        for g in range(1, self.num_groups + 1):
            x = F.max_pool2d(x, 2) if g > 1 else x
            for block in self.blocks[f"group_{g}"].values():
                x = block(x)
        out: torch.Tensor = self.blocks["output"]["conv"](x.relu())
        return out


class ResidualBlock(nn.Module):
    """id_path(x) + gain * four convolutions behind a ReLU each, a quarter as wide inside."""

    def __init__(self, width_in: int, width: int, gain: float):
        super().__init__()
        self.gain = gain
        self.id_path = Conv(width_in, width, 1) if width_in != width else nn.Identity()
        inside = width // 4
        convs = (
            Conv(width_in, inside, 3),
            Conv(inside, inside, 3),
            Conv(inside, inside, 3),
            Conv(inside, width, 1),
        )
        self.res_path = nn.ModuleDict({f"conv_{i}": conv for i, conv in enumerate(convs, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width_in, H, W) -> (N, width, H, W)"""
        y = x
        for conv in self.res_path.values():
            y = conv(y.relu())
        return self.id_path(x) + self.gain * y


class Conv(nn.Module):
    """A convolution that keeps the map's size, its tensors named as the published file's."""

    def __init__(self, width_in: int, width: int, kernel: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, width_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width_in, H, W) -> (N, width, H, W)"""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The frozen tokenizer of a safetensors or torch file of the encoder's tensors; UserError for any other file."""
    weights = {name: tensor.float() for name, tensor in _read(Path(path)).items()}
    groups = {name.split(".")[1] for name in weights if name.startswith("blocks.group_")}
    blocks = {name.split(".")[2] for name in weights if name.startswith("blocks.group_1.block_")}
    try:
        width, num_tokens = weights["blocks.input.w"].shape[0], weights["blocks.output.conv.w"].shape[0]
        if not groups or not blocks:
            raise KeyError("blocks.group_1.block_1")
        model = Tokenizer(width, len(groups), len(blocks), num_tokens)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, IndexError) as error:
        raise _wrong(Path(path), f"lacks {error}" if isinstance(error, KeyError) else str(error)) from error
    return model.requires_grad_(False).eval()


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"no tokenizer {path}", expected="a .safetensors or .pt file of a dVAE encoder")
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    try:
        content: Any = (
            load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise _wrong(path, str(error).strip().split("\n")[0]) from error
    for key in WRAPPERS:
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in content.values()
    ):
        raise _wrong(path, f"holds a {type(content).__name__} that is no set of tensors")
    return content


def _wrong(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is no tokenizer: {why[:300]}",
        expected="the tensors of DALL-E's dVAE encoder by name (blocks.input.w ... blocks.output.conv.b)",
        fix="the published encoder.pkl is a pickled program: save its state_dict in the environment that it needs",
    )
