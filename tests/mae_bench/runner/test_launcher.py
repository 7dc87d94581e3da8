"""Processes started by torchrun or Slurm: rank 0 runs the suite, all ranks run a cell together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mae_bench.errors import Interrupted, UserError
from mae_bench.runner.launcher import LaunchGroup, adopt_slurm, check_gpus, first_host
from mae_bench.runner.processes import free_port
from mae_bench.runner.worker import environment


def command(script: Path, suite: dict[str, Any]) -> list[str]:
    path = Path(suite["out"]).with_name("toy.yaml")
    path.write_text(json.dumps(suite))
    return [str(script), "run", str(path), "--json"]


def torchrun(script: Path, suite: dict[str, Any]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, *command(script, suite)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def srun(script: Path, suite: dict[str, Any], job: int) -> list[subprocess.Popen[str]]:
    """Two tasks as Slurm starts them on one machine."""
    step = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command(script, suite)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]


def wait_for_training(suite: dict[str, Any], process: subprocess.Popen[str]) -> Path:
    for _ in range(2400):
        for events in Path(suite["out"]).rglob("events.jsonl"):
            if '"loss"' in events.read_text():
                return events.parent
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no job began to train")


def test_torchrun_runs_a_suite(fake_kinds: Path, suite: dict[str, Any]) -> None:
    suite["backbones"] = {"mae": {"kind": "fake_pretraining"}}
    out, err = torchrun(fake_kinds, suite).communicate(timeout=120)
    cells = json.loads(out)["cells"]
    assert [cell["state"] for cell in cells] == ["done", "done"], err
    assert cells[0]["score"] == 2.0, "both ranks made the backbone"
    assert err.count("2 cells, 2 to run") == 1, "rank 0 alone speaks"
    (transfer,) = Path(suite["out"]).rglob("runs.txt")
    assert transfer.read_text() == "run\n", "one rank transferred it"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_that_is_stopped_saves(
    fake_kinds: Path, suite: dict[str, Any], number: signal.Signals
) -> None:
    """SIGTERM it passes on; of SIGUSR1 it dies, and its processes find themselves without it."""
    suite |= {"backbones": {"mae": {"kind": "fake_pretraining", "behave": "wait"}}, "tasks": {}}
    process = torchrun(fake_kinds, suite)
    folder = wait_for_training(suite, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert "Re-run the same command to resume" in err
    assert (folder / "state").is_file()
    assert not (folder / "failure.json").exists()
    assert not [path for path in folder.glob("pid-*") if Path(f"/proc/{path.read_text()}").exists()]


def test_tasks_of_slurm_stop_at_its_warning_and_go_on(fake_kinds: Path, suite: dict[str, Any]) -> None:
    suite |= {"backbones": {"mae": {"kind": "fake_pretraining", "behave": "wait"}}, "tasks": {}}
    tasks = srun(fake_kinds, suite, 12)
    folder = wait_for_training(suite, tasks[0])
    tasks[1].send_signal(signal.SIGUSR1)  # Slurm warns all; one is enough
    answers = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [130, 130]
    assert "Re-run the same command to resume" in answers[0][1]
    assert answers[1] == ("", "")
    assert (folder / "state").is_file()
    tasks = srun(fake_kinds, suite, 13)
    answers = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], answers
    assert json.loads(answers[0][0])["cells"][0]["score"] == 2.0
    assert answers[1] == ("", "")


def test_a_slurm_step_gets_torchruns_variables() -> None:
    step = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
    }
    given = dict(step)
    adopt_slurm(given)
    assert {name: given[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
    }
    again = dict(step)
    adopt_slurm(again)
    assert again["MASTER_PORT"] == given["MASTER_PORT"], "every task finds the same"
    named = step | {"MASTER_ADDR": "head", "MASTER_PORT": "5"}
    adopt_slurm(named)
    assert (named["MASTER_ADDR"], named["MASTER_PORT"]) == ("head", "5")


@pytest.mark.parametrize("change", [{"SLURM_NTASKS": "1"}, {"SLURM_STEP_ID": None}, {"WORLD_SIZE": "2"}])
def test_what_is_no_step_of_several_tasks_stays(change: dict[str, str | None]) -> None:
    given = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"} | change
    variables = {name: value for name, value in given.items() if value is not None}
    before = dict(variables)
    adopt_slurm(variables)
    assert variables == before


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("gpu[07-09,12],big1", "gpu07"),
        ("a,b", "a"),
        ("alone", "alone"),
        ("n[3,5]", "n3"),
        ("r1-n[1-2]-ib", "r1-n1-ib"),
    ],
)
def test_the_first_host_of_a_list(names: str, first: str) -> None:
    assert first_host(names) == first


def test_a_worker_of_rank_0_alone_knows_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & set(environment(1, ""))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_bench.runner.launcher.visible_gpus", lambda: ["0", "1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes on a machine with 2 GPUs"):
        check_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    check_gpus()  # Slurm shows each task its own


def test_half_of_the_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        LaunchGroup()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> LaunchGroup:
    """Rank 1 of 2, with a store of its own."""
    from torch.distributed import HashStore

    monkeypatch.setattr("mae_bench.runner.launcher._store", HashStore)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    return LaunchGroup()


def test_a_folder_that_is_not_shared_is_named(
    group: LaunchGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_bench.runner.launcher.SHARED_SECONDS", 0.0)
    group.store.set("order/1", json.dumps({"folder": str(tmp_path / "elsewhere")}))
    with pytest.raises(UserError, match="rank 1 .* does not see .*elsewhere"):
        group.follow([])
    assert group.store.get("code/1/1") == b"1", "rank 0 need not wait for it"


def test_a_rank_leaves_when_rank_0_has_ended(group: LaunchGroup) -> None:
    group.store.set("ended", "")
    group.follow([])
    assert group.store.add("left", 0) == 1


def test_a_rank_that_is_asked_to_stop_tells_rank_0(group: LaunchGroup) -> None:
    with pytest.raises(Interrupted):
        group.follow([signal.SIGTERM])
    assert group.asked_to_stop()
