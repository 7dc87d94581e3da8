"""Digest the source that a result is computed with, so that its record shows a change of the code."""

import ast
import hashlib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mae_bench.files import json_digest
from mae_bench.registry import Kind

OURS = ("mae_bench", "backbones", "tasks")
NAME = re.compile(r"\w+(\.\w+)+")  # of a module in a package


def digest_kind(kind: Kind) -> str:
    """Return the digest of the code of a kind of job: of its config, its run, and how it fits a backbone."""
    return digest_code(*(path.partition(":")[0] for path in (kind.config, kind.run, kind.fit) if path))


@cache
def digest_code(*modules: str) -> str:
    """Return the SHA-256 of the source of some modules and of everything of ours that they import.

    Imports inside functions count, and so do modules named by a string, as the readers of formats are.
    Comments, docstrings, layout and the version of Python do not. Nothing is imported.
    """
    packages = {*OURS, *(name.partition(".")[0] for name in modules)}
    digests: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _find_source(name) if name not in digests and name.partition(".")[0] in packages else None
        if path:
            digests[name], imports = _read_module(path)
            waiting += imports
    if missing := sorted(set(modules) - digests.keys()):
        raise ModuleNotFoundError(f"no source of {', '.join(missing)}")
    return json_digest(digests)


def _find_source(name: str) -> Path | None:
    """Return the file of a module; None for any other name, such as that of a class in a module."""
    root = _find_root(name.partition(".")[0])
    place = root.joinpath(*name.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@cache
def _find_root(package: str) -> Path:
    """Return the folder with a package, or with a module that is in no package."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0] if folders else (spec and spec.origin) or "").parent


@cache
def _read_module(path: Path) -> tuple[str, list[str]]:
    """Return the digest of a module's source, and the names in it that may be modules."""
    names: list[str] = []
    text = _write(ast.parse(path.read_bytes()), names)
    return hashlib.sha256(text.encode()).hexdigest(), names


def _write(node: Any, names: list[str]) -> str:
    """Return a syntax tree as text, and add the names in it that may be modules to `names`.

    The text is the same for every version of Python: empty fields, of which newer versions have more, are
    left out, as are `ctx`, which repeats what the fields say, and docstrings.
    """
    if isinstance(node, list):
        return f"[{','.join([_write(item, names) for item in node if not _is_docstring(item)])}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    names += _list_names(node)
    fields = []
    for name in node._fields:
        value = getattr(node, name, None)
        if name != "ctx" and value is not None and value != []:
            fields.append(f"{name}={_write(value, names)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _list_names(node: ast.AST) -> list[str]:
    """Return the names in a node that may be modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
        return [node.value]
    return []


def _is_docstring(node: Any) -> bool:
    """Whether a node is a statement that is a string and nothing else."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
