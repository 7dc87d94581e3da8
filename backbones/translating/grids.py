"""Grid of patches of a position table: what the tensors show, the file states, or a family always has.

A learned table of 36 rows may be one of 6 x 6, 4 x 9 or 9 x 4 patches, and nothing in its values tells. A
square is therefore never taken for granted. It is assumed where the family's own code builds no other
tables, or where the family's released files have it; both are recorded as assumptions.

Legend: L patches, D width, h w grid of patches, p patch side.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from backbones.reading.source import Checkpoint
from backbones.translating.arguments import find_values
from backbones.translating.structure import find_bias_table
from backbones.translating.translation import FILE, TENSORS, Translation, find_sincos_grid
from mae_bench.errors import UserError
from mae_bench.models.vit import ARCHS

Grid = tuple[int, int]  # patches (h, w)
Size = tuple[int, int]  # pixels (height, width)
CLASS_ROWS = 3  # of a relative bias table: class to patch, patch to class, class to class
SIZE_NAMES = ("img_size", "image_size", "input_size")  # in saved arguments and configs
# timm's pretrained ViTs with position tables, from 7 (patches of 32 at 224) to 64 (of 14 at 896)
TIMM = (7, 8, 12, 14, 15, 16, 24, 27, 28, 32, 37, 40, 64)
BEIT = (14, 24, 32, 40)  # 224, 384, 512 and, for ADE20K, 640 pixels in patches of 16
# Family -> patches along a side of the square grids of its released files, from the places named.
RELEASED: dict[str, tuple[int, ...]] = {
    "official_mae": (14, 16, 32),  # facebookresearch/mae FINETUNE.md: 224/16, 224/14, 448/14
    "mae_lite": (14,),  # wangsr126/MAE-Lite README.md: 224/16
    "crossmae": (14,),  # TonyLianLong/CrossMAE README.md: 224/16
    "moco_v3": (14, 16),  # facebookresearch/moco-v3 README.md: 224/16; arXiv 2104.02057: 224/14
    "deit": (14, 24),  # facebookresearch/deit README_deit.md: 224/16, 384/16
    "deit3": (14, 16, 24),  # facebookresearch/deit README_revenge.md: 224/16, 224/14, 384/16
    "maskfeat": (14,),  # facebookresearch/SlowFast projects/maskfeat: 224/16
    "lightly": TIMM,  # its methods wrap timm's ViTs
    "solo_learn": (14,),  # vturrisi/solo-learn README.md: 224/16
    "beit": BEIT,  # microsoft/unilm beit/README.md
    "beitv2": BEIT,  # microsoft/unilm beit2/README.md
    "data2vec": (14,),  # facebookresearch/data2vec_vision beit/README.md: 224/16
    "simmim": (14,),  # microsoft/SimMIM README.md: 224/16
    "hf_vitmae": (14, 16),  # facebook/vit-mae-base, -large, -huge
    "hf_vit": (7, 12, 14, 16, 24, 28),  # google/vit-*, facebook/deit-*, facebook/dino-*
    "hf_beit": BEIT,  # microsoft/beit-*, facebook/data2vec-vision-*
    "hf_dinov2": (37,),  # facebook/dinov2-*: 518/14
    "hf_ijepa": (14, 16, 28),  # facebook/ijepa_*
    "clip": (
        7,
        8,
        14,
        15,
        16,
        20,
        24,
        27,
    ),  # openai/CLIP clip/clip.py; mlfoundations/open_clip src/open_clip/model_configs
    "mmpretrain": (7, 12, 14, 16, 24, 28, 32, 37, 40),  # open-mmlab/mmpretrain configs/*/metafile.yml
    "mmseg": (14, 32, 40, 48),  # open-mmlab/mmsegmentation configs/vit, segmenter, setr, beit, mae
    "timm": TIMM,
}
# Family -> the code that builds square tables only.
SQUARE: dict[str, str] = {
    "dino": "vision_transformer.py (PatchEmbed, interpolate_pos_encoding)",
    "ibot": "models/vision_transformer.py (PatchEmbed, interpolate_pos_encoding)",
    "dinov2": "dinov2/models/vision_transformer.py (interpolate_pos_encoding)",
    "ijepa": "src/models/vision_transformer.py (PatchEmbed)",
    "eva02": "EVA-02/asuka/modeling_finetune.py (VisionRotaryEmbeddingFast)",
    "hf_clip": "src/transformers/models/clip/modeling_clip.py (CLIPVisionEmbeddings)",
    "hf_siglip": "src/transformers/models/siglip, siglip2 (SiglipVisionEmbeddings, Siglip2VisionEmbeddings)",
    "detectron2": "detectron2/modeling/backbone/utils.py (get_abs_pos)",
}
MAX_LISTED = 6  # grids in a question


def find_grids(weights: Mapping[str, torch.Tensor], spec: Mapping[str, Any]) -> list[Grid] | None:
    """Return the grids (h, w) that explain all position tables of a ViT, those nearest to a square first.

    One where the tensors show it: a sine-cosine table does by its values, SAM's (1, h, w, D) by its shape,
    and a position table with a relative bias table may by their sizes. None without a table that depends on
    the grid.

    weights: in timm's names. spec: fields of a BackboneSpec, of which `arch` and `options` are used.
    """
    if spec.get("arch", "vit") not in ARCHS:
        return None
    found: list[list[Grid]] = []
    table, biases = weights.get("pos_embed"), find_bias_table(weights)
    if table is not None:
        no_rows = spec.get("options", {}).get("no_embed_class", False)
        found.append(_find_grids_of_table(table, 0 if no_rows else count_prefix_tokens(weights)))
    if biases is not None and biases.ndim == 2:  # (2h - 1) (2w - 1) offsets of two patches
        offsets = _factorise(len(biases) - CLASS_ROWS)
        found.append([((down + 1) // 2, (across + 1) // 2) for down, across in offsets if down * across % 2])
    if not found:
        return None
    return [grid for grid in found[0] if all(grid in grids for grids in found[1:])]


def count_prefix_tokens(weights: Mapping[str, torch.Tensor]) -> int:
    """Return the number of class and register tokens."""
    num_registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    return int("cls_token" in weights) + num_registers


def _find_grids_of_table(table: torch.Tensor, num_prefix_rows: int) -> list[Grid]:
    """Return the grids of a position table (1, prefix + L, D) or (1, h, w, D)."""
    if table.ndim == 4:
        return [(table.shape[1], table.shape[2])]
    if table.ndim != 3:
        return []
    grid = find_sincos_grid(table, num_prefix_rows)
    return [grid] if grid else list(_factorise(table.shape[1] - num_prefix_rows))


def _factorise(number: int) -> Iterator[Grid]:
    """Yield all pairs of factors, those nearest to a square first and the wider one first."""
    for height in range(math.isqrt(max(number, 0)), 0, -1):
        if number % height == 0:
            yield height, number // height
            if height * height != number:
                yield number // height, height


def find_img_sizes(format: str, checkpoint: Checkpoint, translation: Translation) -> dict[Size, str]:
    """Return image sizes that a file may have been trained at -> the evidence, the best evidence first.

    One of them counts only where the tables do not show the grid, and only if its grid explains them. In
    this order: the index of a bias table, the sizes in the file's saved arguments, the family's squares.
    """
    proj = translation.weights.get("patch_embed.proj.weight")
    if proj is None or proj.ndim != 4 or not all(proj.shape):
        return {}
    patch_h, patch_w = proj.shape[2:]
    sizes: dict[Size, str] = {}
    for name, tensor in checkpoint.tensors.items():
        grid = _read_index(tensor) if name.endswith("relative_position_index") else None
        if grid:
            sizes.setdefault((grid[0] * patch_h, grid[1] * patch_w), TENSORS)
    for value in (*translation.stated_sizes, *find_values(checkpoint.extras, SIZE_NAMES)):
        size = _as_size(value)
        if size:
            sizes.setdefault(size, FILE)
    for side, origin in _list_squares((translation.family or format).partition(",")[0], translation.weights):
        sizes.setdefault((side * patch_h, side * patch_w), origin)
    return sizes


def _read_index(index: torch.Tensor) -> Grid | None:
    """Return the grid of BEiT's index (1 + L, 1 + L) of bias rows, None if it does not show it.

    From the first patch to each other one the row falls by 1 along a row of patches, and by w at its end.
    """
    if index.ndim != 2 or len(index) < 2:
        return None
    steps = index[1, 1:].diff().tolist()
    width = next((i for i, step in enumerate(steps, 1) if step != -1), 0)
    num_patches = len(index) - 1
    return (num_patches // width, width) if width and num_patches % width == 0 else None


def _as_size(value: Any) -> Size | None:
    """Return a stated size, [C, H, W], [H, W] or one number; None for anything else."""
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return None
    return (sides[-2], sides[-1]) if len(sides) in (2, 3) else None


def _list_squares(family: str, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, str]]:
    """Yield the sides of a family's square grids, each with the words for an assumption."""
    if family in SQUARE:
        table = weights.get("pos_embed")
        longest = math.isqrt(table.shape[1]) if table is not None and table.ndim == 3 else 0
        for side in range(1, longest + 1):
            yield side, describe_square(family)
    for side in RELEASED.get(family, ()):
        yield side, f"assumed: {side} x {side} patches, as in {family}'s released files; other grids fit too"


def describe_square(family: str) -> str:
    """Return the words for the assumption about a family whose code builds square tables only."""
    return f"assumed: a square, as {family}'s code builds no other table: {SQUARE[family]}"


class MissingGrid(UserError):
    """The question for the image size, where several grids explain the position tables.

    Attributes:
        grids: those grids (h, w).
    """

    def __init__(self, source: str, grids: list[Grid], sizes: list[Size], fix: str) -> None:
        self.grids = grids
        more = ", ..." if len(grids) > MAX_LISTED else ""
        listed = ", ".join(f"{h} x {w}" for h, w in grids[:MAX_LISTED])
        examples = " or ".join(f"img_size=[{height},{width}]" for height, width in sizes[:2])
        super().__init__(
            f"{source}: img_size cannot be inferred from the file: its position table fits grids of "
            f"{listed}{more} patches",
            expected=f"the size of the images that it was trained for, for example {examples}",
            fix=fix,
        )
