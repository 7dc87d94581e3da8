"""Features of the authors' own code: every honest variant of their files gives them exactly, or is refused.

The golden files of `tests/foreign/golden` hold names, shapes, a seed and the features in float64 of models
that the authors' code ran (`tests/foreign/make_golden.py`). Here each file is rebuilt from the seed, without
that code, and loaded as a user would.

Legend: N batch, L tokens, D width, C channels, H W image.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from backbones.load import load_backbone
from backbones.mae import load_mae
from backbones.translating.grids import SQUARE
from mae_bench.errors import UserError
from tests.foreign import layouts
from tests.foreign.drawing import draw_images, draw_noise, draw_state, pick_values, unfold_blocks
from tests.foreign.layouts import CONTAINERS, LAYOUTS, WRAPS, State
from tests.parity import FLOAT32_TABLES

GOLDEN = Path(__file__).parent.parent / "foreign" / "golden"
TOLERANCE = 1e-9  # relative to the largest feature


@dataclass(frozen=True)
class Case:
    """One file and what must become of it.

    expect: "equal" to the authors' features, or "refused" as nothing in the file states a fact.
    unsaid: BackboneSpec fields that the user does not give. wrap, container: keys of `layouts`. edit: a
    change of the state.
    """

    family: str
    model: str
    file: str
    wrap: str = ""
    container: str = ""
    unsaid: tuple[str, ...] = ()
    edit: str = ""
    expect: str = "equal"
    whole: bool = field(default=False)  # the autoencoder with its decoder, by load_mae

    def __str__(self) -> str:
        parts = [self.family, self.model, self.container or self.file, self.wrap, self.edit]
        parts += [f"no-{name}" for name in self.unsaid] + (["whole"] if self.whole else [])
        return "/".join(part for part in parts if part)


@cache
def read_golden(family: str) -> dict[str, Any]:
    """Return the golden models of a family by name, each with its tensors' shapes."""
    models: dict[str, Any] = json.loads((GOLDEN / f"{family}.json").read_text())["models"]
    for record in models.values():
        if isinstance(record["tensors"], str):
            record["tensors"] = models[record["tensors"]]["tensors"]
    return models


REFUSED = {
    # no plain ViTs
    "moco_v3/conv-stem",
    "deit3/parallel",
    "deit3/parallel-unscaled",
    # a ViT that two formats fit
    "mae_lite/fine-cls",
}
FAMILIES = tuple(LAYOUTS)
PARTS = {
    "dinov2": ("backbone.", "dino_head.", "ibot_head."),
    "ijepa": ("target_encoder.", "predictor."),
}  # wrapped each by itself
FORMATS = {"mae": "official_mae", "mae_lite": "official_mae", "crossmae": "official_mae", "timm_032": "timm"}


def make_cases() -> list[Case]:
    """Return every family's models, files, wrappers and containers, and what a user may leave unsaid."""
    cases: list[Case] = []
    for family in FAMILIES:
        models = read_golden(family)
        base = "base" if "base" in models else next(iter(models))
        cases += [make_model_case(family, name) for name in models]
        if family != "timm_032":
            cases += make_base_cases(family, base, models)
        cases += make_unsaid_cases(family, base, models)
    return cases + make_whole_cases()


def make_model_case(family: str, name: str) -> Case:
    """Return the case of a model in its family's own file, with everything said."""
    expect = "refused" if f"{family}/{name}" in REFUSED else "equal"
    return Case(family, name, get_file(family, name), expect=expect)


def get_file(family: str, name: str) -> str:
    """Return the file that the training of a model writes."""
    files = LAYOUTS[family]
    return "probe" if name.startswith("probe") and "probe" in files else next(iter(files))


def make_base_cases(family: str, base: str, models: dict[str, Any]) -> list[Case]:
    """Return the base model in the family's other files, wrapped, in other containers, without a block."""
    first, *others = (file for file in LAYOUTS[family] if file != "probe")
    rounded = "float16" in models  # a sine table in half precision has features of its own
    wraps = [wrap for wrap in WRAPS if not (rounded and wrap in ("float16", "bfloat16"))]
    cases = [Case(family, base, file) for file in others]
    cases += [Case(family, base, first, wrap=wrap) for wrap in wraps]
    for container in CONTAINERS:
        half = rounded and container.endswith("-half")
        expect = "refused" if family == "crossmae" else "equal"  # without its marks no format lacks a norm
        cases.append(Case(family, "float16" if half else base, "", container=container, expect=expect))
    return [*cases, Case(family, base, first, edit="without-block-0", expect="refused")]


def make_unsaid_cases(family: str, base: str, models: dict[str, Any]) -> list[Case]:
    """Return models whose heads or whose image size the user does not state."""
    first = next(iter(LAYOUTS[family]))
    heads = [name for name in models if name == base or re.search("192|384|released|vit-small", name)]
    shapes = re.compile(f"{base}|fine|absolute|learned|distilled|registers|.*grid.*")
    unsaid = [("num_heads", name) for name in heads]
    unsaid += [("img_size", name) for name in models if shapes.fullmatch(name)]
    return [
        Case(family, name, first, unsaid=(what,), expect=expect_unsaid(family, name, what))
        for what, name in unsaid
    ]


def expect_unsaid(family: str, name: str, what: str) -> str:
    """Return "equal" where the file shows what the user does not say.

    Heads: bias tables have a column for each, and a family's code builds its released sizes with one number.
    Images: the values of a sine table and the index of a bias table show the grid, and the code of some
    families builds squares only.
    """
    record = read_golden(family)[name]
    if what == "img_size":
        shown = family in SQUARE or bool(record["tables"])
    else:
        has_columns = any(tensor.endswith("relative_position_bias_table") for tensor in record["tensors"])
        shown = has_columns or name.startswith("released")
    return "equal" if shown else "refused"


def make_whole_cases() -> list[Case]:
    """Return the autoencoders with their decoders, with the decoder's heads said and unsaid."""
    cases: list[Case] = []
    for family in ("mae", "mae_lite"):
        for name, record in read_golden(family).items():
            if "pred" not in record:
                continue
            expect = "refused" if name == "mlp-2" else "equal"  # a decoder with another MLP ratio
            cases.append(Case(family, name, "checkpoint", whole=True, expect=expect))
            if name == "base" or "decoder" in name or "released" in name:
                unsaid = ("decoder_num_heads",)
                expect = expect_unsaid(family, name, "decoder_num_heads")
                cases.append(Case(family, name, "checkpoint", whole=True, unsaid=unsaid, expect=expect))
    return cases


CASES = make_cases()


def draw_file_state(record: dict[str, Any], seed: int) -> State:
    state = draw_state(unfold_blocks(record["tensors"]), seed, record["tables"])
    dtype: torch.dtype = getattr(torch, record["dtype"])
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def write_file(case: Case, record: dict[str, Any], folder: Path) -> Path:
    """Write the checkpoint of a case, as the authors' training or another tool would."""
    state, other = (draw_file_state(record, record["seed"] + extra) for extra in (0, 1))
    if case.container:
        return CONTAINERS[case.container](folder, layouts.take_backbone(record["vit"], state))
    if case.edit:
        number = int(case.edit.rpartition("-")[2])
        state, other = layouts.drop_block(state, number), layouts.drop_block(other, number)
    if case.wrap:
        state, other = (
            layouts.wrap(case.wrap, part, PARTS.get(case.family, ("",))) for part in (state, other)
        )
    return layouts.write_pickle(folder, LAYOUTS[case.family][case.file].build(state, other))


def get_options(case: Case, record: dict[str, Any]) -> dict[str, Any]:
    """Return what a user says to load the file."""
    size = tuple(record["imgs"][2:])
    overrides: dict[str, Any] = {
        "num_heads": record["num_heads"],
        "img_size": tuple(record.get("img_size", size)),
    }
    if case.family == "timm_032":
        overrides["norm_eps"] = 1e-5 if case.model == "vit-small" else 1e-6
    options: dict[str, Any] = {
        "overrides": {key: value for key, value in overrides.items() if key not in case.unsaid}
    }
    if case.container:
        options["format"] = FORMATS.get(case.family, case.family)
    else:
        options |= LAYOUTS[case.family][case.file].options
    if "img_size" in record:
        options["img_size"] = size
    return options


def get_tolerance(case: Case) -> float:
    """Return the tolerance: tables are resampled in float32, here and in DINOv2's code."""
    return FLOAT32_TABLES if "img_size" in read_golden(case.family)[case.model] else TOLERANCE


@torch.no_grad()
def compare(case: Case, folder: Path) -> float:
    """Return the largest difference from the authors' features, relative to the largest of them."""
    record = read_golden(case.family)[case.model]
    path, options = write_file(case, record, folder), get_options(case, record)
    imgs = draw_images(record["seed"], record["imgs"])
    if case.whole:
        ours, reference = reconstruct(case, record, path, options, imgs), record["pred"]
    else:
        model: Any = load_backbone(path, **options)[0].double()
        ours, reference = extract(model, imgs, record["output"]), record["values"]
        if list(ours.shape) != record["shape"]:
            return float("inf")
    theirs = torch.tensor(reference, dtype=torch.float64)
    found = torch.tensor(pick_values(ours), dtype=torch.float64)
    return ((found - theirs).abs().max() / theirs.abs().max()).item()


def extract(model: Any, imgs: torch.Tensor, output: str) -> torch.Tensor:
    """Features (N, L, D) of all tokens, or (N, D) pooled or of the class token."""
    tokens = model.forward_features(imgs)
    if output == "tokens":
        return tokens
    return model.forward_head(tokens, pre_logits=True) if output == "pooled" else tokens[:, 0]


def reconstruct(
    case: Case, record: dict[str, Any], path: Path, options: dict[str, Any], imgs: torch.Tensor
) -> torch.Tensor:
    """Predictions (N, L, p p C) with the golden file's mask."""
    if "decoder_num_heads" not in case.unsaid:
        options["decoder_num_heads"] = record["decoder_heads"]
    model = load_mae(path, **options)[0].double()
    num_patches = imgs.shape[2] * imgs.shape[3] // record["patch"] ** 2
    return model(imgs, 0.75, draw_noise(record["seed"], len(imgs), num_patches))[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_features_of_the_authors_code(case, tmp_path):
    try:
        difference = compare(case, tmp_path)
    except UserError:
        assert case.expect == "refused"
        return
    assert case.expect == "equal", "a file that must be refused was loaded"
    assert difference <= get_tolerance(case)
