"""Every row of the miniature Table 1 and the ends of Figure 5 train differently from the default."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_bench.config import build
from mae_bench.job import Job
from mae_bench.pretrain.config import PretrainConfig
from mae_bench.pretrain.job import run
from mae_bench.progress import Progress
from mae_bench.suite.config import load_suite

ROWS = [("demo_table1", row) for row in load_suite("suites/demo_table1.yaml").backbones if row != "default"]
ROWS += [("demo_fig5", "mask_ratio_10"), ("demo_fig5", "mask_ratio_90")]
SMALL = {"epochs": 1, "warmup_epochs": 0, "global_batch_size": 8, "num_reconstructions": 1, "compile": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 8 validation images of noise on a gradient, larger than a crop."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for i in range(count):
            path = root / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.linspace(0, 150, 96)[:, None, None] + generator.integers(0, 100, (96, 80, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def pretrained(suite: str, row: str, images: Path, folder: Path) -> str:
    """The digest of the backbone after two steps."""
    job = load_suite(f"suites/{suite}.yaml").backbones[row]
    config = build(PretrainConfig, {**job, **SMALL, "data": str(images)}, row)
    folder.mkdir()
    return run(config, Job(row, "test", {}, folder, 0, ""), Progress()).backbone_digest


@pytest.fixture(scope="module")
def default(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return pretrained("demo_table1", "default", images, tmp_path_factory.mktemp("runs") / "default")


@pytest.mark.parametrize(("suite", "row"), ROWS)
def test_a_row_trains_otherwise_than_the_default(
    suite: str, row: str, images: Path, default: str, tmp_path: Path
) -> None:
    assert pretrained(suite, row, images, tmp_path / row) != default


def test_the_same_row_trains_alike(images: Path, default: str, tmp_path: Path) -> None:
    """What the test above rests on: two runs of one config end with the same weights."""
    assert pretrained("demo_fig5", "default", images, tmp_path / "default") == default
