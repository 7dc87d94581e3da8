"""Data model of a comparison: columns, cells, differences, costs and published results."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mae_bench.record import Failure

Status = Literal["measured", "failed", "not installed", "absent"]


@dataclass(frozen=True)
class Column:
    """Scores that may be compared: one protocol in one version on the same images with the same config.

    protocol_version: None where the records do not state it.
    variant: a letter for columns that differ only in version, images or config, else "".
    """

    task: str
    protocol: str
    protocol_version: int | None = None
    dataset: str = ""
    split: str = ""
    metric: str = ""
    unit: str = ""
    direction: Literal["higher", "lower"] = "higher"
    num_samples: int | None = None
    data_digest: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    decimals: int = 1


@dataclass(frozen=True)
class Difference:
    """Mean of a row minus mean of the baseline, in the column's unit.

    low, high: its 95 % confidence interval, if the seeds give one.
    better: the row's mean is better (True), worse (False) or equal (None).
    paired: the two were compared seed by seed.
    """

    value: float
    better: bool | None
    paired: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """Return whether there is an interval and it excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Measured:
    """One metric of a cell: mean and sample standard deviation over the n seeds that have it.

    margin: half the width of the 95 % interval over the draws of one record, averaged over the seeds; None
        for a metric without draws.
    """

    mean: float
    std: float | None
    n: int
    unit: str
    direction: Literal["higher", "lower"]
    margin: float | None = None


@dataclass(frozen=True)
class Cell:
    """One row in one column. Without a measured seed the mean is None, never 0.

    code: the code that the seeds were computed with, named by the first digits of its digest.
    metrics: every metric of the records, the score included, in the order of the records.
    """

    status: Status = "absent"
    seeds: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    mean: float | None = None
    std: float | None = None
    difference: Difference | None = None
    is_best: bool = False
    seconds: float | None = None  # training, feature extraction and evaluation, mean over the seeds
    failures: tuple[Failure, ...] = ()
    code: tuple[str, ...] = ()
    metrics: dict[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Cost of one kind of cell for a row: means over its runs, None where the records do not state them."""

    backbone: str
    task: str
    protocol: str
    num_runs: int
    seconds_train: float | None = None
    seconds_features: float | None = None  # extraction or loading of a frozen backbone's features
    seconds_eval: float | None = None
    images_per_second: float | None = None
    params: float | None = None
    gmacs: float | None = None
    peak_memory_mib: float | None = None


@dataclass(frozen=True)
class Total:
    """Seconds of all runs of a row together, None where any record does not state them."""

    backbone: str
    seconds_pretrain: float | None
    seconds_transfer: float | None


@dataclass(frozen=True)
class PublishedComparison:
    """Published results for the rows of an ablation, for one column of the comparison: never part of a cell.

    column: index in `Comparison.columns`.
    values, places: the published number and where it is printed (for example "Table 1a"), by row.
    differs: why measured and published numbers are not comparable; empty if they are.
    """

    column: int
    model: str
    protocol: str
    dataset: str
    source: str
    url: str
    values: dict[str, float]
    places: dict[str, str]
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The leaderboard. `cells[row]` and `verdicts` are in the order of `columns`."""

    baseline: str
    rows: list[str]
    columns: list[Column]
    cells: dict[str, list[Cell]]
    costs: list[Cost]
    totals: list[Total]
    failures: list[Failure]
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    published_comparisons: list[PublishedComparison] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON types, with lists for tuples."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value
