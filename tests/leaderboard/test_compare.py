"""Test the comparison: known statistics, comparable records only, and no value for a missing score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from leaderboard.compare import compare
from leaderboard.index import load_runs
from leaderboard.table import Comparison

if TYPE_CHECKING:
    from tests.leaderboard.conftest import Folder


def read(folder: Folder, baseline: str = "supervised") -> Comparison:
    return compare(load_runs(folder.root), baseline)


def test_mean_std_and_paired_interval_by_hand(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 60.0, 62.0, 64.0)
    seeds("mae", 61.0, 64.0, 67.0)
    comparison = read(folder)
    assert comparison.rows == ["supervised", "mae"]
    base, cell = comparison.cells["supervised"][0], comparison.cells["mae"][0]
    assert (cell.mean, cell.std, cell.seeds, cell.seconds) == (64, 3, (0, 1, 2), 22)
    assert cell.is_best
    assert not base.is_best
    assert base.difference is None
    change = cell.difference
    assert change is not None
    margin = 4.30265 / math.sqrt(3)  # the seeds' differences are 1, 2, 3
    assert change.paired
    assert (change.value, change.low, change.high) == pytest.approx((2, 2 - margin, 2 + margin), abs=1e-4)
    assert change.better
    assert not change.is_clear
    assert (
        "mae 64.0 vs supervised 62.0: +2.0 (95 % CI -0.5 to +4.5, includes 0; 3 paired seeds)"
        in comparison.verdicts[0]
    )


def test_different_seeds_are_not_paired(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 60.0, 62.0, 64.0)
    seeds("mae", 61.0, 64.0)
    change = read(folder).cells["mae"][0].difference
    assert change is not None
    assert not change.paired
    assert change.value == pytest.approx(0.5)
    assert change.low is not None


def test_one_seed_has_a_difference_without_spread_or_interval(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 63.0)
    seeds("mae", 61.2)
    comparison = read(folder)
    cell = comparison.cells["mae"][0]
    assert cell.std is None
    assert cell.difference is not None
    assert (cell.difference.low, cell.difference.high, cell.difference.is_clear) == (None, None, False)
    assert comparison.verdicts == [
        "imagenet linear-90ep, top1: mae 61.2 vs supervised 63.0: -1.8 (no interval: one seed each)."
    ]


def test_lower_is_better(folder: Folder, seeds: Callable) -> None:
    for row, error in (("supervised", 50.0), ("mae", 45.0), ("random", 90.0)):
        seeds(row, error, direction="lower", main_metric="mCE")
    cells = read(folder).cells
    assert [cells[row][0].is_best for row in ("supervised", "mae", "random")] == [False, True, False]
    assert cells["mae"][0].difference.value == -5  # type: ignore[union-attr]
    assert cells["mae"][0].difference.better is True  # type: ignore[union-attr]
    assert cells["random"][0].difference.better is False  # type: ignore[union-attr]


def test_a_missing_score_is_never_zero(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 60.0)
    seeds("supervised", 20.0, task="coco", protocol="maskrcnn-li2021-100ep", main_metric="AP_box")
    seeds("mae", 61.0)
    folder.fail("random", task="coco", protocol="maskrcnn-li2021-100ep")
    comparison = read(folder)
    imagenet, coco = range(2)
    absent, failed = comparison.cells["mae"][coco], comparison.cells["random"][coco]
    assert (absent.status, absent.mean, absent.difference) == ("absent", None, None)
    assert (failed.status, failed.mean, failed.difference) == ("failed", None, None)
    assert failed.failures[0].reason == "no such module"
    assert comparison.cells["random"][imagenet].status == "absent"
    assert not comparison.cells["supervised"][coco].is_best  # alone in its column


def test_a_measured_zero_is_a_score(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 60.0)
    seeds("mae", 0.0)
    cell = read(folder).cells["mae"][0]
    assert (cell.status, cell.mean) == ("measured", 0.0)
    assert cell.difference is not None
    assert cell.difference.value == -60


def test_a_protocol_without_any_score_has_its_column(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 60.0)
    folder.fail("mae", task="ade20k", protocol="upernet-160k-512", status="not installed")
    comparison = read(folder)
    assert [column.task for column in comparison.columns] == ["imagenet", "ade20k"]
    assert comparison.cells["mae"][1].status == "not installed"
    assert comparison.verdicts[1] == "ade20k upernet-160k-512: no scores."


def test_a_failed_seed_next_to_measured_ones_is_kept(folder: Folder, seeds: Callable) -> None:
    seeds("mae", 60.0, 61.0)
    folder.fail("mae", seed=2)
    cell = read(folder).cells["mae"][0]
    assert (cell.status, cell.seeds, len(cell.failures)) == ("measured", (0, 1), 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data_digest": "e" * 64}, "data_digest"),
        ({"num_samples": 499}, "num_samples (500 / 499)"),
        ({"protocol_version": 3}, "protocol_version (absent / 3)"),
        ({"config": {"kind": "linear_probe", "base_lr": 0.2}}, "config.base_lr (0.1 / 0.2)"),
    ],
)
def test_records_that_differ_get_separate_columns_and_a_named_conflict(
    folder: Folder, seeds: Callable, change: dict, named: str
) -> None:
    seeds("supervised", 60.0, 61.0)
    seeds("mae", 62.0, **change)
    comparison = read(folder)
    assert [column.variant for column in comparison.columns] == ["A", "B"]
    assert [cell.mean for cell in comparison.cells["mae"]] == [None, 62.0]
    assert comparison.cells["mae"][1].difference is None
    assert len(comparison.problems) == 1
    assert named in comparison.problems[0]
    assert "2 separate columns" in comparison.problems[0]


@pytest.mark.parametrize("change", [{"split": "test"}, {"dataset": "other"}, {"protocol": "finetune-100ep"}])
def test_another_split_data_set_or_protocol_is_another_column_and_no_conflict(
    folder: Folder, seeds: Callable, change: dict
) -> None:
    seeds("supervised", 60.0)
    seeds("mae", 62.0, **change)
    comparison = read(folder)
    assert len(comparison.columns) == 2
    assert comparison.problems == []
    assert all(cell.difference is None for cell in comparison.cells["mae"])


def test_scores_of_two_versions_of_a_protocol_are_never_averaged(folder: Folder) -> None:
    folder.add("mae", 20.0, 0, protocol_version=1, versions={"torch": "2.11"}, code_digest="1" * 64)
    folder.add("mae", 99.0, 1, protocol_version=2, versions={"torch": "2.14"}, code_digest="2" * 64)
    comparison = read(folder)
    assert [cell.mean for cell in comparison.cells["mae"]] == [20.0, 99.0]
    assert [column.protocol_version for column in comparison.columns] == [1, 2]
    (problem,) = comparison.problems
    assert "differ in protocol_version (1 / 2)" in problem


def test_rows_of_other_code_or_another_torch_are_named(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 60.0, 61.0, code_digest="a" * 64)
    seeds("mae", 62.0, code_digest="b" * 64, versions={"torch": "2.11.0"})
    folder.add("mae", 63.0, 1, code_digest="a" * 64)
    seeds("random", 20.0, git_hash="c" * 40)
    comparison = read(folder)
    assert len(comparison.columns) == 1
    assert comparison.problems == [
        "imagenet linear-90ep was computed with different code: "
        "aaaaaaaaaaaa (mae, supervised) / bbbbbbbbbbbb (mae) / commit cccccccccccc (random)",
        "imagenet linear-90ep was computed with different torch: "
        "2.11.0 (mae) / 2.14.1 (mae, random, supervised)",
    ]
    assert comparison.cells["mae"][0].code == ("aaaaaaaaaaaa", "bbbbbbbbbbbb")


def test_many_rows_of_other_code_make_one_short_sentence(folder: Folder) -> None:
    folder.add("supervised", 60.0)
    for i in range(9):
        folder.add(f"row{i}", 60.0, code_digest="a" * 64)
    (problem,) = read(folder).problems
    assert "(row0, row1, row2, row3, row4 and 4 more)" in problem


def test_data_path_and_loading_options_make_no_difference(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 60.0)
    seeds(
        "mae",
        62.0,
        config={
            "kind": "linear_probe",
            "base_lr": 0.1,
            "data": "another/place",
            "num_workers": 4,
            "max_bad_images": 0.5,
        },
    )
    comparison = read(folder)
    assert len(comparison.columns) == 1
    assert comparison.problems == []


def test_a_score_of_a_backbone_that_was_not_pretrained_for_the_row_is_named(folder: Folder) -> None:
    pretrain: dict[str, Any] = {"task": "pretrain", "protocol": "mae", "main_metric": "loss"}
    folder.add("mae", 0.5, backbone_digest="1", **pretrain)
    folder.add("mae", 61.0, backbone_digest="1")
    folder.add("mae", 62.0, 1, backbone_digest="2")
    folder.add("supervised", 63.0, backbone_digest="3")
    (problem,) = read(folder).problems
    assert problem.startswith(
        "cells/003/record.json scores a backbone that differs from the recorded pretraining of mae"
    )


def test_the_newer_of_two_records_of_a_seed_is_used_and_both_are_named(folder: Folder) -> None:
    folder.add("supervised", 60.0)
    folder.add("mae", 61.0, finished="2026-11-21T13:00:00Z")
    folder.add("mae", 99.0, finished="2026-11-20T13:00:00Z")
    comparison = read(folder)
    assert comparison.cells["mae"][0].values == (61.0,)
    assert (
        "cells/002/record.json is the newest and is used, cells/003/record.json is ignored"
        in comparison.problems[0]
    )


def test_seeds_of_different_architectures_are_named(folder: Folder) -> None:
    folder.add("mae", 61.0, 0)
    folder.add("mae", 62.0, 1, backbone_spec={"embed_dim": 384})
    assert "different architectures" in read(folder).problems[0]


def test_without_the_baseline_there_are_scores_but_no_differences(folder: Folder, seeds: Callable) -> None:
    seeds("mae", 61.0, 62.0)
    seeds("random", 20.0, 21.0)
    comparison = read(folder)
    assert comparison.cells["mae"][0].mean == 61.5
    assert comparison.cells["mae"][0].difference is None
    assert "no row named supervised" in comparison.notes[0]
    assert "supervised has no score" in comparison.verdicts[0]


def test_the_baseline_can_be_chosen(folder: Folder, seeds: Callable) -> None:
    seeds("mae", 61.0)
    seeds("random", 20.0)
    comparison = read(folder, "random")
    assert comparison.rows == ["random", "mae"]
    assert comparison.cells["mae"][0].difference.value == 41  # type: ignore[union-attr]


def test_identical_scores_in_every_seed_give_no_interval(folder: Folder, seeds: Callable) -> None:
    seeds("supervised", 40.0, 40.0, 40.0)
    seeds("mae", 53.5, 53.5, 53.5)
    seeds("other", 53.0, 53.5, 54.0)
    comparison = read(folder)
    change = comparison.cells["mae"][0].difference
    assert change is not None
    assert (change.value, change.better, change.low, change.is_clear) == (13.5, True, None, False)
    assert comparison.cells["other"][0].difference.is_clear  # type: ignore[union-attr]
    assert (
        "mae 53.5 vs supervised 40.0: +13.5 (no interval: identical scores in every seed)"
        in comparison.verdicts[0]
    )
    assert any("every seed gave the same score" in note for note in comparison.notes)


def test_pretraining_is_a_cost_and_not_a_column(folder: Folder, seeds: Callable) -> None:
    seeds("mae", 61.0)
    seeds(
        "mae",
        0.4,
        task="pretrain",
        protocol="mae-800ep",
        main_metric="loss",
        cost={"seconds_train": 240.0, "params": 5e6},
    )
    seeds("random", 20.0, cost={})
    comparison = read(folder)
    assert [column.task for column in comparison.columns] == ["imagenet"]
    mae, random = comparison.totals
    assert (mae.seconds_pretrain, mae.seconds_transfer) == (240, 22)
    assert (random.seconds_pretrain, random.seconds_transfer) == (None, None)
    pretraining = comparison.costs[0]
    assert (pretraining.task, pretraining.params, pretraining.gmacs) == ("pretrain", 5e6, None)


@pytest.mark.parametrize(
    ("config", "cost", "seconds"),
    [
        ({"epochs": 3}, {"seconds_train": 20.0, "seconds_eval": 2.0}, 22),
        ({"epochs": 3}, {"seconds_eval": 2.0}, None),  # trained, without a recorded time
        ({"epochs": 3}, {"seconds_train": 20.0, "seconds_features": 5.0, "seconds_eval": 2.0}, 27),
        ({"ks": [20]}, {"seconds_features": 5.0, "seconds_eval": 2.0}, 7),  # nothing was trained
        ({}, {"params": 5e6}, None),
    ],
)
def test_the_time_of_a_transfer_is_the_sum_of_its_parts(
    folder: Folder, config: dict[str, object], cost: dict[str, float], seconds: float | None
) -> None:
    folder.add("mae", 61.0, config=config, cost=cost)
    comparison = read(folder)
    assert comparison.cells["mae"][0].seconds == seconds
    assert comparison.totals[0].seconds_transfer == seconds
    assert comparison.costs[0].seconds_features == cost.get("seconds_features")


def test_seeds_of_one_backbone_are_noted_as_spread_of_the_transfer(folder: Folder, seeds: Callable) -> None:
    seeds("mae", 60.0, 61.0)
    folder.add("random", 20.0, 0)
    folder.add("random", 21.0, 1, backbone_digest="e" * 64)
    note = next(note for note in read(folder).notes if "transfer the same backbone" in note)
    assert "mae" in note
    assert "random" not in note


def test_columns_follow_the_tasks(folder: Folder) -> None:
    for task in ("video", "ade20k", "coco", "imagenet"):
        folder.add("mae", 1.0, task=task)
    assert [column.task for column in read(folder).columns] == ["imagenet", "coco", "ade20k", "video"]
