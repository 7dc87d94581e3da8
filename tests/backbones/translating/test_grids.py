"""The grid of a learned table: stated by the user or the file, the family's, else asked for."""

from argparse import Namespace
from typing import Any

import pytest
import timm
import torch

from backbones.config import CheckpointConfig
from backbones.describe import describe
from backbones.inspection import inspect_checkpoint
from backbones.load import load_backbone
from backbones.translating.detect import FORMATS
from backbones.translating.grids import RELEASED, SQUARE, TIMM, MissingGrid, find_grids
from backbones.translating.infer import MissingHeads
from mae_bench.errors import UserError
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec
from tests.backbones.formats.plain_vit import encoder_shapes
from tests.backbones.formats.reference import Shapes, check_real_size, fill, prefixed
from tests.foreign.drawing import build_index

BIASES = "blocks.0.attn.relative_position_bias_table"


def shapes(rows: int, patch: int = 16) -> Shapes:
    """Return the shapes of a small encoder with a table of a class token and `rows` patches."""
    return encoder_shapes(192, 1, patch=patch) | {"pos_embed": (1, 1 + rows, 192)}


@pytest.fixture
def write(tmp_path):
    """Write a DeiT with a learned table of some rows and other contents of the file."""

    def save(rows: int = 36, **content: Any) -> Any:
        torch.save({"model": fill(shapes(rows)), **content}, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    return save


def read(path: Any, **overrides: Any) -> tuple[tuple[int, int], str]:
    """Return the image size and its origin."""
    options: Any = {"format": "deit", "overrides": {"num_heads": 3, **overrides}}
    found = inspect_checkpoint(path, **options)
    return tuple(found["spec"]["img_size"]), found["origins"]["img_size"]


def test_a_learned_table_of_several_grids_asks(write):
    with pytest.raises(MissingGrid) as error:
        read(write())
    assert error.value.grids == [(6, 6), (4, 9), (9, 4), (3, 12), (12, 3), (2, 18), (18, 2), (1, 36), (36, 1)]
    assert "fits grids of 6 x 6, 4 x 9, 9 x 4, 3 x 12, 12 x 3, 2 x 18, ... patches" in error.value.given
    assert "img_size=[96,96] or img_size=[64,144]" in error.value.expected
    assert error.value.fix.startswith(
        "give img_size=[H,W] to inspect or convert, backbones.NAME.spec.img_size="
    )


def test_the_question_for_the_heads_repeats_the_size_that_was_given(tmp_path):
    """Typed literally, its command must not ask for the size again."""
    path = tmp_path / "x.pth"
    torch.save(fill(shapes(36)), path)
    with pytest.raises(MissingHeads) as error:
        load_backbone(path, overrides={"img_size": [64, 144]})
    assert f"mae-bench inspect {path} 'img_size=[64, 144]' --images FOLDER" in error.value.fix


@pytest.mark.parametrize("rows", [35, 37])
def test_a_number_that_is_no_square_asks(write, rows):
    with pytest.raises(MissingGrid):
        read(write(rows))


@pytest.mark.parametrize("size", [96, [64, 144], [144, 64]])
def test_the_users_size_is_taken(write, size):
    assert read(write(), img_size=size) == (tuple(size) if isinstance(size, list) else (96, 96), "given")


def test_a_size_of_another_number_of_patches_is_refused(write):
    with pytest.raises(UserError, match=r"\(80, 80\) where the shapes say \(96, 96\) or \(64, 144\) or"):
        read(write(), img_size=80)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ({"args": Namespace(input_size=96)}, (96, 96)),
        ({"args": {"img_size": [64, 144]}}, (64, 144)),
        ({"hyper_parameters": {"backbone": {"kwargs": {"img_size": (144, 64)}}}}, (144, 64)),
        ({"args": Namespace(input_size=[3, 32, 288])}, (32, 288)),
        ({"args": Namespace(input_size=224, model_kwargs={"img_size": 96})}, (96, 96)),  # 224 are 196 patches
    ],
)
def test_what_the_file_states_is_listened_to(write, content, size):
    path = write(**content)
    assert read(path) == (size, "stated by the file")
    assert read(path, img_size=[16, 576]) == ((16, 576), "given")


@pytest.mark.parametrize("value", [True, "96", None, 96.5, [96], [1, 2, 3, 4], [-96, -96], 0, {"h": 96}])
def test_what_is_no_size_is_no_evidence(write, value):
    with pytest.raises(MissingGrid):
        read(write(args=Namespace(input_size=value)))


def test_a_released_square_is_assumed_and_recorded(write):
    origin = "assumed: 14 x 14 patches, as in deit's released files; other grids fit too"
    assert read(write(196)) == ((224, 224), origin)
    assert read(write(196), img_size=[112, 448]) == ((112, 448), "given")
    _, _, report = load_backbone(write(196), format="deit", overrides={"num_heads": 3})
    assert f"img_size (224, 224): {origin}" in report.assumptions


def test_plan_reports_the_question_and_the_assumption(write):
    def config(**spec: Any) -> CheckpointConfig:
        spec = {"num_heads": 3, **spec}
        given = {"kind": "checkpoint", "source": str(path), "format": "deit", "spec": spec}
        return CheckpointConfig.model_validate(given)

    path = write(36)
    with pytest.raises(MissingGrid):
        describe(config())
    found, assumptions = describe(config(img_size=[64, 144]))
    assert found is not None
    assert found.img_size == (64, 144)
    assert not any("img_size" in line for line in assumptions)
    path = write(196)
    assert any(line.startswith("img_size (224, 224): assumed") for line in describe(config())[1])


@pytest.mark.parametrize("family", ["dino", "ibot", "ijepa"])
def test_families_whose_code_builds_squares_only_need_no_question(family):
    content: Any = {
        "dino": {"teacher": prefixed("backbone.", shapes(36)) | {"head.last_layer.weight_g": (9, 1)}},
        "ibot": {"state_dict": shapes(36) | {"masked_embed": (1, 192)}},
        "ijepa": {
            "target_encoder": prefixed("module.", encoder_shapes(192, 1, 96, 16, tokens=())),
            "predictor": {},
        },
    }[family]
    spec = check_real_size(family, content, overrides={"num_heads": 3})
    assert spec.img_size == (96, 96)


def test_one_patch_has_one_grid(write):
    assert read(write(1)) == ((16, 16), "inferred from the tensors")


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (5, 13), (8, 8), (2, 1)])
def test_a_bias_table_with_positions_shows_all_but_the_direction(grid):
    weights = beit_weights(grid) | {"pos_embed": torch.zeros(1, 1 + grid[0] * grid[1], 32)}
    found = find_grids(weights, {"arch": "beit"})
    assert found is not None
    assert set(found) == {grid, grid[::-1]}


def beit_weights(grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    spec = BackboneSpec(
        "beit",
        (grid[0] * 8, grid[1] * 8),
        (8, 8),
        3,
        32,
        1,
        2,
        options={"use_abs_pos_emb": False, "use_rel_pos_bias": True},
    )
    return build_vit(spec).state_dict()


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (5, 13), (8, 8), (1, 5), (5, 1)])
def test_the_index_of_a_bias_table_shows_the_grid(tmp_path, grid):
    """65 patches of 5 x 13 have as many offsets, 225, as 64 of 8 x 8; a row has the index of a column."""
    weights = beit_weights(grid)
    index = BIASES.replace("bias_table", "index")
    torch.save({"model": weights | {index: build_index(grid)}}, tmp_path / "x.pth")
    torch.save({"model": weights | {index: torch.zeros(())}}, tmp_path / "without.pth")
    size = (grid[0] * 8, grid[1] * 8)
    if 1 in grid:
        with pytest.raises(MissingGrid):
            load_backbone(tmp_path / "x.pth", format="beit")
    else:
        found = inspect_checkpoint(tmp_path / "x.pth", format="beit")
        assert (tuple(found["spec"]["img_size"]), found["origins"]["img_size"]) == (
            size,
            "inferred from the tensors",
        )
    with pytest.raises(MissingGrid):
        load_backbone(tmp_path / "without.pth", format="beit")
    for name in ("x", "without"):
        path = tmp_path / f"{name}.pth"
        assert load_backbone(path, format="beit", overrides={"img_size": size})[1].img_size == size


def test_mean_and_std_of_saved_arguments_do_not_come_from_the_tensors(tmp_path):
    args = Namespace(imagenet_default_mean_and_std=True, input_size=24)
    torch.save({"model": beit_weights((3, 3)), "args": args}, tmp_path / "x.pth")
    origins = inspect_checkpoint(tmp_path / "x.pth", format="beit")["origins"]
    assert {origins[name] for name in ("mean", "std", "img_size")} == {"stated by the file"}


def test_every_family_is_listed_that_has_learned_tables():
    exact = {"mae_bench", "sam", "hf_sam", "dinov3", "hf_dinov3"}  # the spec, the shape, or no table
    assert RELEASED.keys() | SQUARE.keys() | exact == FORMATS.keys() | {
        "mae_lite"
    }  # in official_mae's layout
    assert not RELEASED.keys() & SQUARE.keys()


def test_timms_pretrained_vits_need_no_question():
    """Their image sizes in whole patches, by the names of the models."""
    sides = set()
    for name in timm.list_pretrained(["vit_*patch*", "deit*", "beit*", "eva*"]):
        patch = int(name.partition("patch")[2].split("_")[0].split(".")[0])
        cfg: Any = timm.models.get_pretrained_cfg(name)
        height, width = cfg.input_size[1:]
        sides.add((height // patch, width // patch))
    oblong = {grid for grid in sides if grid[0] != grid[1]}
    assert {side for side, _ in sides - oblong} <= set(TIMM)
    assert all((h * w) ** 0.5 % 1 for h, w in oblong), "an oblong grid would be taken for a square"
