"""Load a suite, a typed YAML of backbones, tasks and seeds, and expand it to its graph of cells."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mae_bench.config import Config, build, identity, load_yaml, merge, read_config, resolve_references
from mae_bench.data.checks.folders import Layout
from mae_bench.data.demo.demo import DemoConfig
from mae_bench.errors import UserError, near_path
from mae_bench.files import FOLDER_NAME, file_digest, is_folder_name, json_digest
from mae_bench.job import EXPORT
from mae_bench.registry import KINDS, kind, load_object
from mae_bench.suite.cell import BACKBONE, Cell

CELLS = "cells"  # subfolder of a suite's output with its cells
SUITE_FILE = "suite.json"  # next to it: the suite last run there
Place = tuple[Layout, str]  # a layout, and a folder with data in that layout
DATA_KEYS: dict[
    str, tuple[str, ...]
] = {  # the keys of `data` that name the folder of a layout, where it is not the layout
    "images": ("pretrain", "imagenet"),
    "imagenet_val": ("imagenet",),
    "image_sets": ("imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "imagenet-c"),
}


class SuiteConfig(Config):
    """Backbones x tasks x seeds.

    A job without `data` in its config reads the suite's folder of its layout. $NAME in a folder is expanded
    from the environment when the data is read, and kept as it is in records.

    Attributes:
        out: the output folder (`--out`).
        data: `root` and a folder per layout, root/LAYOUT by default; `pretrain`, imagenet by default, is for
            pretraining.
        demo_data: data to generate in data.root before anything else.
        jobs: number of concurrent worker processes; "auto" is one per GPU, or one per CPU core and at most 4.
        processes: number of processes per cell of a distributed kind, one per GPU; "auto" is all GPUs if the
            suite is one cell, else 1.
        threads: number of CPU threads per process; the last digits of a score can depend on it.
    """

    name: str
    out: str
    baseline: str = Field("", description="the backbone to compare with; by default the first")
    seeds: list[int] = Field([0], min_length=1, description="seeds of the transfers")
    backbone_seed: int = 0
    data: dict[str, str | None] = {}
    demo_data: DemoConfig | None = None
    backbones: dict[str, dict[str, Any]] = Field(min_length=1)
    tasks: dict[str, dict[str, Any]] = {}
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    threads: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _names_are_folders(self) -> "SuiteConfig":
        named = {"name": [self.name], "backbones": self.backbones, "tasks": self.tasks}
        for key, names in named.items():
            for name in names:
                if not is_folder_name(name):
                    raise ValueError(f"{key}: {name!r} is not {FOLDER_NAME}")
        return self

    @field_validator("seeds")
    @classmethod
    def _are_unique(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("each seed once")
        return seeds

    @property
    def row_of_baseline(self) -> str:
        return self.baseline or next(iter(self.backbones))


def load_suite(
    source: str | Path | dict[str, Any], overrides: Sequence[str] = (), out: str | Path | None = None
) -> SuiteConfig:
    """Read a suite (a file, or its content), validate it, and complete the configs of its jobs.

    The default of `out` is runs/NAME. Raise UserError with the key, the value and the nearest known name.
    """
    if not isinstance(source, dict) and is_job(source):
        raise UserError(
            f"{source} is the config of one job",
            expected="a suite",
            fix=f"mae-bench pretrain {source} or, for a task, mae-bench evaluate --tasks {source}",
        )
    value = dict(source) if isinstance(source, dict) else {"base": str(source)}
    if out:
        value["out"] = str(out)
    merged = merge(value, Path.cwd(), overrides, {"out": "runs/${name}"})
    _leave_out_null_jobs(merged)
    _forget_absent_root(merged)
    raw = resolve_references(merged)
    name = str(raw.get("name", source))
    data = raw.get("data") or {}
    _check_data_keys(data)
    for _, job in _jobs(raw):
        _fill_data(job, data)
    if data:  # what no job reads need not be given
        raw["data"] = {key: folder for key, folder in data.items() if folder != "???"}
    suite = build(SuiteConfig, raw, name)
    if suite.baseline and suite.baseline not in suite.backbones:
        raise UserError(
            f"baseline {suite.baseline!r} is not one of the backbones",
            expected=f"one of {', '.join(suite.backbones)}",
        )
    jobs = {place: complete_job(place, job) for place, job in _jobs(suite.model_dump())}
    for place, job in jobs.items():
        _check_group(place, job)
    return suite.model_copy(
        update={
            group: {name: jobs[f"{group}.{name}"] for name in getattr(suite, group)}
            for group in ("backbones", "tasks")
        }
    )


def is_job(source: str | Path) -> bool:
    """Whether a config file describes one job, for example a pretraining, and not a suite."""
    return "kind" in read_config(source)


def suite_of_job(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the suite that runs one job that makes a backbone; both are named after the file."""
    name = Path(source).stem
    return {"name": name, "backbones": {name: complete_job(source, load_yaml(source, overrides))}}


def _leave_out_null_jobs(raw: dict[str, Any]) -> None:
    """Remove the backbones and tasks that an override set to null."""
    for group in ("backbones", "tasks"):
        members = raw.get(group)
        if isinstance(members, dict):
            raw[group] = {name: job for name, job in members.items() if job is not None}


def _forget_absent_root(raw: dict[str, Any]) -> None:
    """Mark folders in a missing data.root as missing, so that naming the other folders is enough.

    If no folder is given at all, data.root is reported as missing.
    """
    data = raw.get("data")
    if not isinstance(data, dict) or data.get("root") != "???":
        return
    below = [key for key, folder in data.items() if "${data.root}" in str(folder)]
    if len(below) + 1 < len(data):
        data.update(dict.fromkeys(below, "???"))


def baseline_of(folder: Path) -> str:
    """Return the baseline of the suite last run in a folder; "" if there was none."""
    path = folder / SUITE_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return str(value["baseline"] or next(iter(value["backbones"])))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(
            f"{path} cannot be read: {error!r}",
            expected="the suite that was last run here",
            fix="give --baseline NAME",
        ) from error


def _jobs(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every job with its place in the YAML, for example "tasks.finetune"."""
    for group in ("backbones", "tasks"):
        members = raw.get(group)
        for name, job in (members if isinstance(members, dict) else {}).items():
            yield f"{group}.{name}", job


def _check_data_keys(data: Any) -> None:
    known = [
        "root",
        *sorted({key for kind in KINDS.values() if kind.layout for key in _data_keys(kind.layout)}),
    ]
    if not isinstance(data, dict):
        raise UserError(f"data={data}", expected=f"keys of data: {', '.join(known)}", fix=f"data.root={data}")
    unknown = [key for key in data if key not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown key 'data.{unknown[0]}'; the nearest known key is 'data.{near}'")


def _fill_data(job: Any, data: dict[str, Any]) -> None:
    """Set the `data` of a job that has none to the suite's folder for its layout."""
    name = job.get("kind") if isinstance(job, dict) else None
    layout = KINDS[name].layout if isinstance(name, str) and name in KINDS else ""
    if not layout or job.get("data", "???") != "???":
        return
    keys = _data_keys(layout)
    if job.get("set") in keys:
        keys = (job["set"],)
    root = data.get("root")
    named = [data[key] for key in keys if data.get(key)]
    if root and root != "???":
        named.append(f"{root}/{keys[-1]}")
    folder = named[0] if named else "???"
    if folder == "???":
        raise UserError(
            f"data.{keys[0]} must be given",
            expected=f"a folder in the layout {layout!r}",
            fix=f"add data.root=PATH (the folder that contains {keys[-1]}/) "
            f"or data.{keys[0]}=PATH to the command",
        )
    job["data"] = folder


def _data_keys(layout: str) -> tuple[str, ...]:
    return DATA_KEYS.get(layout, (layout,))


def complete_job(place: str, job: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a job with all defaults, as JSON types. Raise UserError if it is invalid."""
    if "kind" not in job:
        raise UserError(
            f"{place} has no kind",
            expected=f"one of {', '.join(KINDS)}",
            fix="if this is an override, check its spelling",
        )
    chosen = kind(job["kind"])
    value = {"data": "???"} | job if chosen.layout else job
    config: dict[str, Any] = build(load_object(chosen.config), value, place).model_dump(mode="json")
    return config


def _check_group(place: str, job: dict[str, Any]) -> None:
    if kind(job["kind"]).emits_backbone != place.startswith("backbones."):
        verb = "makes a backbone" if kind(job["kind"]).emits_backbone else "transfers one"
        raise UserError(
            f"{place} is of kind {job['kind']!r}, which {verb}",
            expected="makers in backbones:, transfers in tasks:",
        )


def places(suite: SuiteConfig) -> list[Place]:
    """Return the data sets that the suite reads, each once."""
    found: list[Any] = [
        (kind(job["kind"]).layout, job["data"])
        for _, job in _jobs(suite.model_dump())
        if kind(job["kind"]).layout
    ]
    return list(dict.fromkeys(found))


def expand(suite: SuiteConfig, digests: Mapping[Place, str]) -> list[Cell]:
    """Return one cell per backbone, then one per task, seed and backbone.

    Without a digest of its data a cell has a provisional key.
    """
    makers = {
        name: _cell(suite, digests, name, BACKBONE, job, suite.backbone_seed, None)
        for name, job in suite.backbones.items()
    }
    transfers = [
        _cell(suite, digests, name, task, job, seed, maker)
        for task, job in suite.tasks.items()
        for seed in suite.seeds
        for name, maker in makers.items()
    ]
    return [*makers.values(), *transfers]


def _cell(
    suite: SuiteConfig,
    digests: Mapping[Place, str],
    name: str,
    task: str,
    job: dict[str, Any],
    seed: int,
    maker: Cell | None,
) -> Cell:
    chosen = kind(job["kind"])
    place: Any = (chosen.layout, job.get("data"))
    config = identity(load_object(chosen.config), job)
    decisive = {
        "version": chosen.version,
        "config": {key: _content(key, value) for key, value in config.items()},
        "data": digests.get(place, ""),
        "seed": seed,
        "backbone": maker.key if maker else "",
    }
    key = json_digest(decisive)
    folder = Path(suite.out) / CELLS / name / f"{task}-s{seed}-{key[:8]}"
    return Cell(name, task, chosen.task, job["kind"], job, seed, key, folder, maker.dir if maker else None)


def source_path(source: str) -> Path | None:
    """Return the path of a checkpoint's SOURCE; None if it is not on this machine's disk (timm:NAME)."""
    scheme, colon, rest = source.partition(":")
    if not colon or Path(source).exists():
        return Path(source)
    return {"file": Path(rest), "run": Path(rest) / EXPORT}.get(scheme)


def check_sources(suite: SuiteConfig) -> None:
    """Raise UserError for checkpoints whose files are missing."""
    sources = {name: job["source"] for name, job in suite.backbones.items() if "source" in job}
    paths = {name: source_path(source) for name, source in sources.items()}
    missing = {name: path for name, path in paths.items() if path and not path.exists()}
    if missing:
        raise UserError(
            "\n".join(f"backbones.{name}: {path} is missing" for name, path in missing.items()),
            expected="a weight file, or a folder with one",
            fix="; ".join(filter(None, map(near_path, missing.values()))),
        )


def _content(key: str, value: Any) -> Any:
    """Replace a path of weights by the digests of its files: other weights at a path make another cell."""
    if key not in ("source", "tokenizer") or not value:
        return value
    path = source_path(value)
    if path is None:
        return value
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file_digest(file) for file in files if file.is_file()] or value
