"""TaskContext: the fields of an Outcome that every task fills in the same way."""

from pathlib import Path

import torch

from backbones.translating.report import ConversionReport
from mae_bench.config import JobConfig
from mae_bench.data.checks.layouts import LayoutReport
from mae_bench.job import Job
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.context import TaskContext


def test_an_outcome_names_the_data_and_the_backbone(tmp_path: Path) -> None:
    config = JobConfig(kind="knn", protocol="toy", data="somewhere", max_bad_images=0)
    job = Job("cell", "knn", {}, tmp_path, seed=0)
    layout = LayoutReport("imagenet", "toy", tmp_path, {"val": 9}, ("a", "b"), digest="d" * 64)
    spec = BackboneSpec("vit", (16, 16), (8, 8), 3, embed_dim=16, depth=2, num_heads=2)
    report = ConversionReport("export", "mae_bench", digest="e" * 64, dropped={"head.weight": "unused"})
    context = TaskContext(config, job, Progress(), layout, spec, report)
    assert context.device == torch.device("cpu")

    outcome = context.build_outcome(
        "imagenet",
        "val",
        9,
        {"top1": Metric(50.0)},
        "top1",
        num_params=7,
        cost={"seconds_eval": 1.5},
        notes=["a note"],
        artefacts={"log": "log.txt"},
    )
    assert (outcome.task, outcome.dataset, outcome.split, outcome.num_samples) == (
        "imagenet",
        "toy",
        "val",
        9,
    )
    assert (outcome.data_digest, outcome.backbone_digest) == (layout.digest, report.digest)
    assert (outcome.backbone_spec, outcome.conversion_report) == (spec.to_dict(), report.to_dict())
    assert outcome.cost["params"] == 7
    assert set(outcome.cost) == {"seconds_eval", "params", "peak_memory_mib"}
