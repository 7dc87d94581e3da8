"""The demo's claim: a linear probe on MAE features beats the random initialisation by more than its spread over 3 seeds."""

from pathlib import Path

from mae_bench.config import build, load_yaml
from mae_bench.data.demo import DemoConfig, DemoSet, make_demo_data
from mae_bench.job import EXPORT, Job
from mae_bench.pretrain import run, run_random
from mae_bench.pretrain_config import PretrainConfig, RandomConfig
from mae_bench.progress import Progress
from tasks.imagenet import linear_probe
from tasks.imagenet.config import LinearProbeConfig

SEEDS = (0, 1, 2)
FEWER_EPOCHS = 8  # of the demo's 12: the claim holds before its pretraining ends
DATA = DemoConfig(coco=DemoSet(img_size=64, num_train=1, num_val=1), ade20k=DemoSet(img_size=64, num_train=1, num_val=1))


def job(folder: Path, seed: int, backbone: str = "") -> Job:
    folder.mkdir(parents=True)
    return Job(folder.name, "test", {}, folder, seed, backbone)


def probe(root: Path, backbone: Path, seed: int) -> float:
    """top1 of the demo's linear probe."""
    config = load_yaml("tasks/imagenet/linear_demo.yaml", [f"data={root / 'data' / 'imagenet'}"])
    cell = job(backbone.parent / "probe", seed, str(backbone))
    return linear_probe.run(build(LinearProbeConfig, config, "test"), cell, Progress()).metrics["top1"].value


def test_mae_beats_random_by_more_than_the_spread(tmp_path: Path) -> None:
    make_demo_data(tmp_path / "data", DATA)
    pretrain = load_yaml("pretrain/demo.yaml", [f"data={tmp_path / 'data' / 'imagenet'}", f"epochs={FEWER_EPOCHS}"])
    floor = load_yaml("pretrain/random_demo.yaml")
    mae, random = [], []
    for seed in SEEDS:
        run(build(PretrainConfig, pretrain, "test"), job(tmp_path / f"mae{seed}", seed), Progress())
        run_random(build(RandomConfig, floor, "test"), job(tmp_path / f"random{seed}", seed), Progress())
        mae.append(probe(tmp_path, tmp_path / f"mae{seed}" / EXPORT, seed))
        random.append(probe(tmp_path, tmp_path / f"random{seed}" / EXPORT, seed))
    spread = max(max(scores) - min(scores) for scores in (mae, random))
    assert sum(mae) / 3 - sum(random) / 3 > spread, f"MAE {mae}, random {random}"
