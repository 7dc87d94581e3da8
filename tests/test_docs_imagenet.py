"""docs/imagenet.md says what the code is: every key with its default, every config under its protocol."""

import re
from itertools import product

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from mae_bench.config import CONFIGS, JobConfig, KeepConfig, load_yaml
from mae_bench.registry import KINDS, load_object
from tasks.imagenet import config as configs

PAGE = (CONFIGS.parent / "docs" / "imagenet.md").read_text(encoding="utf-8")
TEXT, KEYS = PAGE.split("## Every key")
SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "Every protocol": (JobConfig, configs.ImageConfig),
    "All but eval_only and robustness": (configs.PooledConfig,),
    "Those that train": (configs.TrainConfig, KeepConfig, configs.EvalConfig),
    "finetune, supervised, partial_finetune": (configs.ClassifyConfig,),
    "supervised": (configs.SupervisedConfig,),
    "finetune, partial_finetune": (configs.FinetuneConfig,),
    "partial_finetune": (configs.PartialFinetuneConfig,),
    "linear_probe": (configs.LinearProbeConfig,),
    "knn": (configs.KnnConfig,),
    "few_shot": (configs.FewShotConfig,),
    "eval_only": (configs.EvalOnlyConfig,),
    "robustness": (configs.RobustnessConfig,),
}
IMAGE_KEYS = {"amp_dtype", "num_workers"}  # of TrainConfig too, and told with ImageConfig's


def own_fields(cls: type[BaseModel]) -> dict[str, object]:
    """Default (or "required") of each field that a class adds, or gives another default than its bases."""
    bases = [base.model_fields for base in cls.__bases__ if issubclass(base, BaseModel)]
    known = {name: _default(field) for fields in bases for name, field in fields.items()}
    own = {name: _default(field) for name, field in cls.model_fields.items()}
    return {
        name: value
        for name, value in own.items()
        if name != "kind" and (name not in known or known[name] != value)
    }


def _default(field) -> object:  # type: ignore[no-untyped-def]
    return "required" if field.is_required() else to_jsonable_python(field.default)


def table(heading: str) -> dict[str, object]:
    """Key -> default in the table below a heading."""
    section = KEYS.split(f"### {heading}\n")[1].split("###")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)
    return {
        key: default if default == "required" else yaml.safe_load(default.strip("`")) for key, default in rows
    }


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_stands_there_with_its_default(heading: str) -> None:
    wanted: dict[str, object] = {}
    for cls in SECTIONS[heading]:
        wanted |= own_fields(cls)
    if heading == "Those that train":
        wanted = {name: value for name, value in wanted.items() if name not in IMAGE_KEYS}
    assert table(heading) == wanted


def test_every_kind_has_a_section_of_keys_and_one_of_text() -> None:
    kinds = [name for name, kind in KINDS.items() if kind.config.startswith("tasks.imagenet.")]
    for name in kinds:
        cls = load_object(KINDS[name].config)
        assert any(cls in classes for classes in SECTIONS.values()), name
        assert f"| `{name}` |" in TEXT
        assert f"### {name}\n" in TEXT


def named_configs() -> list[tuple[str, str]]:
    """(config, protocols) of each row of a table of configs, braces and lists expanded."""
    rows = re.findall(r"^\| (`[^|]*`) \| ((?:`[a-z\d-]+`[^|]*)) \|", TEXT, re.MULTILINE)
    found = []
    for names, protocols in rows:
        for name in re.findall(r"`([^`]+)`", names):
            parts = [part.split(",") for part in re.split(r"[{}]", name)]
            found += [("".join(each), protocols) for each in product(*parts)]
    return [(name, protocols) for name, protocols in found if name not in KINDS]


def test_every_config_of_a_table_is_there_under_its_protocol() -> None:
    found = named_configs()
    assert len(found) > 14
    for name, protocols in found:
        assert load_yaml(f"tasks/imagenet/{name}.yaml")["protocol"] in re.findall(r"`([^`]+)`", protocols), (
            name
        )


def test_every_config_is_told_of() -> None:
    told = {name for name, _ in named_configs()} | set(re.findall(r"`([\w{},]+)`", TEXT))
    told |= {
        "".join(each)
        for name in told
        for each in product(*(part.split(",") for part in re.split(r"[{}]", name)))
    }
    assert {path.stem for path in (CONFIGS / "tasks/imagenet").glob("*.yaml")} - told <= {
        "supervised_demo",
        "supervised_small",
    }
