"""The demo's claim: a linear probe on MAE features beats random weights by more than its spread."""

from pathlib import Path

import pytest

from mae_bench.config import build, load_yaml
from mae_bench.data.demo.demo import DemoConfig, DemoSet, make_demo_data
from mae_bench.job import EXPORT, Job
from mae_bench.pretrain.config import PretrainConfig, RandomConfig
from mae_bench.pretrain.job import run, run_random
from mae_bench.progress import Progress
from tasks.imagenet import linear_probe
from tasks.imagenet.config import LinearProbeConfig

pytestmark = [pytest.mark.extended, pytest.mark.slow]

SEEDS = (0, 1, 2)
ONE = DemoSet(img_size=64, num_train=1, num_val=1)  # of the data sets that are not read here


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo's classification images."""
    root = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(root, DemoConfig(coco=ONE, ade20k=ONE))
    return str(root / "imagenet")


def job(folder: Path, seed: int, backbone: str = "") -> Job:
    folder.mkdir(parents=True)
    return Job(folder.name, "test", {}, folder, seed, backbone)


def probe(images: str, backbone: Path, seed: int) -> float:
    """top1 of the demo's linear probe."""
    config = build(
        LinearProbeConfig, load_yaml("tasks/imagenet/linear_demo.yaml", [f"data={images}"]), "test"
    )
    cell = job(backbone.parent / f"probe{seed}", seed, str(backbone))
    return linear_probe.run(config, cell, Progress()).metrics["top1"].value


def test_mae_beats_random_by_more_than_the_spread(images: str, tmp_path: Path) -> None:
    """The demo's pretraining, probed with three seeds, against three random initialisations."""
    pretrain = build(PretrainConfig, load_yaml("pretrain/demo.yaml", [f"data={images}"]), "test")
    run(pretrain, job(tmp_path / "mae", 0), Progress())
    mae = [probe(images, tmp_path / "mae" / EXPORT, seed) for seed in SEEDS]
    random = []
    for seed in SEEDS:
        floor = build(RandomConfig, load_yaml("pretrain/random_demo.yaml"), "test")
        run_random(floor, job(tmp_path / f"random{seed}", seed), Progress())
        random.append(probe(images, tmp_path / f"random{seed}" / EXPORT, seed))
    spread = max(max(scores) - min(scores) for scores in (mae, random))
    assert sum(mae) / 3 - sum(random) / 3 > spread, f"MAE {mae}, random {random}"
