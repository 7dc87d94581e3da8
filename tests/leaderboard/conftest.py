"""Fixtures that write folders of runs without running anything."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mae_bench.record import Failure, Metric, ResultRecord, write_failure, write_record

RECORD = ResultRecord(
    backbone="mae",
    task="imagenet",
    protocol="linear-90ep",
    dataset="shapes",
    split="val",
    num_samples=500,
    metrics={"top1": Metric(60.0)},
    main_metric="top1",
    seed=0,
    backbone_spec={"embed_dim": 192},
    backbone_digest="b" * 64,
    config={"kind": "linear_probe", "base_lr": 0.1, "data": "one/place"},
    config_digest="c" * 64,
    data_digest="d" * 64,
    cost={"seconds_train": 20.0, "seconds_eval": 2.0},
    versions={"torch": "2.14.1"},
    hardware={"cpu": "two cores"},
    command="mae-bench demo",
    started="2026-11-21T12:00:00Z",
    finished="2026-11-21T12:01:00Z",
)


class Folder:
    """A folder of runs that grows by one cell per call."""

    def __init__(self, root: Path):
        self.root, self.count = root, 0

    def next(self) -> Path:
        self.count += 1
        return self.root / "cells" / f"{self.count:03d}"

    def add(
        self,
        backbone: str,
        score: float,
        seed: int = 0,
        direction: str = "higher",
        unit: str = "%",
        **changes: object,
    ) -> Path:
        metric = Metric(score, unit, direction)  # type: ignore[arg-type]
        fields = {
            "backbone": backbone,
            "seed": seed,
            "metrics": {changes.get("main_metric", "top1"): metric},
            **changes,
        }
        path = self.next() / "record.json"
        write_record(replace(RECORD, **fields), path)  # type: ignore[arg-type]
        return path

    def fail(self, backbone: str, reason: str = "no such module", **changes: object) -> Path:
        failure = Failure(backbone, "imagenet", "linear-90ep", 0, "failed", reason, "make setup")
        path = self.next() / "failure.json"
        write_failure(replace(failure, **changes), path)  # type: ignore[arg-type]
        return path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "runs")


@pytest.fixture
def seeds(folder: Folder) -> Callable[..., None]:
    """Return a function that adds one record per score, with seeds 0, 1, ..."""

    def add(backbone: str, *scores: float, **changes: object) -> None:
        for seed, score in enumerate(scores):
            folder.add(backbone, score, seed, **changes)  # type: ignore[arg-type]

    return add
