"""What every benchmark shares: interleaved timing, ratios with their spread, the line that says where, and the report."""

import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mae_bench.environment.provenance import git_hash, hardware, now, version_of, versions

PEERS = ("transformers",)  # measured against, beside what every record has
BOOTSTRAPS = 2000  # draws of the interval of a ratio
INTERVAL = 0.95  # share of the draws that lies between `low` and `high`


@dataclass
class Times:
    """Seconds of each round: CPU time of this process (all its threads) and wall time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and the interval that holds it in 95 % of resampled rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interleave(
    callables: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Runs A, B, C, A, B, C, ... `repeats` times after `warmup` untimed rounds.

    What else the machine does at the time falls on all alike. `synchronize` (torch.cuda.synchronize) ends each measurement.
    """
    for _ in range(warmup):
        for call in callables.values():
            call()
    samples = {name: Times() for name in callables}
    for _ in range(repeats):
        for name, call in callables.items():
            if synchronize:
                synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if synchronize:
                synchronize()
            samples[name].cpu.append(time.process_time() - cpu)
            samples[name].wall.append(time.perf_counter() - wall)
    return samples


def ratio(samples_a: Sequence[float], samples_b: Sequence[float]) -> Ratio:
    """median(a) / median(b): how many times faster b is than a, when samples are seconds.

    The interval is a percentile bootstrap over rounds: round i of a and round i of b were neighbours in time and are drawn
    together. Samples of unequal number raise ValueError.
    """
    if len(samples_a) != len(samples_b) or not samples_a:
        raise ValueError(f"{len(samples_a)} and {len(samples_b)} samples: one of each a round")
    draw, rounds = random.Random(0), range(len(samples_a))
    drawn = sorted(
        statistics.median(samples_a[i] for i in chosen) / statistics.median(samples_b[i] for i in chosen)
        for chosen in (draw.choices(rounds, k=len(rounds)) for _ in range(BOOTSTRAPS))
    )
    tail = round((1 - INTERVAL) / 2 * BOOTSTRAPS)
    return Ratio(statistics.median(samples_a) / statistics.median(samples_b), drawn[tail], drawn[-1 - tail])


def environment() -> dict[str, str]:
    """Date, hardware, versions, command and commit of a measurement, for people and for the JSON file."""
    machine, found = hardware(), versions() | {name: number for name in PEERS if (number := version_of(name))}
    where = [
        f"{machine['cores']} cores of {machine['cpu']}",
        f"{machine['memory_gib']} GiB",
        *machine.get("gpus", ["no GPU"]),
    ]
    return {
        "date": now(),
        "hardware": ", ".join(where),
        "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
        "threads": _threads(),
        "command": command(),
        "commit": git_hash(__file__),
    }


def command() -> str:
    """`python -m benchmarks.NAME ...` as it was given, without the folders of this machine."""
    given = (Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:])
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *given])


def _threads() -> str:
    torch: Any = sys.modules.get("torch")
    return str(torch.get_num_threads()) if torch else "1"


@dataclass(frozen=True)
class Table:
    """A table of a report; cells are printed by str, and a sentence below says how to read them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


def write_table(title: str, tables: Sequence[Table], data: dict[str, Any], out: Path | None) -> None:
    """Prints the tables below the environment; with `out` also writes OUT.md, and OUT.json with `data` (samples and the like)."""
    where = environment()
    text = "\n".join(
        [
            f"# {title}\n",
            *(f"- {name}: {value}" for name, value in where.items()),
            "",
            *(table.markdown() for table in tables),
        ]
    )
    print(text)
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    content = {
        "title": title,
        "environment": where,
        "tables": [asdict(table) for table in tables],
        "data": data,
    }
    out.with_suffix(".json").write_text(
        json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8"
    )


def _plain(value: object) -> object:
    """Times and Ratio as JSON; anything else as text."""
    return asdict(value) if isinstance(value, Times | Ratio) else str(value)
