"""Plan a suite: every cell with its state, and why it would fail."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mae_bench.config import identity
from mae_bench.environment.provenance import visible_gpus
from mae_bench.errors import UserError
from mae_bench.record import RECORD_FILE, Failure, ResultRecord
from mae_bench.registry import EXTRAS, kind, load_object
from mae_bench.runner.fitting import Preview, find_misfits, preview_backbones
from mae_bench.runner.runner import check_data, num_processes
from mae_bench.seal import BrokenSeal, read_sealed_json
from mae_bench.suite.cell import CELL_FILE, Cell
from mae_bench.suite.config import Place, SuiteConfig, expand

MAX_CHANGES = 5  # listed per cell
STYLES = {"done": "green", "left": "", "failed": "bold red", "would fail": "red", "not installed": "yellow"}


def plan_of(suite: SuiteConfig) -> dict[str, Any]:
    """Return the plan as JSON types.

    The state of a cell is done, failed (it will be tried again), left, would fail or not installed.

    Missing demo data is no error, because the run generates it; the keys of its cells are provisional until
    then.
    """
    digests, problems = check_data(suite)
    if suite.demo_data:
        problems = {}
    cells, processes = expand(suite, digests), num_processes(suite, num_gpus(suite))
    previews = preview_backbones(cells)
    misfits = find_misfits(cells, previews, digests)
    planned = []
    for cell in cells:
        result, preview = cell.result(), previews.get(cell.dir, Preview())
        error = misfits.get(cell.dir)
        if error is None and result is None:
            error = preview.error  # a checkpoint that was tried has its failure
        planned.append(
            as_dict(cell, result)
            | _prospect(cell, result, problems, error)
            | _devices(cell, result, processes)
            | ({"assumptions": list(preview.assumptions)} if preview.assumptions else {})
        )
    return {"suite": suite.name, "out": suite.out, "cells": planned}


def num_gpus(suite: SuiteConfig) -> int:
    """Return the number of GPUs available to a run on this machine."""
    return 0 if suite.device == "cpu" else len(visible_gpus())


def _devices(cell: Cell, result: ResultRecord | Failure | None, processes: int) -> dict[str, Any]:
    """Return how the processes of a distributed cell make its global batch, or why they cannot."""
    if not kind(cell.kind).distributed or isinstance(result, ResultRecord):
        return {}
    if "global_batch_size" not in cell.config:  # no training
        return {"processes": processes}
    from mae_bench.engine.accumulation import plan_accumulation

    try:
        batch = str(
            plan_accumulation(cell.config["global_batch_size"], processes, cell.config["device_batch_size"])
        )
    except UserError as error:
        return {"processes": processes, "state": "would fail", "reason": error.reason, "fix": error.fix}
    return {"processes": processes, "batch": batch}


def _prospect(
    cell: Cell, result: ResultRecord | Failure | None, problems: dict[Place, Any], error: UserError | None
) -> dict[str, Any]:
    """Return what would keep a cell without a record from running."""
    if isinstance(result, ResultRecord):
        return {}
    chosen = kind(cell.kind)
    place: Any = (chosen.layout, cell.config.get("data"))
    problem = problems.get(place) or error
    if problem:
        return {"state": "would fail", "reason": problem.reason, "fix": cell.insert_names(problem.fix)}
    missing = EXTRAS[chosen.extra].missing() if chosen.extra else []
    if missing:
        reason = f"{', '.join(missing)} missing"
        return {"state": "not installed", "reason": reason, "fix": EXTRAS[chosen.extra].command}
    if result:
        return {}
    invalid = cell.explain_rerun()
    return {"reason": f"{cell.name}: {invalid}", "fix": ""} if invalid else _finished_otherwise(cell)


def _finished_otherwise(cell: Cell) -> dict[str, str]:
    """Return how a cell that is left differs from the last finished one of the same name, if there is one."""
    finished = [folder for folder in cell.find_others() if (folder / RECORD_FILE).is_file()]
    configs = {folder: config for folder in finished if (config := _read_config(folder)) is not None}
    if not configs:
        return {}
    last = max(configs, key=lambda folder: (folder / RECORD_FILE).stat().st_mtime)
    config = configs[last]
    config_class = load_object(kind(cell.kind).config)
    changes = _changes(identity(config_class, config), identity(config_class, cell.config))
    listed = changes[:MAX_CHANGES]
    if len(changes) > MAX_CHANGES:
        listed.append(f"{len(changes) - MAX_CHANGES} more")
    if not listed:
        listed = ["another backbone"] if cell.upstream else []
        listed += ["other data", "or another version of its code"]
    why = ", ".join(listed)
    return {"reason": f"{cell.name}: {last} is finished, but with {why}", "fix": ""}


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config that a cell was run with, None if its file is missing or damaged."""
    try:
        config = read_sealed_json(folder / CELL_FILE, required=False)["cell"]["config"]
    except (OSError, BrokenSeal, KeyError, TypeError):
        return None
    return config if isinstance(config, dict) else None


def _changes(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the keys whose values differ, each with both values."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} (here {new})")
    return found


def as_dict(cell: Cell, result: ResultRecord | Failure | None) -> dict[str, Any]:
    """Return a cell and its result as JSON types."""
    value: dict[str, Any] = {
        "backbone": cell.backbone,
        "task": cell.row,
        "protocol": cell.config.get("protocol", cell.kind),
        "seed": cell.seed,
        "key": cell.key,
        "dir": str(cell.dir),
        "state": "left",
    }
    if isinstance(result, Failure):
        return value | {"state": result.status, "reason": result.reason, "fix": result.fix}
    if result:
        return value | {
            "state": "done",
            "metric": result.main_metric,
            "score": result.score.value,
            "unit": result.score.unit,
        }
    return value


def counts(cells: list[dict[str, Any]]) -> str:
    """Return for example "15 cells: 12 done, 3 left"."""
    counted = Counter(cell["state"] for cell in cells)
    return f"{len(cells)} cells: " + ", ".join(
        f"{counted[state]} {state}" for state in STYLES if counted[state]
    )


def render(plan: dict[str, Any]) -> RenderableType:
    """Render the plan for a terminal."""
    table = Table(box=None, header_style="bold")
    for name in ("backbone", "task", "protocol", "seed", "state", "score"):
        table.add_column(name, no_wrap=True)
    for cell in plan["cells"]:
        score = f"{cell['metric']} {cell['score']:.5g} {cell['unit']}" if cell["state"] == "done" else ""
        texts = (cell["backbone"], cell["task"], cell["protocol"], str(cell["seed"]))
        table.add_row(*map(Text, texts), Text(cell["state"], style=STYLES[cell["state"]]), Text(score))
    reasons: dict[str, None] = {}  # each once, in order
    assumed: dict[str, None] = {}  # likewise
    rows: dict[str, dict[str, None]] = {}  # batch -> its backbones, each once
    for cell in plan["cells"]:
        if "reason" in cell:
            fix = f"\n  Next: {cell['fix']}" if cell["fix"] else ""
            reasons[f"{cell['state']}: {cell['reason']}{fix}"] = None
        for assumption in cell.get("assumptions", ()):
            assumed[f"{cell['backbone']}: {assumption}"] = None
        if "batch" in cell:
            rows.setdefault(cell["batch"], {})[cell["backbone"]] = None
    known = [f"{', '.join(names)}: {batch}" for batch, names in rows.items()] + [*assumed]
    counted = f"\n{counts(plan['cells'])}, in {plan['out']}"
    return Group(table, *(Text(line) for line in ([""] if known else []) + known + [counted, *reasons]))
