"""Trackers of a run's curves: log.jsonl and TensorBoard always, W&B and MLflow on request."""

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
    """A destination for curves."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values of one step."""

    def close(self) -> None:
        """Finish logging."""


class Log:
    """`log.jsonl`, one line per step. On resume, lines after the saved state are truncated."""

    def __init__(self, folder: Path, size: int):
        self._file = open(folder / LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._file.seek(self._file.truncate(min(size, self._file.tell())))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def size(self) -> int:
        """Return the size of the log in bytes."""
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard event files. On resume, repeated steps are purged from the curves."""

    def __init__(self, job: Job, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(job.dir / TENSORBOARD), purge_step=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, continued on resume (it ignores steps that it already has)."""

    def __init__(self, job: Job, step: int):
        import wandb

        run_id = _read_or_write(job.dir / "wandb_run.txt", uuid.uuid4().hex)
        self._run = wandb.init(
            project=PROJECT, name=job.name, id=run_id, resume="allow", dir=str(job.dir), config=job.config
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values of one step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow, continued on resume."""

    def __init__(self, job: Job, step: int):
        import mlflow

        self._mlflow = mlflow
        path = job.dir / "mlflow_run.txt"
        mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=path.read_text() if path.exists() else None, run_name=job.name)
        _read_or_write(path, run.info.run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values of one step."""
        self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


OPTIONAL: dict[str, Callable[[Job, int], Tracker]] = {"wandb": Wandb, "mlflow": MLflow}


def require_trackers(names: Sequence[str]) -> None:
    """Raise NotInstalled, with the install command, for a requested tracker that cannot be imported."""
    for name in names:
        if not _is_installed(name):
            raise NotInstalled(
                f"trackers={list(names)}, but {name} is not installed", fix=f"pip install {name}"
            )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # already imported from a module without a spec
        return True


def open_trackers(job: Job, names: Sequence[str], step: int) -> list[Tracker]:
    """Open TensorBoard and the named trackers; `step` is the next step to be logged."""
    optional: list[Tracker] = [OPTIONAL[name](job, step) for name in names]
    return [TensorBoard(job, step), *optional]


def _read_or_write(path: Path, value: str) -> str:
    """Return the text stored in a file; write `value` if it does not exist yet."""
    if not path.exists():
        write_text(path, value)
    return path.read_text(encoding="utf-8")
