"""Position tables at other sizes, by the authors' own resampling code (see `make_golden.py`).

A family's fine-tuning script often resamples inside `main`; that block of it is run as it stands, on a model
that only has the sizes that it asks for.

Legend: L patches, D width, h w grid of patches, p patch side.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline

Size = tuple[int, int]  # pixels
State = dict[str, torch.Tensor]  # in float64, by the names of the file
Resample = Callable[[State, Mapping[str, Any], Size], torch.Tensor]  # the golden record and the new size
SQUARES, OBLONG = ((32, 32), (96, 96), (112, 112)), ((32, 32), (112, 112), (32, 96))
SIZES_14 = ((28, 28), (98, 98), (28, 84))  # of patches of 14
BIAS_TABLE = "relative_position_bias_table"
# family/model -> process of `make_golden.SOURCES` that runs it, code, sizes of the images, function
CASES: dict[str, tuple[str, str, tuple[Size, ...], Resample]] = {}


class Interp2d:
    """scipy's interp2d, which was removed: on a grid it was this spline."""

    def __init__(self, x: Any, y: Any, z: np.ndarray, kind: str):
        assert kind == "cubic"
        self.spline = RectBivariateSpline(y, x, z)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(self.spline(y, x))


@contextmanager
def double_precision() -> Iterator[None]:
    """Let code compute in float64 that casts its tables to float32."""
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
            mock.patch.object(torch, "float32", torch.float64),
            mock.patch("scipy.interpolate.interp2d", Interp2d, create=True),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def case(name: str, code: str, sizes: tuple[Size, ...], process: str = "") -> Callable[[Resample], Resample]:
    """Register a function for a model of a golden file."""

    def register(resample: Resample) -> Resample:
        CASES[name] = (process or name.partition("/")[0], code, sizes, resample)
        return resample

    return register


def count_patches(size: Size, patch: int) -> int:
    return size[0] // patch * (size[1] // patch)


def size_model(record: Mapping[str, Any], table: torch.Tensor, size: Size) -> Any:
    """Return a model of another size, as scripts see it; `loaded` receives the state that they load."""
    grid = record["imgs"][2] // record["patch"] * (record["imgs"][3] // record["patch"])
    num_patches = count_patches(size, record["patch"])
    rows = table.shape[1] - grid + num_patches
    model = SimpleNamespace(loaded={}, patch_embed=SimpleNamespace(num_patches=num_patches))
    model.pos_embed = torch.empty(1, rows, table.shape[2])
    model.state_dict = dict
    model.load_state_dict = lambda state, strict: model.loaded.update(state)
    return model


def run_block(script: str, test: str, names: dict[str, Any]) -> None:
    """Run the block `if TEST:` of `main` in a script, which need not be importable, with these variables."""
    spec = find_spec(script)
    assert spec is not None
    assert spec.origin is not None
    main = next(
        node
        for node in ast.parse(Path(spec.origin).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    found = (node for node in ast.walk(main) if isinstance(node, ast.If) and ast.unparse(node.test) == test)
    exec(compile(ast.Module([next(found)], []), spec.origin, "exec"), {"torch": torch, "np": np} | names)


MAE = "facebookresearch/mae util/pos_embed.py interpolate_pos_embed"


@case("mae/base", MAE, SQUARES)
@case("mae/fine", MAE, SQUARES)
@case("mae_lite/base", f"{MAE} (MAE-Lite has none)", SQUARES, "mae")
@case("crossmae/base", "TonyLianLong/CrossMAE util/pos_embed.py interpolate_pos_embed", SQUARES)
def interpolate_maes(state: State, record: Mapping[str, Any], size: Size) -> torch.Tensor:
    model = size_model(record, state["pos_embed"], size)
    import_module("util.pos_embed").interpolate_pos_embed(model, state)
    return state["pos_embed"]


DEIT = "facebookresearch/deit main.py main (args.finetune)"


@case("deit/base", DEIT, SQUARES)
@case("deit/distilled", DEIT, SQUARES)
@case("deit3/base", DEIT, SQUARES)
@case(
    "moco_v3/base",
    f"{DEIT}, where it is fine-tuned (facebookresearch/moco-v3 README.md); vits.py has none",
    SQUARES,
    "deit",
)
def interpolate_deits(state: State, record: Mapping[str, Any], size: Size) -> torch.Tensor:
    state = {"pos_embed": state[f"{record['vit']}pos_embed"]}
    model = size_model(record, state["pos_embed"], size)
    args = SimpleNamespace(finetune="its file")
    with mock.patch("torch.load", return_value={"model": state}):
        run_block("main", "args.finetune", {"args": args, "model": model})
    return model.loaded["pos_embed"]


@case("dino/base", "facebookresearch/dino vision_transformer.py interpolate_pos_encoding", OBLONG)
@case("ibot/base", "bytedance/ibot models/vision_transformer.py interpolate_pos_encoding", OBLONG)
def interpolate_dinos(state: State, record: Mapping[str, Any], size: Size) -> torch.Tensor:
    table, patch = state["backbone.pos_embed"], record["patch"]
    try:
        vits = import_module("vision_transformer")
    except ModuleNotFoundError:
        vits = import_module("models.vision_transformer")
    vit = vits.VisionTransformer(
        img_size=[64], patch_size=patch, embed_dim=table.shape[2], depth=1, num_heads=1
    )
    return interpolate_tokens(vit, table, size, patch)


def interpolate_tokens(vit: Any, table: torch.Tensor, size: Size, patch: int) -> torch.Tensor:
    """Call interpolate_pos_encoding, which takes tokens (N, 1 + L, D), height and width."""
    vit.pos_embed.data = table
    out: torch.Tensor = vit.interpolate_pos_encoding(
        torch.empty(1, 1 + count_patches(size, patch), table.shape[2]), *size
    )
    return out.detach()


DINOV2 = "facebookresearch/dinov2 dinov2/models/vision_transformer.py interpolate_pos_encoding"


@case("dinov2/base", DINOV2, SIZES_14)
@case("dinov2/registers", f"{DINOV2} (interpolate_antialias, no offset)", SIZES_14)
def interpolate_dinov2s(state: State, record: Mapping[str, Any], size: Size) -> torch.Tensor:
    table, patch = state["backbone.pos_embed"], record["patch"]
    registers = "backbone.register_tokens" in state
    vit = import_module("dinov2.models.vision_transformer").DinoVisionTransformer(
        img_size=56,
        patch_size=patch,
        embed_dim=table.shape[2],
        depth=1,
        num_heads=1,
        block_chunks=0,
        interpolate_antialias=registers,
        interpolate_offset=0.0 if registers else 0.1,
    )
    resampled = interpolate_tokens(vit, table, size, patch)
    return resampled[:, 1:] if registers else resampled  # the class token's row is added to the token


BEIT = "microsoft/unilm beit/run_class_finetuning.py main (args.finetune)"


@case("beit/base", BEIT, SQUARES)
@case("beit/own", BEIT, SQUARES)
@case("beit/absolute", BEIT, SQUARES)
def interpolate_beits(state: State, record: Mapping[str, Any], size: Size) -> torch.Tensor:
    names = {
        "args": SimpleNamespace(finetune="its file", model_key="model", model_prefix=""),
        "model": build_beit(import_module("modeling_finetune"), state, record, size),
        "interpolate": SimpleNamespace(interp2d=Interp2d),
        "utils": mock.Mock(),
    }
    with mock.patch("torch.load", return_value={"model": state}):
        run_block("run_class_finetuning", "args.finetune", names)
    return state["pos_embed"] if "pos_embed" in state else state[f"blocks.1.attn.{BIAS_TABLE}"]


def build_beit(models: Any, state: State, record: Mapping[str, Any], size: Size) -> Any:
    absolute = any(name.endswith("pos_embed") for name in state)
    width = next(tensor.shape[2] for name, tensor in state.items() if name.endswith("cls_token"))
    return models.VisionTransformer(
        img_size=size,
        patch_size=record["patch"],
        embed_dim=width,
        depth=2,
        num_heads=record["num_heads"],
        qkv_bias=True,
        init_values=0.1,
        use_abs_pos_emb=absolute,
        use_rel_pos_bias=not absolute,
    )


@case("simmim/base", "microsoft/SimMIM utils.py remap_pretrained_keys_vit", SQUARES)
def interpolate_simmims(state: State, record: Mapping[str, Any], size: Size) -> torch.Tensor:
    model = build_beit(import_module("models.vision_transformer"), state, record, size)
    state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    logger = SimpleNamespace(info=lambda text: None)
    return import_module("utils").remap_pretrained_keys_vit(model, state, logger)[
        f"blocks.1.attn.{BIAS_TABLE}"
    ]
