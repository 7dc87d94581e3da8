"""Shared by all benchmarks: command line, interleaved timing, ratios with intervals, environment, report."""

import argparse
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

from mae_bench.environment.code import digest_code
from mae_bench.environment.provenance import git_hash, hardware, now, version_of, versions
from mae_bench.errors import UserError

PEERS = ("transformers",)  # packages measured against, added to the versions of every record
BOOTSTRAPS = 2000  # bootstrap draws for the interval of a ratio
INTERVAL = 0.95  # share of the draws between `low` and `high`


def run_main(main: Callable[[], None]) -> None:
    """Run the command of a benchmark; print a UserError without a traceback and exit with 2."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def positive_int(text: str) -> int:
    """Parse an argument that is a positive integer, as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def find_device(name: str) -> str:
    """Return the device cpu or cuda, as argparse's `type`; refuse cuda if torch finds no GPU."""
    import torch

    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r} is not cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: torch finds no GPU; use --device cpu")
    return name


@dataclass
class Times:
    """Seconds per round: CPU time of this process (all its threads) and wall time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its 95 % bootstrap interval over rounds."""

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
    """Run A, B, C, A, B, C, ... `repeats` times after `warmup` untimed rounds; return the samples.

    Other load of the machine affects all alike.

    synchronize: called around each measurement, such as torch.cuda.synchronize.
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
    """Return median(a) / median(b): how many times faster b is than a, if samples are seconds.

    The interval is a percentile bootstrap over rounds; round i of a and round i of b were measured next to
    each other and are drawn together.

    Raise ValueError if the numbers of samples differ.
    """
    if len(samples_a) != len(samples_b) or not samples_a:
        raise ValueError(f"{len(samples_a)} and {len(samples_b)} samples: one of each per round")
    draw, rounds = random.Random(0), range(len(samples_a))
    drawn = []
    for _ in range(BOOTSTRAPS):
        chosen = draw.choices(rounds, k=len(rounds))
        median_a = statistics.median(samples_a[i] for i in chosen)
        drawn.append(median_a / statistics.median(samples_b[i] for i in chosen))
    drawn.sort()
    tail = round((1 - INTERVAL) / 2 * BOOTSTRAPS)
    return Ratio(statistics.median(samples_a) / statistics.median(samples_b), drawn[tail], drawn[-1 - tail])


def environment() -> dict[str, str]:
    """Return date, hardware, versions, command, commit and code digest of a measurement, as text."""
    machine, found = hardware(), versions()
    for name in PEERS:
        version = version_of(name)
        if version:
            found[name] = version
    gpus = machine.get("gpus", ["no GPU"])
    where = [f"{machine['cores']} cores of {machine['cpu']}", f"{machine['memory_gib']} GiB", *gpus]
    return {
        "date": now(),
        "hardware": ", ".join(where),
        "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
        "threads": _num_threads(),
        "command": command(),
        "commit": git_hash(__file__),
        "code": digest_code(_module()),
    }


def command() -> str:
    """Return the command line, `python -m benchmarks.NAME ...`, without the folders of absolute paths."""
    given = (Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:])
    return shlex.join(["python", "-m", _module(), *given])


def _module() -> str:
    """Return the module of the benchmark that is run."""
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def _num_threads() -> str:
    torch: Any = sys.modules.get("torch")
    return str(torch.get_num_threads()) if torch else "1"


@dataclass(frozen=True)
class Table:
    """A table of a report; cells are printed with str, and a note below explains how to read them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown, below its title."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


def write_table(title: str, tables: Sequence[Table], data: dict[str, Any], out: Path | None) -> None:
    """Print the environment and the tables.

    out: also write OUT.md, and OUT.json with `data` (samples and the like).

    Raise UserError if a file cannot be written; the tables are printed before.
    """
    where = environment()
    lines = [f"# {title}\n", *(f"- {name}: {value}" for name, value in where.items()), ""]
    text = "\n".join([*lines, *(table.markdown() for table in tables)])
    print(text)
    if out is None:
        return
    content = {
        "title": title,
        "environment": where,
        "tables": [asdict(table) for table in tables],
        "data": data,
    }
    written = json.dumps(content, indent=1, default=_plain) + "\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text, encoding="utf-8")
        out.with_suffix(".json").write_text(written, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}", expected="a writable folder") from error


def _plain(value: object) -> object:
    """Return Times and Ratio as dictionaries, anything else as text."""
    return asdict(value) if isinstance(value, Times | Ratio) else str(value)
