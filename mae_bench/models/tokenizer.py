"""Discrete tokens of image patches: the encoder of DALL-E's dVAE, loaded from a checkpoint of the user.

Architecture and parameter names are those of openai/DALL-E (dall_e/encoder.py).

Legend: N batch, H W image or map, h w grid of patches.
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

PIXEL_MARGIN = 0.1  # pixels in [0, 1] are mapped to [0.1, 0.9] (dall_e/utils.py map_pixels)
WRAPPERS = ("model", "state_dict")
READ_ERRORS = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
)


class Tokenizer(nn.Module):
    """dVAE encoder: groups of residual blocks, each twice as wide on a map of half the size.

    A token is the index of the largest logit.
    """

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
        """imgs (N, 3, H, W) -> ids (N, h w); RGB as uint8 or in [0, 1].

        Images are resampled to one token per patch: 112 pixels for a grid of 14 x 14, as in BEiT (arXiv
        2106.08254) and MAE's Table 1d. Computed in full precision under autocast too.
        """
        with torch.autocast(imgs.device.type, enabled=False):
            return self._predict_ids(imgs, grid_size)

    def _predict_ids(self, imgs: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        if imgs.shape[1] != 3:
            raise UserError(f"images of {imgs.shape[1]} channels for a tokenizer", expected="RGB images")
        stride = 2 ** (self.num_groups - 1)
        x = imgs.float() / 255 if imgs.dtype == torch.uint8 else imgs.float()
        size = (grid_size[0] * stride, grid_size[1] * stride)
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.logits((1 - 2 * PIXEL_MARGIN) * x + PIXEL_MARGIN).argmax(dim=1).flatten(1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_tokens, H / stride, W / stride) of mapped pixels x (N, 3, H, W)."""
        x = self.blocks["input"](x)
        for g in range(1, self.num_groups + 1):
            x = F.max_pool2d(x, 2) if g > 1 else x
            for block in self.blocks[f"group_{g}"].values():
                x = block(x)
        out: torch.Tensor = self.blocks["output"]["conv"](x.relu())
        return out


class ResidualBlock(nn.Module):
    """id_path(x) + gain * res_path(x), four convolutions with a quarter of the width inside."""

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
        """x (N, width_in, H, W) -> (N, width, H, W)."""
        y = x
        for conv in self.res_path.values():
            y = conv(y.relu())
        out: torch.Tensor = self.id_path(x) + self.gain * y
        return out


class Conv(nn.Module):
    """Convolution with 'same' padding; parameters are named as in the published file."""

    def __init__(self, width_in: int, width: int, kernel: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, width_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, width_in, H, W) -> (N, width, H, W)."""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a frozen tokenizer from a safetensors or torch file of the encoder's tensors.

    Raise UserError for any other file.
    """
    weights = {name: tensor.float() for name, tensor in _read_tensors(Path(path)).items()}
    groups = {name.split(".")[1] for name in weights if name.startswith("blocks.group_")}
    blocks = {name.split(".")[2] for name in weights if name.startswith("blocks.group_1.block_")}
    try:
        width, num_tokens = weights["blocks.input.w"].shape[0], weights["blocks.output.conv.w"].shape[0]
        if not groups or not blocks:
            raise KeyError("blocks.group_1.block_1")
        model = Tokenizer(width, len(groups), len(blocks), num_tokens)
        model.load_state_dict(weights)
    except KeyError as error:
        raise _not_a_tokenizer(Path(path), f"missing {error}") from error
    except (RuntimeError, IndexError) as error:
        raise _not_a_tokenizer(Path(path), str(error)) from error
    return model.requires_grad_(False).eval()


def _read_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"no tokenizer {path}", expected="a .safetensors or .pt file of a dVAE encoder")
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    try:
        if is_safetensors:
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise _not_a_tokenizer(path, str(error).strip().split("\n")[0]) from error
    for key in WRAPPERS:
        content = content.get(key, content) if isinstance(content, dict) else content
    tensors = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise _not_a_tokenizer(path, f"it contains a {type(content).__name__} that is not a set of tensors")
    return dict(content)


def _not_a_tokenizer(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not a tokenizer: {why[:300]}",
        expected="the tensors of DALL-E's dVAE encoder by name (blocks.input.w ... blocks.output.conv.b)",
        fix="the published encoder.pkl is a pickled program: save its state_dict where it can be unpickled",
    )
