"""Test that every published number has its source, and that the best-known ones are right."""

import pytest

from leaderboard.published import load_published, select_published


def test_every_row_has_its_source() -> None:
    for row in load_published():
        assert row.url.startswith("https://")
        assert all(
            (
                row.method,
                row.backbone,
                row.task,
                row.protocol,
                row.dataset,
                row.split,
                row.source,
                row.title,
                row.place,
            )
        )
        assert 0 < row.value < 100
        assert (row.unit, row.direction) == ("%", "lower" if row.metric == "mCE" else "higher")


def test_no_number_is_quoted_twice() -> None:
    keys = [
        (
            r.method,
            r.backbone,
            r.protocol,
            r.dataset,
            r.metric,
            r.source,
            r.place,
            r.note,
            r.ablation,
            r.blocks,
        )
        for r in load_published()
    ]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("backbone", "protocol", "metric", "dataset", "place", "value"),
    [
        ("ViT-B/16", "finetune-100ep", "top1", "ImageNet-1K", "Table 3", 83.6),
        ("ViT-L/16", "linear-90ep", "top1", "ImageNet-1K", "Table 12", 75.8),
        ("ViT-B/16", "maskrcnn-li2021-100ep", "AP_box", "COCO", "Table 4", 50.3),
        ("ViT-L/16", "maskrcnn-vitdet-100ep", "AP_mask", "COCO", "Table 5", 49.2),
        ("ViT-L/16", "upernet-100ep", "mIoU", "ADE20K", "Table 5", 53.6),
        ("ViT-H/14", "finetune-50ep", "mCE", "ImageNet-C", "Table 13", 33.8),
        ("ViT-L/16", "transfer", "top1", "iNaturalist 2018", "Table 6", 80.1),
        ("ViT-H/14 at 448", "transfer-448", "top1", "Places365", "Table 6", 60.3),
    ],
)
def test_the_mae_rows_match_the_papers(
    backbone: str, protocol: str, metric: str, dataset: str, place: str, value: float
) -> None:
    key = ("MAE", backbone, protocol, metric, dataset, place)
    found = [
        r.value
        for r in load_published()
        if (r.method, r.backbone, r.protocol, r.metric, r.dataset, r.place) == key
    ]
    assert found == [value]


def test_points_of_curves_and_rows_of_ablations_are_not_selected() -> None:
    assert any(row.blocks is not None for row in load_published())
    assert all(row.blocks is None and not row.ablation for row in select_published({"imagenet"}))


def test_only_tasks_that_were_run_are_selected() -> None:
    assert {row.task for row in select_published({"coco", "pretrain"})} == {"coco"}
