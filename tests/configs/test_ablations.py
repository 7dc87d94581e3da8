"""Each ablation differs from the default in what its name says; suites have the paper's rows, each once."""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from leaderboard.published import load_published
from mae_bench.config import CONFIGS, list_configs, load_yaml
from mae_bench.runner.plan import plan_of
from mae_bench.suite.config import complete_job, load_suite

CHANGES: dict[str, dict[str, Any]] = {
    **{f"decoder_depth_{depth}": {"decoder_depth": depth} for depth in (1, 2, 4, 12)},
    **{f"decoder_width_{width}": {"decoder_embed_dim": width} for width in (128, 256, 768, 1024)},
    "encoder_mask_tokens": {"encoder_mask_tokens": True},
    "target_pixels_norm": {"norm_pix_loss": True},
    "target_pca": {"target": "pca"},  # 96 coefficients is the field's default, too
    "target_hog": {"target": "hog"},
    "target_tokens": {"target": "tokens", "tokenizer": "file.pt"},
    "augment_none": {"augment": "none"},
    "augment_crop": {"augment": "crop"},
    "augment_color_jitter": {"color_jitter": 0.4},
    "mask_block_50": {"mask_sampling": "block", "mask_ratio": 0.5},
    "mask_block_75": {"mask_sampling": "block"},
    "mask_grid_75": {"mask_sampling": "grid"},
    **{f"mask_ratio_{percent}": {"mask_ratio": percent / 100} for percent in range(10, 100, 10)},
}
TABLE_1 = [
    "default",
    *(name for name in CHANGES if not name.startswith("mask_ratio") and name != "target_hog"),
]
FIGURE_5 = ["default", *(name for name in CHANGES if name.startswith("mask_ratio"))]
FIGURE_7 = ["default", *(f"epochs_{epochs}" for epochs in (100, 200, 400, 1600))]


@cache
def pretraining(name: str, *overrides: str) -> dict[str, Any]:
    return complete_job(name, load_yaml(name, ["data=somewhere", *overrides]))


def changes(job: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {key: job[key] for key in job if job[key] != default[key]}


@cache
def rows(suite: str) -> dict[str, dict[str, Any]]:
    return load_suite(f"suites/{suite}.yaml", ["data.root=somewhere"]).backbones


def test_the_default_is_table_1s() -> None:
    """Table 1's caption: ViT-L/16, 800 epochs, pixels not normalised; grey rows: depth 8, width 512, 75 %."""
    default = rows("paper_ablation")["default"]
    assert default == pretraining("pretrain/vit_large_800ep.yaml", "data=somewhere/imagenet")


def test_every_ablation_is_a_config_of_its_own() -> None:
    assert {Path(name).stem for name in list_configs("ablations")} == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_differs_from_the_default_in_what_it_is_called_after(name: str) -> None:
    given = ["tokenizer=file.pt"] if name == "target_tokens" else []
    found = changes(
        pretraining(f"ablations/{name}.yaml", *given), pretraining("pretrain/vit_large_800ep.yaml")
    )
    assert found.pop("protocol") != "mae-800ep"
    assert found == CHANGES[name]


def test_pca_keeps_the_papers_96_coefficients() -> None:
    assert pretraining("ablations/target_pca.yaml")["num_pca"] == 96


@pytest.mark.parametrize(
    ("suite", "names"), [("paper_table1", TABLE_1), ("paper_fig5", FIGURE_5), ("paper_fig7", FIGURE_7)]
)
def test_a_suite_has_the_papers_rows_under_the_names_of_the_published_numbers(
    suite: str, names: list[str]
) -> None:
    found = rows(suite)
    assert list(found) == names
    assert len({job["protocol"] for job in found.values()}) == len(found)
    published = Counter(row.ablation for row in load_published() if row.ablation)
    assert {published[name] for name in names} == {2}, "fine-tuned and linear"


def test_nothing_is_published_for_a_row_that_no_suite_has() -> None:
    assert {row.ablation for row in load_published() if row.ablation} == {*TABLE_1, *FIGURE_5, *FIGURE_7}


def test_the_parts_of_table_1_make_the_whole() -> None:
    whole, parts = rows("paper_table1"), [rows(f"paper_table1{letter}") for letter in "abcdef"]
    assert [name for part in parts for name in part if name != "default"] == list(whole)[1:]
    assert all(part[name] == whole[name] for part in parts for name in part)


def test_the_default_is_one_cell_of_all_of_them() -> None:
    """With one --out the pretraining that the suites share is done once."""
    cells = []
    for suite in ("paper_ablation", "paper_table1c", "paper_fig7"):
        found = plan_of(load_suite(f"suites/{suite}.yaml", ["data.root=x"], "out"))["cells"]
        cells.append({(cell["dir"], cell["key"]) for cell in found if cell["backbone"] == "default"})
    assert len(cells[0]) == 3
    assert all(cell == cells[0] for cell in cells)


@pytest.mark.parametrize(("suite", "num_rows"), [("paper_table1", 19), ("paper_fig5", 10)])
def test_a_plan_lists_every_pretraining_with_its_two_transfers(
    suite: str, num_rows: int, tmp_path: Path
) -> None:
    cells = plan_of(load_suite(CONFIGS / f"suites/{suite}.yaml", [f"data.root={tmp_path}"]))["cells"]
    assert Counter(cell["task"] for cell in cells) == {
        "backbone": num_rows,
        "finetune": num_rows,
        "linear": num_rows,
    }
    assert {cell["protocol"] for cell in cells if cell["task"] != "backbone"} == {
        "finetune-50ep",
        "linear-90ep",
    }
    assert all("imagenet is missing" in cell["reason"] for cell in cells)


def test_the_tokenizer_can_be_given_from_elsewhere() -> None:
    suite = load_suite(
        "suites/paper_table1d.yaml", ["data.root=x", "backbones.target_tokens.tokenizer=file.pt"]
    )
    assert suite.backbones["target_tokens"]["tokenizer"] == "file.pt"
    assert rows("paper_table1d")["target_tokens"]["tokenizer"] == "somewhere/tokenizer.pt"


@pytest.mark.parametrize("suite", ["demo_table1", "demo_fig5"])
def test_a_miniature_changes_what_the_papers_row_changes(suite: str) -> None:
    default = rows(suite)["default"]
    assert not default["norm_pix_loss"]
    found = {name: job for name, job in rows(suite).items() if name != "default"}
    for name, job in found.items():
        own = changes(job, default)
        del own["protocol"]
        if not name.startswith(("decoder_", "target_pca")):  # these are scaled
            assert own == CHANGES[name], name
    assert {
        name: changes(found[name], default)["decoder_embed_dim"] for name in found if "width" in name
    } == {f"decoder_width_{width}": width for width in (48, 192) if suite == "demo_table1"}


def test_a_miniature_keeps_the_papers_share_of_pca_coefficients() -> None:
    paper, demo = (rows(f"{name}_table1")["target_pca"] for name in ("paper", "demo"))
    shares = [
        job["num_pca"] / (3 * job["model"]["patch_size"][0] * job["model"]["patch_size"][1])
        for job in (paper, demo)
    ]
    assert shares[0] == shares[1] == 1 / 8
