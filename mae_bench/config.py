"""Typed, closed configs: YAML files, `base:` inheritance, `key=value` overrides, helpful errors."""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from mae_bench.aliases import check_aliases
from mae_bench.errors import UserError, did_you_mean

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Config(BaseModel):
    """Base of every config: frozen, typed, closed (an unknown key is an error), without NaN or infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


T = TypeVar("T")
_NOT_IDENTITY, _EVALUATION_ONLY = "not identity", "evaluation only"

# The type of a field that decides neither the scores nor the weights of its job: where the data is, how work
# is divided, how often state is saved. Such a field is no part of the cell key or the config digest, and may
# differ between comparable results. Example: `num_workers: NotIdentity[int] = 0`.
NotIdentity = Annotated[T, _NOT_IDENTITY]


# The type of a field that no training reads, only the evaluation of what was trained. Another value makes
# another cell, which evaluates the model that an earlier cell trained.
EvaluationOnly = Annotated[T, _EVALUATION_ONLY]


def not_identity(cls: type[BaseModel]) -> set[str]:
    """Return the names of a config's NotIdentity fields."""
    return _find_marked(cls, _NOT_IDENTITY)


def _find_marked(cls: type[BaseModel], mark: str) -> set[str]:
    return {name for name, field in cls.model_fields.items() if mark in field.metadata}


def identity(cls: type[BaseModel], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a `cls` config that identifies its results: all but its NotIdentity fields."""
    left_out = not_identity(cls)
    return {key: value for key, value in config.items() if key not in left_out}


def training_identity(cls: type[BaseModel], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `identity` that decides what is trained: all but its EvaluationOnly fields."""
    left_out = _find_marked(cls, _EVALUATION_ONLY)
    return {key: value for key, value in identity(cls, config).items() if key not in left_out}


class JobConfig(Config):
    """Fields of every job; each kind adds its own. `kind` is a key of `mae_bench.registry.KINDS`."""

    kind: str
    protocol: str = Field(description="name in the record; only records of the same protocol are compared")
    data: NotIdentity[str] = Field(description="root folder of the data set, in the layout of the kind")
    max_bad_images: NotIdentity[float] = Field(
        0.001, ge=0, le=1, description="fraction of images that may fail to decode"
    )


class KeepConfig(JobConfig):
    """Fields of every job that trains a model in order to score it."""

    keep_weights: NotIdentity[bool] = Field(
        True, description="keep the trained model in `trained/`, to evaluate it again without training"
    )


class TrainConfig(JobConfig):
    """Fields of every training job. lr = base_lr x global_batch_size / 256 (paper A.1)."""

    epochs: float = Field(gt=0)
    warmup_epochs: float = Field(0, ge=0)
    base_lr: float = Field(gt=0)
    min_lr: float = Field(0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    global_batch_size: int = Field(gt=0)
    device_batch_size: NotIdentity[int | None] = Field(
        None,
        gt=0,
        description="largest batch per device; with the number of devices it decides the accumulation",
    )
    clip_grad: float | None = Field(None, gt=0)
    amp_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    parallel: NotIdentity[Literal["ddp", "fsdp"]] = Field(
        "ddp", description="how processes share the model: as copies, or as shards"
    )
    compile: NotIdentity[bool | None] = Field(None, description="torch.compile; null compiles on CUDA only")
    deterministic: NotIdentity[bool] = Field(
        False, description="bit-reproducible algorithms on the GPU too; slower"
    )
    checkpoint_seconds: NotIdentity[float] = Field(
        30, ge=0, description="seconds between two saved training states"
    )
    keep_checkpoints: NotIdentity[int] = Field(2, ge=1, description="number of training states to keep")
    trackers: NotIdentity[list[Literal["wandb", "mlflow"]]] = Field(
        [], description="trackers that receive curves in addition to TensorBoard files"
    )
    num_workers: NotIdentity[int] = Field(
        0, ge=0, description="data loader processes; 0 loads in the training process"
    )

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> "TrainConfig":
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} is more than epochs {self.epochs:g}: "
                "the lr would never be reached"
            )
        return self


C = TypeVar("C", bound=BaseModel)


def expand_variables(path: str) -> str:
    """Return a path with $NAME and ~ expanded, for reading; configs and records keep it as given."""
    unset = [name for name in re.findall(r"\$\{?(\w+)", path) if name not in os.environ]
    if unset:
        raise UserError(
            f"{path} names environment variables that are not set: {', '.join(unset)}",
            expected="a value for each",
            fix=f"export {unset[0]}=PATH",
        )
    return os.path.expanduser(os.path.expandvars(path))


def resolve_path(name: str | Path, beside: Path | None = None) -> Path:
    """Return the config file that `name` means; a variant of a grid is the path of a file that it stands for.

    `name` is looked for in the folder `beside`, in the working folder and in the packaged `configs/`. The
    working folder is left out for what a packaged file names, so that no folder of the user's replaces a part
    of a packaged config.
    """
    path = Path(name)
    packaged = beside is not None and beside.resolve().is_relative_to(CONFIGS)
    places = [CONFIGS / path] if packaged else [path, CONFIGS / path]
    if beside is not None:
        places.insert(0, beside / path)
    for place in places:
        if place.is_file() or find_variant(place) is not None:
            return place
    raise UserError(
        f"no config file {name}",
        expected=f"a YAML file at {' or '.join(map(str, places))}",
        fix=did_you_mean(str(path), list_configs(), cutoff=0.3)
        or "mae-bench list tasks, suites, recipes or models",
    )


def list_configs(folder: str = "") -> list[str]:
    """Return the names of the packaged configs below `folder`, each variant of a grid by its own name."""
    names: list[str] = []
    for path in (CONFIGS / folder).rglob("*.yaml"):
        stems = list(find_variants(path)) or [path.stem]
        names += [str(path.with_name(f"{stem}.yaml").relative_to(CONFIGS)) for stem in stems]
    return sorted(names)


def task_file(name: str) -> str:
    """Return the file of a task: a YAML file, a name below configs/tasks, or a bare name of any family."""
    if name.endswith((".yaml", ".yml")):
        return name
    own = f"tasks/{name}.yaml"
    if "/" in name or Path(own).is_file():
        return own
    found = [path for path in list_configs("tasks") if Path(path).stem == name]
    if len(found) > 1:
        families = " or ".join(f"{Path(path).parent.name}/{name}" for path in found)
        raise UserError(
            f"several tasks are called {name}", expected="a name with its family", fix=f"say {families}"
        )
    return found[0] if found else own


def load_yaml(name: str | Path, overrides: Sequence[str] = (), beside: Path | None = None) -> dict[str, Any]:
    """Read a config: each `base: FILE` is loaded first, the rest is merged into it, then the overrides.

    `base` is searched for next to the file that names it, then in the packaged configs. `${a.b}` refers to
    another key. Return plain dicts and lists with all references resolved. A key left at `???` stays the
    string "???", which `build` reports. Raise UserError for a file that is missing or not YAML, and for an
    override that is not key=value.
    """
    return resolve(*_read(resolve_path(name, beside)), overrides)


def read_config(name: str | Path) -> dict[str, Any]:
    """Return a config with its bases merged and its references unresolved, for what is only listed."""
    value = _expand(_read(resolve_path(name)))
    assert isinstance(value, dict)
    return value


def resolve(
    value: dict[str, Any], folder: Path, overrides: Sequence[str] = (), defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Merge a config and resolve its references: `load_yaml` for a config that is already read."""
    return resolve_references(merge(value, folder, overrides, defaults))


def merge(
    value: dict[str, Any], folder: Path, overrides: Sequence[str] = (), defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return a config with its bases and overrides merged and its references unresolved.

    `base:` files are searched for in `folder` first. `defaults` are top-level keys for a config without them.
    """
    merged: Any = OmegaConf.create({**(defaults or {}), **_expand((value, folder))})
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise UserError(
                f"override {item!r}", expected="key=value, for example data.root=../data or seeds=[0,1,2]"
            )
        try:
            check_aliases(text)
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
        except YAMLError as error:
            raise UserError(
                f"the value of override {item!r} is not YAML: {_first_problem(error)}",
                expected="for example data.root=../data, seeds=[0,1,2] or name='\"a: b\"'",
            ) from error
        except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"override {item!r} does not fit the config: {error}") from error
    expanded = _expand((OmegaConf.to_container(merged), Path.cwd()))  # an override may have a base of its own
    assert isinstance(expanded, dict)
    return expanded


def _first_problem(error: YAMLError) -> str:
    """Return what a YAML reader says in one line, without the excerpt of the text."""
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).splitlines()[0]


def resolve_references(value: dict[str, Any]) -> dict[str, Any]:
    """Replace every `${a.b}` by the value it refers to.

    Raise UserError if it is unknown or not given, and for a string that UTF-8 cannot write.
    """
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(value), resolve=True)
    except InterpolationToMissingValueError as error:
        raise _must_be_given([str(error).partition("Missing mandatory value: ")[2].split()[0]]) from error
    except OmegaConfBaseException as error:
        raise UserError(f"a reference cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    try:
        json.dumps(resolved, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        place = error.object[max(0, error.start - 40) : error.end]
        raise UserError(f"a lone surrogate at the end of {place!r}", expected="text in UTF-8") from error
    return {str(key): value for key, value in resolved.items()}


def _read(path: Path) -> tuple[Any, Path]:
    """Return the content of a config or of a variant of a grid, and the folder its `base:` is relative to."""
    if not path.is_file():
        return find_variant(path), path.parent
    variants = list(find_variants(path))
    if variants:
        raise UserError(
            f"{path} is a grid of {len(variants)} configs",
            expected="one of them by its name",
            fix=f"for example {path.with_name(f'{variants[0]}.yaml')}",
        )
    return _read_file(path), path.parent


def _read_file(path: Path) -> dict[str, Any]:
    try:
        check_aliases(path.read_text(encoding="utf-8"))
        value = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # the YAML reader has many error types; each is a mistake in the file
        raise UserError(f"{path} is not a YAML config: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}", expected="a mapping of keys to values")
    return {str(key): item for key, item in value.items()}


def find_variant(path: Path) -> dict[str, Any] | None:
    """Return the config called `path` that a grid in its folder stands for, or None."""
    if path.suffix not in (".yaml", ".yml"):
        return None
    for file in sorted(path.parent.glob("*.yaml")):
        variants = find_variants(file)
        if path.stem in variants:
            return variants[path.stem]
    return None


def find_variants(file: Path) -> dict[str, dict[str, Any]]:
    """Return the configs that a file stands for, by name: those of a grid, or none for any other file."""
    try:
        status = file.stat()
    except OSError:
        return {}
    return _find_variants(file.resolve(), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _find_variants(file: Path, mtime_ns: int, size: int) -> dict[str, dict[str, Any]]:
    """Cache the grids: a suite of 28 ablations reads each file about 100 times. Do not modify the result."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return expand_grid(_read_file(file)) if any(line.startswith("grid:") for line in lines) else {}


def expand_grid(grid: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the variants of a grid by name: one config for each combination of the values of its axes.

    `grid` is the template of the names, for example "vit_{size}_{epochs}ep". `axes` has for each axis either
    a list of values or a mapping from value to the keys that it sets. Every other key is common to all
    variants. "{axis}" in a string is replaced by the axis's value; a string that is nothing but "{axis}"
    takes the value's type.
    """
    axes = grid.get("axes")
    if not isinstance(grid["grid"], str) or not isinstance(axes, dict) or not axes:
        raise UserError(
            f"grid: {grid['grid']!r} with axes: {axes!r}",
            expected='a template such as "vit_{size}" and axes: {size: {base: {...}, large: {...}}}',
        )
    common = {key: value for key, value in grid.items() if key not in ("grid", "axes")}
    variants: dict[str, dict[str, Any]] = {}
    for name, chosen in _combine_axes(grid["grid"], axes):
        config: Any = OmegaConf.create(common)
        for axis, value in chosen.items():
            if isinstance(axes[axis], dict):
                config = OmegaConf.merge(config, OmegaConf.create(axes[axis][value] or {}))
        variants[name] = _substitute(OmegaConf.to_container(config), chosen)
    return variants


def _combine_axes(template: str, axes: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each variant with the value that it has on each axis."""
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        yield str(_substitute(template, chosen)), chosen


def read_title(path: Path) -> str:
    """Return the first sentence of the comment that a config opens with; "" where it has none.

    In the title of a variant of a grid, "{axis}" is replaced as in its keys.
    """
    chosen: dict[str, Any] = {}
    file = path
    if not path.is_file():
        file = next(other for other in path.parent.glob("*.yaml") if path.stem in find_variants(other))
        grid = _read_file(file)
        chosen = dict(_combine_axes(grid["grid"], grid["axes"]))[path.stem]
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.strip("# ") for line in lines)
    sentence = re.split(r"(?<=\.)\s|\s(?=(?:Command|Cost|Expect)\b)", text, maxsplit=1)[0]
    return str(_substitute(sentence, chosen))


def _substitute(value: Any, chosen: dict[str, Any]) -> Any:
    """Replace "{axis}" in every string of `value` by the chosen value of that axis."""
    if isinstance(value, dict):
        return {key: _substitute(item, chosen) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, chosen) for item in value]
    if not isinstance(value, str):
        return value
    for axis, choice in chosen.items():
        if value == f"{{{axis}}}":
            return choice
        value = value.replace(f"{{{axis}}}", str(choice))
    return value


def _expand(source: tuple[Any, Path], chain: tuple[Path, ...] = ()) -> Any:
    """Replaces every `base: FILE` below `source` by that file's content with its siblings merged over it."""
    value, folder = source
    if isinstance(value, list):
        return [_expand((item, folder), chain) for item in value]
    if not isinstance(value, dict):
        return value
    file = value.get("base")
    if not isinstance(file, str):  # a mapping under that name is a row that is called so
        return {key: _expand((item, folder), chain) for key, item in value.items()}
    own = {key: _expand((item, folder), chain) for key, item in value.items() if key != "base"}
    path = resolve_path(file, folder).resolve()
    if path in chain:
        raise UserError(f"configs that are each other's base: {' -> '.join(p.name for p in (*chain, path))}")
    base = _expand(_read(path), (*chain, path))
    return OmegaConf.to_container(
        OmegaConf.merge(OmegaConf.create(base), OmegaConf.create(own)), resolve=False
    )


def build(cls: type[C], value: dict[str, Any], source: str) -> C:
    """Validate `value` as `cls`. Raise UserError with every wrong key, its value and the nearest name."""
    missing = _missing_keys(value)
    if missing:
        raise _must_be_given(missing, f"{source}: ")
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise UserError(
            f"{source}: " + "; ".join(_explain(cls, problem) for problem in error.errors())
        ) from error


def _must_be_given(keys: list[str], prefix: str = "") -> UserError:
    return UserError(
        f"{prefix}{', '.join(keys)} must be given",
        expected="a value for each",
        fix=f"add {' '.join(f'{key}=VALUE' for key in keys)} to the command",
    )


def _missing_keys(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [
            key
            for name, item in value.items()
            for key in _missing_keys(item, f"{path}.{name}" if path else str(name))
        ]
    return [path] if value == "???" else []


def _explain(cls: type[BaseModel], problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if not place:  # a check of several keys
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem['msg']}" + (
            "" if problem["type"] == "missing" else f" (given {problem['input']!r})"
        )
    *parents, key = map(str, problem["loc"])
    model: Any = cls
    for part in parents:
        model = _model_of(model.model_fields[part].annotation)
    near = difflib.get_close_matches(key, sorted(model.model_fields), n=1, cutoff=0.0)
    known = ".".join([*parents, *near])
    return f"unknown key {place!r}; the nearest known key is {known!r}"


def _model_of(annotation: Any) -> Any:
    """Return the model of a field: its type, or the model among the types of an optional field."""
    return next(part for part in (annotation, *get_args(annotation)) if hasattr(part, "model_fields"))
