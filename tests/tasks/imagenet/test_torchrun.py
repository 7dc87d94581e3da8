"""`mae-bench evaluate` started by torchrun: two processes train heads and evaluate each image once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mae_bench.record import read_record
from tests.tasks.imagenet.toy import PROTOCOLS, predictions_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_a_grid_of_heads(faint: Path, tmp_path: Path, backbone: str) -> None:
    values: dict[str, Any] = {**PROTOCOLS["grid"], "data": "???"}
    (tmp_path / "probe.yaml").write_text(json.dumps(values))
    command = [
        *LAUNCHER,
        "-m",
        "mae_bench",
        "evaluate",
        "--checkpoint",
        backbone,
        "--tasks",
        str(tmp_path / "probe.yaml"),
    ]
    given = [f"data.imagenet={faint}", "device=cpu", "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(
        [*command, *given],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert [cell["state"] for cell in json.loads(done.stdout)["cells"]] == ["done", "done"], done.stderr
    (path,) = (path for path in tmp_path.rglob("record.json") if "probe" in path.parent.name)
    record = read_record(path)
    assert record.hardware["processes"] == 2
    assert record.num_samples == 11
    assert list(predictions_of(path.parent)["indices"]) == list(range(11))
    assert not (path.parent / "checkpoints").exists()
    steps = [json.loads(line)["step"] for line in (path.parent / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(4)), "two epochs of the 20 images that are not held out"
