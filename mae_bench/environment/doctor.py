"""Examine the installation for `mae-bench doctor`: versions, devices, optional packages."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mae_bench.environment.provenance import (
    CORE,
    DETECTRON2,
    git_hash,
    gpu_names,
    hardware,
    version_of,
    versions,
)
from mae_bench.registry import EXTRAS, PACKAGES

PYTHONS = ((3, 11), (3, 12))
# Compiled, or built on compiled packages: only an import shows whether they work.
IMPORTED = (
    "torch",
    "torchvision",
    "timm",
)
ONE_DETECTRON2 = (
    "python -m pip uninstall sal-detectron2   (then reinstall the other: both write to the same folder)"
)
LIBRARY = "install the system library that it names (Debian, Ubuntu: apt-get install libgl1 libglib2.0-0)"
SETUP = "make setup   (in a source checkout; elsewhere: python -m pip install mae_bench)"


def examine() -> dict[str, Any]:
    """Return the findings; `problems` lists what is wrong with the core, `fix` how to repair it."""
    core, rivals = core_problems(), rival_distributions()
    return {
        "versions": versions(),
        "code": git_hash(),
        "hardware": hardware() | {"gpus": gpu_names(), "memory_available_gib": memory_available_gib()},
        "disk": {"folder": os.getcwd(), "free_gib": round(shutil.disk_usage(".").free / 2**30, 1)},
        "extras": {name: _extra(name) for name in EXTRAS},
        "detectron2": detectron2(),
        "problems": core + rivals,
        "fix": SETUP if core else ONE_DETECTRON2 if rivals else "",
    }


def core_problems() -> list[str]:
    """Return what is missing from the core or does not import."""
    found = [f"{name} is not installed" for name in CORE if not version_of(name)]
    found += [
        f"the package {name} of mae_bench is not installed" for name in PACKAGES if find_spec(name) is None
    ]
    if sys.version_info[:2] not in PYTHONS:
        found.append(
            f"Python {sys.version_info.major}.{sys.version_info.minor}: mae_bench needs 3.11 or 3.12"
        )
    for name in IMPORTED:
        try:
            import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # a wrong binary can raise any of these
            found.append(f"{name} does not import: {error}")
    return found


def memory_available_gib() -> float | None:
    """Return the memory available now; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else round(kib / 2**20, 1)


def _extra(name: str) -> dict[str, Any]:
    extra = EXTRAS[name]
    missing = extra.missing()
    broken = [] if missing else [reason for module in extra.compiled if (reason := import_error(module))]
    command = extra.command if missing else LIBRARY if broken else ""
    installed = not missing and not broken
    return {
        "serves": extra.serves,
        "installed": installed,
        "missing": missing,
        "broken": broken,
        "command": command,
    }


def import_error(module: str) -> str:
    """Return why a module cannot be imported, "" if it can. Another process tries it and may crash."""
    done = subprocess.run([sys.executable, "-P", "-c", f"import {module}"], capture_output=True, text=True)
    last = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    return f"{module}: {last}" if done.returncode else ""


def rival_distributions() -> list[str]:
    """Report both distributions of detectron2 at once: they overwrite each other's files."""
    found = [f"{name} {version_of(name)}" for name in DETECTRON2 if version_of(name)]
    return [f"two distributions own the module detectron2: {' and '.join(found)}"] if len(found) > 1 else []


def detectron2() -> dict[str, Any]:
    """Describe the installed detectron2: the wheel that needs no compiler, or a build from source."""
    spec = find_spec("detectron2")
    if spec is None or not spec.submodule_search_locations:
        return {"installed": False}
    folder = Path(spec.submodule_search_locations[0])
    name = next((name for name in DETECTRON2 if version_of(name)), "")
    routes = {
        "sal-detectron2": "wheel that needs no compiler",
        "detectron2": "build of the upstream repository",
        "": "unknown",
    }
    loadable = any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
    return {
        "installed": True,
        "distribution": name,
        "version": version_of(name) if name else "",
        "route": routes[name],
        "extension": loadable,
        "note": "detectron2._C is "
        + ("available; " if loadable else "not available for this Python; ")
        + "mae_bench does not need it",
    }


def render(found: dict[str, Any]) -> RenderableType:
    """Render the findings of `examine` for a terminal."""
    table = Table.grid(padding=(0, 2))
    for name, text in _rows(found):
        table.add_row(Text(name, style="bold"), Text(text))
    problems = [Text(f"Broken: {problem}", style="bold red") for problem in found["problems"]]
    end = [Text(f"Next: {found['fix']}")] if problems else [Text("The core works.", style="green")]
    return Group(table, *problems, *end)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    machine, disk, d2 = found["hardware"], found["disk"], found["detectron2"]
    rows = [
        ("versions", ", ".join(f"{name} {number}" for name, number in found["versions"].items())),
        ("code", found["code"] or "not a git checkout"),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores"),
        ("memory", f"{machine['memory_gib']} GiB, {machine['memory_available_gib']} GiB available"),
        ("GPU", ", ".join(machine["gpus"]) or "none that torch can use; everything runs on the CPU"),
        ("disk", f"{disk['free_gib']} GiB free"),
    ]
    for name, extra in found["extras"].items():
        absent = f"not installed ({', '.join(extra['missing'])} missing). Install: {extra['command']}"
        if extra["broken"]:
            absent = f"broken ({'; '.join(extra['broken'])}). Next: {extra['command']}"
        rows.append((name, f"{extra['serves']}: {'installed' if extra['installed'] else absent}"))
    if d2["installed"]:
        rows.append(("detectron2", f"{d2['distribution']} {d2['version']}: the {d2['route']}; {d2['note']}"))
    return rows
