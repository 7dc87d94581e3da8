"""No process outlives the one that started it, however that one ends."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from benchmarks.orphans import MARK, PATIENCE_SECONDS, SUITES, WINDOW_SECONDS, is_alive, kill_runner
from mae_bench.lifetime import bind_forks
from mae_bench.runner.live import View
from mae_bench.runner.runner import run_suite
from mae_bench.suite.config import load_suite

NUM_KILLS = 10


def fork(act: Callable[[], object]) -> int:
    """Return the pid of a fork of this process that calls `act` and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return pid


def read_pids(folder: Path, count: int) -> list[int]:
    """The pids that processes have written as names of files, once there are `count`."""
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(path.name) for path in folder.iterdir()]


def end_soon(pids: list[int]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(is_alive(pid) for pid in pids)


def test_a_killed_runner_leaves_nothing_alive(fake_kinds: Path, tmp_path: Path) -> None:
    def start(mark: str, folder: Path) -> int:
        suite = {"name": "toy", "out": str(folder), "device": "cpu"} | SUITES["workers"]

        def run() -> None:
            os.environ[MARK] = mark
            run_suite(load_suite(suite), View(Console(file=StringIO())), "mae-bench run toy.yaml")

        return fork(run)

    draw = random.Random(0)
    for number in range(NUM_KILLS):
        kill = kill_runner("workers", start, tmp_path / str(number), draw.uniform(0, WINDOW_SECONDS))
        assert kill.alive
        assert not kill.left, kill


class Stuck(Dataset[int]):
    """Images on a disk that no longer answers: its loader processes watch nobody."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, index: int) -> int:
        (self.folder / str(os.getpid())).touch()
        time.sleep(1000)
        return index

    def __len__(self) -> int:
        return 2


def test_loader_processes_end_with_a_killed_job(tmp_path: Path) -> None:
    def load() -> None:
        bind_forks()
        list(DataLoader(Stuck(tmp_path), num_workers=2))

    job = fork(load)
    loaders = read_pids(tmp_path, 2)
    os.kill(job, signal.SIGKILL)
    os.waitpid(job, 0)
    assert end_soon(loaders)


def test_a_child_that_starts_after_its_parent_has_ended_ends(tmp_path: Path) -> None:
    """As it is after a kill while its interpreter starts."""
    module = tmp_path / "lives_on.py"
    module.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    gone = fork(lambda: None)
    os.waitpid(gone, 0)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "mae_bench.runner.child"]
    for parent, expected in ((gone, -signal.SIGKILL), (os.getpid(), 0)):
        done = subprocess.run(
            [*command, str(parent), "lives_on"], env=os.environ | {"PYTHONPATH": path}, capture_output=True
        )
        assert done.returncode == expected, done.stderr
        assert (tmp_path / "ran").exists() == (expected == 0)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_job_without_a_step_has_nothing_to_save_when_its_runner_is_gone(tmp_path: Path, steps: int) -> None:
    """A job that does not look: before its first step it ends at once, later it has time to save."""
    child = (
        "import os, signal, time; from mae_bench import progress; progress.ORPHAN_SECONDS = 1\n"
        "from mae_bench.lifetime import end_with_parent\n"
        "end_with_parent(os.getppid(), signal.SIGTERM)\n"
        "job = progress.Progress(); job.stop_on_signals(); job.stage('train', 9)\n"
        f"for step in range({steps}): job.step(step)\n"
        f"open({str(tmp_path)!r} + '/' + str(os.getpid()), 'w').close()\n"
        "while not job.should_stop: time.sleep(0.01)\n"
        f"open({str(tmp_path)!r} + '/saved', 'w').close()\n"
        "time.sleep(1000)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    runner = subprocess.Popen([sys.executable, "-c", parent])
    pids = read_pids(tmp_path, 1)
    runner.kill()
    runner.wait()
    assert end_soon(pids)
    assert (tmp_path / "saved").exists() == bool(steps)
