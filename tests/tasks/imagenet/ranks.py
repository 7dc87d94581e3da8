"""Run protocols of the toy set in several processes; as a script, this file is one of them."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mae_bench.engine.distributed import gather_over_ranks, process_group, world
from mae_bench.errors import Interrupted, UserError
from mae_bench.runner.processes import free_port, rank_variables
from tests.tasks.imagenet.toy import run_protocol

ROOT = Path(__file__).parents[3]
Results = dict[str, list[dict[str, Any]]]


def run_together(folder: Path, size: int, runs: dict[str, dict[str, Any]]) -> Results:
    """Return, per run (arguments of run_protocol by name), the outcomes on each of `size` processes."""
    path = folder / f"runs-{size}.json"
    path.write_text(json.dumps(runs, default=str))
    port = free_port()
    processes = []
    for rank in range(size):
        place = rank_variables(rank, size, rank, "127.0.0.1", port) | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with open(path.with_suffix(f".{rank}"), "wb") as log:
            command = [sys.executable, __file__, str(path)]
            processes.append(subprocess.Popen(command, env=os.environ | place, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * size, "\n".join(
        path.with_suffix(f".{rank}").read_text()[-3000:] for rank in range(size)
    )
    results: Results = json.loads(path.with_suffix(".results").read_text())
    return results


def run_one(run: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome of a run on this process, or its error."""
    name, data, folder, backbone = (run.pop(key) for key in ("name", "data", "folder", "backbone"))
    run["earlier"] = tuple(map(Path, run.get("earlier", ())))
    try:
        return asdict(run_protocol(name, Path(data), Path(folder), backbone, **run))
    except (UserError, Interrupted) as error:
        return {"ended": f"{type(error).__name__}: {error}"}


def main() -> None:
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    results = {}
    with process_group("cpu"):
        for name, run in json.loads(path.read_text()).items():
            results[name] = gather_over_ranks(run_one(run))
        if world().is_main:
            path.with_suffix(".results").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
