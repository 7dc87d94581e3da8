"""Where a run's curves go: the log of its folder and TensorBoard's files always, W&B and MLflow when asked for."""

import importlib.util
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mae_bench.errors import NotInstalled
from mae_bench.files import write_text
from mae_bench.job import Job

LOG_FILE = "log.jsonl"
TENSORBOARD = "tensorboard"
PROJECT = "mae_bench"


class Tracker(Protocol):
    """One place that curves go to."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """The values of one step."""

    def close(self) -> None:
        """Nothing more will come."""


class Log:
    """`log.jsonl`, one line a step; what a killed run wrote after the state that we go on from is taken out again."""

    def __init__(self, folder: Path, size: int):
        self._file = open(folder / LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._file.seek(self._file.truncate(min(size, self._file.tell())))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def size(self) -> int:
        """Bytes of all that was logged."""
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files; the steps that a resumed run repeats are purged from the curves."""

    def __init__(self, job: Job, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(job.dir / TENSORBOARD), purge_step=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, the same one after a resume (it ignores steps that it has)."""

    def __init__(self, job: Job, step: int):
        import wandb

        run_id = _remembered(job.dir / "wandb_run.txt", uuid.uuid4().hex)
        self._run = wandb.init(
            project=PROJECT, name=job.name, id=run_id, resume="allow", dir=str(job.dir), config=job.config
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Sends the values."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow, the same one after a resume."""

    def __init__(self, job: Job, step: int):
        import mlflow

        self._mlflow = mlflow
        path = job.dir / "mlflow_run.txt"
        mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=path.read_text() if path.exists() else None, run_name=job.name)
        _remembered(path, run.info.run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Sends the values."""
        self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()


OPTIONAL: dict[str, Callable[[Job, int], Tracker]] = {"wandb": Wandb, "mlflow": MLflow}


def require_trackers(names: Sequence[str]) -> None:
    """NotInstalled, with the command, for a tracker that is asked for and cannot be imported."""
    for name in names:
        if not _is_installed(name):
            raise NotInstalled(
                f"trackers={list(names)}, but {name} is not installed", fix=f"pip install {name}"
            )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # imported already, by somebody who gave it no spec
        return True


def open_trackers(job: Job, names: Sequence[str], step: int) -> list[Tracker]:
    """TensorBoard and those asked for; `step` is the first that is still to come."""
    optional: list[Tracker] = [OPTIONAL[name](job, step) for name in names]
    return [TensorBoard(job, step), *optional]


def _remembered(path: Path, value: str) -> str:
    """The word that is kept at `path`; the first one stays."""
    if not path.exists():
        write_text(path, value)
    return path.read_text(encoding="utf-8")
