"""The plan of a suite: every cell with what is done, what is left, and what would fail and why."""

from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mae_bench.cell import Cell
from mae_bench.record import Failure, ResultRecord
from mae_bench.registry import EXTRAS, kind
from mae_bench.runner import check_data
from mae_bench.suite import Place, SuiteConfig, expand

STYLES = {"done": "green", "left": "", "failed": "bold red", "would fail": "red", "not installed": "yellow"}


def plan_of(suite: SuiteConfig) -> dict[str, Any]:
    """JSON-ready. A cell's state: done; failed (it was tried and will be again); left; would fail; not installed.

    Data that the suite makes itself is no reason to fail before it is made: the keys of its cells follow when it is there.
    """
    digests, problems = check_data(suite)
    if suite.demo_data:
        problems = {}
    cells = [as_dict(cell, cell.result()) | _prospect(cell, problems) for cell in expand(suite, digests)]
    return {"suite": suite.name, "out": suite.out, "cells": cells}


def _prospect(cell: Cell, problems: dict[Place, Any]) -> dict[str, Any]:
    """What stands in the way of a cell that has no record."""
    if isinstance(cell.result(), ResultRecord):
        return {}
    chosen = kind(cell.kind)
    place: Any = (chosen.layout, cell.config.get("data"))
    if problem := problems.get(place):
        return {"state": "would fail", "reason": problem.given, "fix": problem.fix}
    if chosen.extra and (missing := EXTRAS[chosen.extra].missing()):
        return {"state": "not installed", "reason": f"{', '.join(missing)} missing", "fix": EXTRAS[chosen.extra].command}
    return {}


def as_dict(cell: Cell, result: ResultRecord | Failure | None) -> dict[str, Any]:
    """A cell and what has become of it, JSON-ready."""
    value: dict[str, Any] = {
        "backbone": cell.backbone, "task": cell.task, "protocol": cell.config.get("protocol", cell.kind), "seed": cell.seed,
        "key": cell.key, "dir": str(cell.dir), "state": "left",
    }  # fmt: skip
    if isinstance(result, Failure):
        return value | {"state": result.status, "reason": result.reason, "fix": result.fix}
    if result:
        return value | {"state": "done", "metric": result.main_metric, "score": result.score.value, "unit": result.score.unit}
    return value


def counts(cells: list[dict[str, Any]]) -> str:
    """For example "15 cells: 12 done, 3 left"."""
    counted = Counter(cell["state"] for cell in cells)
    return f"{len(cells)} cells: " + ", ".join(f"{counted[state]} {state}" for state in STYLES if counted[state])


def render(plan: dict[str, Any]) -> RenderableType:
    """The plan for a terminal."""
    table = Table(box=None, header_style="bold")
    for name in ("backbone", "task", "protocol", "seed", "state", "score"):
        table.add_column(name, no_wrap=True)
    for cell in plan["cells"]:
        score = f"{cell['metric']} {cell['score']:.5g} {cell['unit']}" if cell["state"] == "done" else ""
        texts = (cell["backbone"], cell["task"], cell["protocol"], str(cell["seed"]))
        table.add_row(*map(Text, texts), Text(cell["state"], style=STYLES[cell["state"]]), Text(score))
    reasons = dict.fromkeys(f"{cell['state']}: {cell['reason']}" + (f"\n  Next: {cell['fix']}" if cell["fix"] else "")
                            for cell in plan["cells"] if "reason" in cell)  # fmt: skip
    return Group(table, Text(f"\n{counts(plan['cells'])}, in {plan['out']}"), *(Text(reason) for reason in reasons))
