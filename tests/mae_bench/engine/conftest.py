"""Import the toy run of the engine's tests, and start it in several processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # `toy_run` is a script and a module: processes import it too


@pytest.fixture(scope="session")
def together() -> Callable[..., dict[str, Any]]:
    """Return together(folder, size, runs): results of toy runs in `size` processes, {} if one was killed."""
    return run_together


def run_together(folder: Path, size: int, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    path = folder / "runs.json"
    path.write_text(json.dumps(runs, default=str))
    with socket.socket() as server:
        server.bind(("", 0))
        port = str(server.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        _start(path, rank, os.environ | shared | {"PYTHONPATH": str(HERE.parents[2])}) for rank in range(size)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if -9 in codes:
        return {}
    assert codes == [0] * size, "\n".join(
        path.with_suffix(f".{rank}").read_text()[-3000:] for rank in range(size)
    )
    results: dict[str, Any] = torch.load(path.with_suffix(".pt"), weights_only=True)
    return results


def _start(path: Path, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(path.with_suffix(f".{rank}"), "wb") as log:
        command = [sys.executable, str(HERE / "toy_run.py"), str(path)]
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return subprocess.Popen(command, env=environment | place, stdout=log, stderr=log)
