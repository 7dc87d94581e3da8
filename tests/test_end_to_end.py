"""The whole way once, through the real command line, the real detectron2 and the real mmsegmentation."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_bench.record import read_record

pytestmark = [pytest.mark.framework, pytest.mark.slow]

ROWS = ("mae", "supervised", "random")
SCORES = {
    "finetune-smoke": "top1",
    "linear-smoke": "top1",
    "maskrcnn-smoke": "AP_box",
    "upernet-smoke": "mIoU",
}
COMMAND = [sys.executable, "-m", "mae_bench", "run", "suites/smoke.yaml"]


def run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--out", str(out), *more], capture_output=True, text=True, timeout=600, check=False
    )


def records(out: Path) -> dict[Path, float]:
    """Every record file and when it was written."""
    return {path: path.stat().st_mtime for path in out.rglob("record.json")}


@pytest.fixture(scope="module")
def interrupted_then_finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke suite that was stopped by Ctrl-C once its first cell was done, then run again to its end."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    process = subprocess.Popen(
        [*COMMAND, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background job inherits an ignored SIGINT
    )
    while process.poll() is None and not records(out):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    early = records(out)
    assert early
    assert len(early) < 15, "it was stopped before its end"
    finished = run(out)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert early.items() <= records(out).items(), "what was finished stays as it was"
    return out


def test_every_cell_has_a_record_with_its_score(interrupted_then_finished: Path) -> None:
    found = [read_record(path) for path in records(interrupted_then_finished)]
    cells = {(record.backbone, record.protocol): record for record in found if record.task != "pretrain"}
    assert cells.keys() == {(row, protocol) for row in ROWS for protocol in SCORES}
    assert {record.backbone for record in found if record.task == "pretrain"} == set(ROWS)
    digests = {record.backbone: record.backbone_digest for record in found if record.task == "pretrain"}
    for (row, protocol), record in cells.items():
        assert record.main_metric == SCORES[protocol] or protocol.startswith("maskrcnn")
        assert record.backbone_digest == digests[row], (
            "the weights that were transferred are the weights that were made"
        )
        assert record.versions["torch"]
        assert record.hardware
        assert record.data_digest
        assert record.finished >= record.started
    assert len({record.data_digest for record in cells.values()}) == 3, "one data set a layout"


def test_real_frameworks_left_their_traces(interrupted_then_finished: Path) -> None:
    folders = {
        path.parent.name.partition("-s0")[0]: path.parent for path in records(interrupted_then_finished)
    }
    assert (folders["maskrcnn"] / "detectron2.log").exists()
    assert "UPerHead" in (folders["upernet"] / "mmseg_config.py").read_text()


def test_the_report_compares_all_rows(interrupted_then_finished: Path) -> None:
    report = interrupted_then_finished / "report"
    assert {path.name for path in report.iterdir()} >= {
        f"leaderboard.{kind}" for kind in ("md", "csv", "json", "html")
    }
    page = (report / "leaderboard.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page, "reconstructions"
    for row in ROWS:
        assert row in page
        assert row in (report / "leaderboard.md").read_text(encoding="utf-8")


def test_running_again_runs_nothing(interrupted_then_finished: Path) -> None:
    before = records(interrupted_then_finished)
    again = run(interrupted_then_finished)
    assert again.returncode == 0, again.stdout + again.stderr
    assert records(interrupted_then_finished) == before


def test_plan_says_that_all_is_done(interrupted_then_finished: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mae_bench",
        "plan",
        "suites/smoke.yaml",
        "--out",
        str(interrupted_then_finished),
        "--json",
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(answer["cells"]) == 15
    assert {cell["state"] for cell in answer["cells"]} == {"done"}
