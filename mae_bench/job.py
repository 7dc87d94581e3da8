"""The contract between the suite and everything that runs in it: a Job goes in, an Outcome comes out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_bench.record import Outcome as Outcome

EXPORT = "export"  # the folder, inside a job's, that holds the backbone that it made
STATES = "checkpoints"  # the folder, inside a job's, of the training states that it goes on from; its worker removes it


@dataclass(frozen=True)
class Job:
    """One cell to run. Everything it writes goes into `dir`; a second run of the same job in the same `dir` goes on from there.

    backbone: the SOURCE that `backbones.load.load_backbone` reads ("" for jobs that make one).
    device: "cpu" or "cuda"; the runner has set the number of threads and the visible device.
    """

    name: str
    kind: str
    config: dict[str, Any]
    dir: Path
    seed: int
    backbone: str = ""
    device: str = "cpu"
