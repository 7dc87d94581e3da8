"""Position tables at other sizes: after our load they equal what each family's own resampling code gives.

The first word of a test's id is the format or golden model, the rest names the code. Authors' code ran once
(`tests/foreign/resampling.py`); that of installed libraries runs here. Both sides are float64.

Legend: L patches, D width, h w grid of patches.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling.backbone.utils import get_abs_pos, get_rel_pos
from mmseg.models.backbones.beit import BEiT
from mmseg.models.backbones.vit import VisionTransformer
from timm.layers import resample_abs_pos_embed
from transformers import (
    BeitConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2WithRegistersConfig,
    IJepaConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTMAEConfig,
)
from transformers.models.beit.modeling_beit import BeitEmbeddings
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.deit.modeling_deit import DeiTEmbeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
)
from transformers.models.ijepa.modeling_ijepa import IJepaEmbeddings
from transformers.models.sam.modeling_sam import SamVisionAttention
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from backbones.load import translate
from backbones.reading.source import open_source
from backbones.translating.resample import resample
from mae_bench.spec import BackboneSpec
from tests.backbones.formats import (
    toys_detectron2,
    toys_hf_beit,
    toys_hf_clip,
    toys_hf_dinov2,
    toys_hf_ijepa,
    toys_hf_sam,
    toys_hf_siglip,
    toys_hf_vit,
    toys_hf_vitmae,
    toys_ijepa,
    toys_mmseg,
    toys_timm,
)
from tests.backbones.formats.reference import Files
from tests.backbones.test_foreign import GOLDEN, Case, get_file, get_options, read_golden, write_file
from tests.foreign.drawing import pick_values
from tests.foreign.resampling import double_precision
from tests.parity import assert_parity, weights_in_float64

BIASES = "relative_position_bias_table"
Weights = dict[str, torch.Tensor]
Grid = tuple[int, int]
AUTHORS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "resampled.json").read_text())


def load_at(path: Path, grid: Grid, options: dict[str, Any]) -> tuple[Weights, Weights, BackboneSpec]:
    """Return a file's tensors, its weights after our load at another grid, in float64, and its own spec."""
    checkpoint = open_source(path, weights=options.get("weights"))
    stored = weights_in_float64(checkpoint.tensors)
    wide = replace(checkpoint, tensors=stored)
    _, translation, spec = translate(wide, options.get("format"), options.get("overrides"))
    height, width = (side * pixels for side, pixels in zip(grid, spec.patch_size, strict=True))
    resample(translation, spec, (height, width), None)
    return stored, translation.weights, spec


@pytest.mark.parametrize("name", AUTHORS, ids=lambda name: f"{name}: {AUTHORS[name]['code']}")
def test_tables_of_the_authors_code(tmp_path, name):
    family, _, model = name.partition("/")
    record, case = read_golden(family)[model], Case(family, model, get_file(family, model))
    path, options = write_file(case, record, tmp_path), get_options(case, record)
    tables, patch = AUTHORS[name]["tables"], record["patch"]
    assert len(tables) == 3
    for size, reference in tables.items():
        down, across = (int(side) // patch for side in size.split("x"))
        _, weights, _ = load_at(path, (down, across), options)
        ours = weights[max(key for key in weights if key.endswith(("pos_embed", BIASES)))]
        theirs = torch.tensor(reference, dtype=torch.float64)
        assert_parity(torch.tensor(pick_values(ours), dtype=torch.float64), theirs, msg=size)


@dataclass(frozen=True)
class Library:
    """A file of a library's format, and the library's function that resamples its table.

    resample: (stored table, grid of the file, new grid) -> table at the new grid.
    stored: the table's name in the file. name: its name in timm.
    """

    toys: Any
    file: str
    resample: Callable[[torch.Tensor, Grid, Grid], torch.Tensor]
    stored: str = "embeddings.position_embeddings"
    name: str = "pos_embed"


def interpolate_transformers(embeddings: Any, config: Any) -> Any:
    """Return the resampling of a model of transformers: its interpolate_pos_encoding."""

    def interpolate(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
        sizes = {"image_size": 8 * old[0], "patch_size": 8, "hidden_size": table.shape[-1]}
        theirs = embeddings(config(**sizes, num_attention_heads=1, use_absolute_position_embeddings=True))
        if table.ndim == 2:  # CLIP's
            theirs.position_embedding.weight.data = table
        else:
            theirs.position_embeddings.data = table
        num_prefix_rows = table.shape[-2] - old[0] * old[1]
        tokens = torch.empty(1, num_prefix_rows + new[0] * new[1], table.shape[-1])
        out: torch.Tensor = theirs.interpolate_pos_encoding(tokens, 8 * new[0], 8 * new[1])
        return out

    return interpolate


def interpolate_dinov2(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """Without the class token's row, which our load adds to the token."""
    interpolate = interpolate_transformers(Dinov2WithRegistersEmbeddings, Dinov2WithRegistersConfig)
    out: torch.Tensor = interpolate(table, old, new)[:, 1:]
    return out


def resize_naflex(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    resize: Any = Siglip2VisionEmbeddings.resize_positional_embeddings
    out: torch.Tensor = resize(table.unflatten(0, old), torch.tensor([new]), new[0] * new[1])
    return out


def resample_timm(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    num_prefix_tokens = table.shape[1] - old[0] * old[1]
    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens)


def resample_mmseg(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    return VisionTransformer.resize_pos_embed(table, new, old, "bicubic")


def resample_mmseg_biases(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """Of square grids, as its code has no others."""
    interpolate: Any = BEiT._geometric_sequence_interpolation
    biases = interpolate(None, 2 * old[0] - 1, 2 * new[0] - 1, table[:-3], table.shape[1])
    return torch.cat([biases, table[-3:]])


def resample_detectron2(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """From the grid of the pretraining, 4 x 4, whatever the detector's is."""
    return get_abs_pos(table, True, new)


def resample_distances(get_rel_pos: Any, axis: int) -> Any:
    """Return the resampling of tables (2h - 1, D) by a function that returns them per pair, (h, h, D)."""

    def resample_rows(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
        pairs = get_rel_pos(new[axis], new[axis], table)
        return torch.cat([pairs[0].flip(0), pairs[1:, 0]])

    return resample_rows


get_sam_rel_pos: Any = SamVisionAttention.get_rel_pos
SAM = partial(get_sam_rel_pos, None)
DISTANCES = {"stored": "blocks.1.attn.rel_pos_h", "name": "blocks.1.attn.rel_pos_h"}
SAM_TABLE = {"stored": "layers.1.attn.rel_pos_w", "name": "blocks.1.attn.rel_pos_w"}
MMSEG_TABLE = {"stored": f"layers.1.attn.{BIASES}", "name": f"blocks.1.attn.{BIASES}"}
LIBRARIES = {
    "timm: timm/layers/pos_embed.py resample_abs_pos_embed": Library(
        toys_timm, "plain", resample_timm, "pos_embed"
    ),
    "timm deit3: timm/layers/pos_embed.py resample_abs_pos_embed": Library(
        toys_timm, "deit3", resample_timm, "pos_embed"
    ),
    "hf_vit: ViTEmbeddings.interpolate_pos_encoding": Library(
        toys_hf_vit, "vit", interpolate_transformers(ViTEmbeddings, ViTConfig)
    ),
    "hf_vit: DeiTEmbeddings.interpolate_pos_encoding": Library(
        toys_hf_vit, "deit", interpolate_transformers(DeiTEmbeddings, DeiTConfig)
    ),
    "hf_vitmae: ViTMAEEmbeddings.interpolate_pos_encoding": Library(
        toys_hf_vitmae, "encoder", interpolate_transformers(ViTMAEEmbeddings, ViTMAEConfig)
    ),
    "hf_dinov2: Dinov2WithRegistersEmbeddings.interpolate_pos_encoding": Library(
        toys_hf_dinov2, "registers", interpolate_dinov2
    ),
    "hf_beit: BeitEmbeddings.interpolate_pos_encoding": Library(
        toys_hf_beit, "absolute", interpolate_transformers(BeitEmbeddings, BeitConfig)
    ),
    "hf_clip: CLIPVisionEmbeddings.interpolate_pos_encoding": Library(
        toys_hf_clip,
        "vision",
        interpolate_transformers(CLIPVisionEmbeddings, CLIPVisionConfig),
        "embeddings.position_embedding.weight",
    ),
    "hf_siglip: SiglipVisionEmbeddings.interpolate_pos_encoding": Library(
        toys_hf_siglip,
        "vision",
        interpolate_transformers(SiglipVisionEmbeddings, SiglipVisionConfig),
        "embeddings.position_embedding.weight",
    ),
    "hf_siglip: Siglip2VisionEmbeddings.resize_positional_embeddings": Library(
        toys_hf_siglip, "naflex", resize_naflex, "embeddings.position_embedding.weight"
    ),
    # The authors' own function expects a class token's row, which their tables lack: it fails.
    "ijepa: transformers' IJepaEmbeddings.interpolate_pos_encoding": Library(
        toys_ijepa, "target", interpolate_transformers(IJepaEmbeddings, IJepaConfig), "pos_embed"
    ),
    "hf_ijepa: IJepaEmbeddings.interpolate_pos_encoding": Library(
        toys_hf_ijepa, "ijepa", interpolate_transformers(IJepaEmbeddings, IJepaConfig)
    ),
    "hf_sam: SamVisionAttention.get_rel_pos": Library(
        toys_hf_sam, "vision", resample_distances(SAM, 1), **SAM_TABLE
    ),
    "mmseg: VisionTransformer.resize_pos_embed": Library(toys_mmseg, "vit", resample_mmseg, "pos_embed"),
    "mmseg: BEiT._geometric_sequence_interpolation": Library(
        toys_mmseg, "beit", resample_mmseg_biases, **MMSEG_TABLE
    ),
    "detectron2: detectron2/modeling/backbone/utils.py get_abs_pos": Library(
        toys_detectron2, "windows", resample_detectron2, "pos_embed"
    ),
    "detectron2: detectron2/modeling/backbone/utils.py get_rel_pos": Library(
        toys_detectron2, "windows", resample_distances(get_rel_pos, 0), **DISTANCES
    ),
}


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Callable[[Any], Files]:
    """Write the toys of a format, once for all of its tests."""
    return cache(lambda toys: toys.write(tmp_path_factory.mktemp("toys")))


@pytest.mark.usefixtures("toy_heads")
@pytest.mark.parametrize("name", LIBRARIES)
def test_tables_of_an_installed_library(write, name):
    library = LIBRARIES[name]
    path, options = write(library.toys)[library.file]
    third = (8, 8) if "_geometric" in name else (3, 8)
    for new in ((2, 2), (7, 7), third):
        stored, weights, spec = load_at(path, new, options)
        with double_precision(), torch.no_grad():
            theirs = library.resample(stored[library.stored], spec.grid_size, new)
        ours = weights[library.name]
        rows = theirs.reshape(-1, ours.shape[-1])
        assert_parity(ours.reshape(-1, ours.shape[-1]), rows, msg=f"{spec.grid_size} -> {new}")
