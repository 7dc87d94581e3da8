"""The interface between the suite and its jobs: a Job goes in, an Outcome comes out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_bench.record import Outcome as Outcome

EXPORT = "export"  # subfolder of a job with the backbone it made
SPEC_FILE = "backbone.json"  # in that folder: spec, digest and provenance
STATES = "checkpoints"  # subfolder of a job with its training states; the worker removes it after success


@dataclass(frozen=True)
class Job:
    """One cell to run. It writes to `dir` only; a second run of the same job in the same `dir` resumes.

    Attributes:
        name: for people, in messages and curves.
        kind: a key of `mae_bench.registry.KINDS`.
        config: the complete config.
        dir: its folder.
        seed: seed for weight initialisation and data order.
        backbone: the SOURCE for `backbones.load.load_backbone`; "" for a job that makes a backbone.
        device: "cpu" or "cuda"; the runner has already set the number of threads and the visible GPU.
        earlier: the folders of other cells of the same backbone, row and seed, the newest first: their
            trained models may be evaluated instead of training again.
    """

    name: str
    kind: str
    config: dict[str, Any]
    dir: Path
    seed: int
    backbone: str = ""
    device: str = "cpu"
    earlier: tuple[Path, ...] = ()
