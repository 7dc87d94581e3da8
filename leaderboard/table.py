"""What a comparison is made of: columns, cells, differences, costs."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mae_bench.record import Failure

Status = Literal["measured", "failed", "not installed", "absent"]


@dataclass(frozen=True)
class Column:
    """Scores that may be compared: one protocol on the same images, by the same config.

    variant: "" or the letter that tells apart columns that differ in nothing but their images or their config.
    """

    task: str
    protocol: str
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
    """Mean of a row minus mean of the baseline, in the column's unit, with its 95 % interval where seeds allow one.

    paired: whether the two were compared seed by seed.
    better: the row is better (True), worse (False) or equal (None), by the means alone.
    """

    value: float
    better: bool | None
    paired: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """The interval exists and leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Measured:
    """One metric of a cell: mean and sample deviation over the n seeds that have it.

    margin: half the width of the 95 % interval over a record's own draws, mean over the seeds; None where nothing was drawn.
    """

    mean: float
    std: float | None
    n: int
    unit: str
    direction: Literal["higher", "lower"]
    margin: float | None = None


@dataclass(frozen=True)
class Cell:
    """One row in one column. Without a measured seed there is no mean: a missing score is None, never 0.

    metrics: all that its records measured, the score among them, in the records' order.
    """

    status: Status = "absent"
    seeds: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    mean: float | None = None
    std: float | None = None
    difference: Difference | None = None
    is_best: bool = False
    seconds: float | None = None  # training, features and evaluation, mean over the seeds
    failures: tuple[Failure, ...] = ()
    metrics: dict[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What one kind of cell cost a row: means over its runs; None where the records do not say."""

    backbone: str
    task: str
    protocol: str
    num_runs: int
    seconds_train: float | None = None
    seconds_features: float | None = None  # until a frozen backbone's features were there, made or read
    seconds_eval: float | None = None
    images_per_second: float | None = None
    params: float | None = None
    gmacs: float | None = None
    peak_memory_mib: float | None = None


@dataclass(frozen=True)
class Total:
    """Seconds that all runs of a row took together; None where any of them does not say."""

    backbone: str
    seconds_pretrain: float | None
    seconds_transfer: float | None


@dataclass(frozen=True)
class Beside:
    """What a source published for rows of an ablation, for one column of the comparison: quoted, never part of a cell.

    column: its place in `Comparison.columns`. values and places (for example "Table 1a") by row.
    differs: why a measured number is not to be compared with the published one; empty where it may be.
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
    """The leaderboard: `cells[row]` stands in the order of `columns`, `verdicts` too."""

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
    beside: list[Beside] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it (lists for tuples)."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value
