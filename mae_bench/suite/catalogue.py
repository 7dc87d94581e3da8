"""List what is packaged: tasks, suites, recipes, models and checkpoint formats, each with its title."""

import ast
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from mae_bench.config import CONFIGS, list_configs, read_config, read_title
from mae_bench.errors import UserError, did_you_mean
from mae_bench.registry import KINDS

Row = dict[str, Any]


def list_tasks() -> list[Row]:
    """Return the transfer protocols: the names that `evaluate --tasks` and a suite's `base:` take."""
    rows = []
    for name in list_configs("tasks"):
        config = read_config(name)
        kind = KINDS[config["kind"]]
        short = name.removeprefix("tasks/").removesuffix(".yaml")
        reads = {"name": short, "kind": config["kind"], "data": kind.layout, "protocol": config["protocol"]}
        rows.append(reads | {"title": read_title(CONFIGS / name)})
    return rows


def list_suites() -> list[Row]:
    """Return the suites that `run` and `plan` take."""
    rows = []
    for name in list_configs("suites"):
        config = read_config(name)
        size = {"backbones": len(config["backbones"]), "tasks": len(config.get("tasks", {}))}
        rows.append({"name": name} | size | {"title": read_title(CONFIGS / name)})
    return rows


def list_recipes() -> list[Row]:
    """Return the pretraining recipes that `pretrain` takes, the paper's ablations included."""
    rows = []
    for name in list_configs("pretrain") + list_configs("ablations"):
        config = read_config(name)
        of = {"name": name, "kind": config["kind"], "protocol": config["protocol"]}
        rows.append(of | {"title": read_title(CONFIGS / name)})
    return rows


def list_models() -> list[Row]:
    """Return the architectures that a recipe's `model: {base: ...}` takes."""
    rows = []
    for name in list_configs("models"):
        config = read_config(name)
        sizes = {key: config[key] for key in ("embed_dim", "depth", "num_heads", "patch_size", "img_size")}
        rows.append({"name": name} | sizes | {"title": read_title(CONFIGS / name)})
    return rows


def describe_formats(formats: dict[str, str], writable: dict[str, tuple[str, ...]]) -> list[Row]:
    """Return the checkpoint formats with the first sentence of each one's module, which is not imported."""
    rows = []
    for name, module in formats.items():
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, module
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        sentence = docstring.split("\n\n")[0].replace("\n", " ").removeprefix(f"{name}: ")
        rows.append({"name": name, "written": name in writable, "title": sentence})
    return rows


LISTS: dict[str, Callable[[], list[Row]]] = {
    "tasks": list_tasks,
    "suites": list_suites,
    "recipes": list_recipes,
    "models": list_models,
}


def check_list(what: str) -> str:
    """Return `what` if it can be listed; raise UserError otherwise."""
    known = [*LISTS, "formats"]
    if what not in known:
        raise UserError(f"list {what}", expected=f"one of {', '.join(known)}", fix=did_you_mean(what, known))
    return what


def render(rows: list[Row]) -> Table:
    """Return the rows as a table for a terminal."""
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for row in rows:
        table.add_row(*(_render_value(value) for value in row.values()))
    return table


def _render_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return str(value)
