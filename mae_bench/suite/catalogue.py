"""List what is packaged: tasks, suites, recipes, models and checkpoint formats, each with its title."""

import ast
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from mae_bench.config import CONFIGS, list_configs, read_config, read_title
from mae_bench.registry import KINDS

Row = dict[str, Any]


def list_tasks() -> list[Row]:
    """Return the transfer protocols: the names that `evaluate --tasks` and a suite's `base:` take."""

    def describe(name: str, config: Row) -> Row:
        short = name.removeprefix("tasks/").removesuffix(".yaml")
        layout = KINDS[config["kind"]].layout
        return {"name": short, "kind": config["kind"], "data": layout, "protocol": config["protocol"]}

    return _list_rows(["tasks"], describe)


def list_suites() -> list[Row]:
    """Return the suites that `run` and `plan` take."""

    def describe(name: str, config: Row) -> Row:
        return {"backbones": len(config["backbones"]), "tasks": len(config.get("tasks", {}))}

    return _list_rows(["suites"], describe)


def list_recipes() -> list[Row]:
    """Return the pretraining recipes that `pretrain` takes, the paper's ablations included."""

    def describe(name: str, config: Row) -> Row:
        return {"kind": config["kind"], "protocol": config["protocol"]}

    return _list_rows(["pretrain", "ablations"], describe)


def list_models() -> list[Row]:
    """Return the architectures that a recipe's `model: {base: ...}` takes."""

    def describe(name: str, config: Row) -> Row:
        return {key: config[key] for key in ("embed_dim", "depth", "num_heads", "patch_size", "img_size")}

    return _list_rows(["models"], describe)


def _list_rows(folders: list[str], describe: Callable[[str, Row], Row]) -> list[Row]:
    """Return name, what `describe` adds, and title of every packaged config in the folders."""
    rows = []
    for folder in folders:
        for name in list_configs(folder):
            described = {"name": name} | describe(name, read_config(name))
            rows.append(described | {"title": read_title(CONFIGS / name)})
    return rows


def describe_formats(formats: dict[str, str], writable: dict[str, tuple[str, ...]]) -> list[Row]:
    """Return the checkpoint formats with the first sentence of each one's module, which is not imported."""
    rows = []
    for name, module in formats.items():
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
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


def render(rows: list[Row]) -> Table:
    """Return names and titles as a table for a terminal; `--json` has every field."""
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("title", overflow="fold")
    for row in rows:
        title = f"{row['title']} Also written." if row.get("written") else row["title"]
        table.add_row(row["name"], title)
    return table
