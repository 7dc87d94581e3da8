"""`--dry-run` shows the plan of what a command would run, and runs nothing."""

import json
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

from mae_bench.cli.app import app

COMMANDS = {
    "demo": ["demo"],
    "run": ["run", "suites/demo.yaml"],
    "pretrain": ["pretrain", "pretrain/random_demo.yaml"],
    "evaluate": ["evaluate", "--checkpoint", "weights.pth", "--tasks", "imagenet/knn_small", "data.root=x"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_plans_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0)
    torch.save(model.state_dict(), "weights.pth")
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, [*COMMANDS[name], "--dry-run", "--json"])
    cells = json.loads(done.stdout)["cells"]
    assert cells
    assert done.exit_code == int(any(cell["state"] == "would fail" for cell in cells))
    assert sorted(tmp_path.rglob("*")) == before
