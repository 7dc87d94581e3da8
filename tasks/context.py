"""The context of a task: its config, job and progress, its data set and the backbone that it transfers."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from backbones.translating.report import ConversionReport
from mae_bench.config import JobConfig
from mae_bench.data.checks.layouts import LayoutReport
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import peak_memory_mib
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec

C = TypeVar("C", bound=JobConfig, covariant=True)


@dataclass(frozen=True)
class TaskContext(Generic[C]):
    """What every step of a task reads, passed as one argument.

    Attributes:
        config, job, progress: the arguments of the task's `run`.
        layout: the checked data set.
        spec, report: the backbone and how its checkpoint was converted.
    """

    config: C
    job: Job
    progress: Progress
    layout: LayoutReport
    spec: BackboneSpec
    report: ConversionReport

    @property
    def device(self) -> torch.device:
        return torch.device(self.job.device)

    def build_outcome(
        self,
        task: str,
        split: str,
        num_samples: int,
        metrics: dict[str, Metric],
        main_metric: str,
        *,
        num_params: int,
        cost: dict[str, float],
        notes: list[str],
        artefacts: dict[str, str],
    ) -> Outcome:
        """Return the Outcome on `split`, with the data set, the backbone and the peak memory filled in.

        cost: seconds and throughput; `params` and `peak_memory_mib` are added.
        """
        size = {"params": float(num_params), "peak_memory_mib": peak_memory_mib(self.device)}
        return Outcome(
            task=task,
            dataset=self.layout.name,
            split=split,
            num_samples=num_samples,
            metrics=metrics,
            main_metric=main_metric,
            data_digest=self.layout.digest,
            backbone_spec=self.spec.to_dict(),
            backbone_digest=self.report.digest,
            conversion_report=self.report.to_dict(),
            cost=cost | size,
            notes=notes,
            artefacts=artefacts,
        )
