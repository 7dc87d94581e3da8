"""The data file of known families: what holds for a family's weights where a file does not say it."""

from functools import cache
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

NOT_OF_THE_SPEC = ("source", "evaluates")


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = files("backbones").joinpath("families.yaml").read_text(encoding="utf-8")
    table: Any = OmegaConf.to_container(OmegaConf.create(text))
    return table


def family(name: str) -> dict[str, Any]:
    """Fields of the BackboneSpec to assume for a family; KeyError for one that the file does not list."""
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in _table()[name].items()}
    return {"pretrain_data": "unknown"} | {
        key: value for key, value in found.items() if key not in NOT_OF_THE_SPEC
    }


def evaluates(name: str) -> str | None:
    """The set of weights that the family's authors evaluate, where its training files hold several."""
    return _table()[name].get("evaluates")


def families() -> list[str]:
    """The families that are listed."""
    return list(_table())


def published_in(name: str) -> str:
    """Where it is written down how the family is fed."""
    return str(_table()[name]["source"])
