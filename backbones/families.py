"""Look up what is published about a family of weights and its files do not state (families.yaml)."""

from functools import cache
from importlib.resources import files
from typing import Any, cast

from omegaconf import OmegaConf

NOT_IN_SPEC = ("source", "evaluates")


@cache
def _load_table() -> dict[str, dict[str, Any]]:
    text = files("backbones").joinpath("families.yaml").read_text(encoding="utf-8")
    return cast(dict[str, dict[str, Any]], OmegaConf.to_container(OmegaConf.create(text)))


def family(name: str) -> dict[str, Any]:
    """Return the BackboneSpec fields to assume for a family; KeyError if it is not listed."""
    fields: dict[str, Any] = {"pretrain_data": "unknown"}
    for key, value in _load_table()[name].items():
        if key not in NOT_IN_SPEC:
            fields[key] = tuple(value) if isinstance(value, list) else value
    return fields


def evaluates(name: str) -> str | None:
    """Return the set of weights that the family's authors evaluate, if its training files hold several."""
    return _load_table()[name].get("evaluates")


def families() -> list[str]:
    """Return the names of all families."""
    return list(_load_table())


def published_in(name: str) -> str:
    """Return where the preprocessing of the family is published."""
    return str(_load_table()[name]["source"])
